"""Real sparse workloads of language models, in Parquet, indexed by layer, matrix and token.

`sparsetrace.open(path)` reads a workload; the `sparsetrace` command makes one.
"""

__version__ = "0.1.0"
__all__ = ["InputError", "Workload", "__version__", "open"]


def __getattr__(name: str) -> object:
    # loaded on first use (PEP 562): every dry run imports a part of this package, and must not load pyarrow
    if name in ("open", "Workload"):
        from sparsetrace.workload import reader

        return getattr(reader, name)
    if name == "InputError":
        from sparsetrace.core.files import InputError

        return InputError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
