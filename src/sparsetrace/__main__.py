"""`python -m sparsetrace` is the console script."""

from sparsetrace.cli import main

if __name__ == "__main__":
    main()
