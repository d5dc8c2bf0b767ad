"""The console script, also `python -m sparsetrace`."""

import sys


def main() -> None:
    """Run the command line, or say what to install where only the reader is."""
    try:
        from sparsetrace.cli.main import main as run
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0].startswith("sparsetrace"):
            raise
        print(
            f"error: sparsetrace: {error.name} must be installed for the command line, got only the reader: "
            "pip install 'sparsetrace[generate,workflow]'",
            file=sys.stderr,
        )
        sys.exit(1)
    run()


if __name__ == "__main__":
    main()
