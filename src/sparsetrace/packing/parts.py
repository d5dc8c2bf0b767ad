"""What a packed shard consists of, and whether all of it is there.

| file | what |
|---|---|
| `parts/00003.json` | that of the dump, and every data file with its rows and sha256; the tables' sha256 |
| `parts/00003.tokens.parquet`, `parts/00003.sequences.parquet` | the shard's small tables |
| `workload/data/...` | the data files that the manifest names |
"""

from pathlib import Path
from typing import Any

from sparsetrace.formats.tables import SEQUENCES, TOKENS

# Keys that a shard's manifest must have.
PACKED_KEYS = ("dump", "shard", "encoding", "shared", "manifest", "files")
SHARD_TABLES = {"tokens": TOKENS, "sequences": SEQUENCES}


def is_whole(packed: dict[str, Any], workload: Path, parts: Path) -> bool:
    """Whether a shard's data files and tables are there; hashes are not checked.

    Args:
        packed: manifest of the shard.
        workload: folder of the data set.
        parts: folder of the shard's manifest and tables.
    """
    tables = [parts / f"{packed['shard']:05d}.{table}.parquet" for table in SHARD_TABLES]
    return all(has_size(workload / file["path"], file["bytes"]) for file in packed["files"]) and all(
        table.is_file() for table in tables
    )


def has_size(path: Path, size: int) -> bool:
    """Whether a file of this many bytes is there."""
    return path.is_file() and path.stat().st_size == size
