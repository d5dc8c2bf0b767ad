"""Where a data set came from: what its manifest says besides its settings; imports no torch."""

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsetrace.core.files import sha256_file


def commit() -> str | None:
    """The git commit of this package's source, `-dirty` where files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        # a virtual environment may lie within a checkout of something else
        for words in (["ls-files", "--error-unmatch", Path(__file__).name], ["rev-parse", "HEAD"]):
            found = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "-C", folder, "status", "--porcelain", "--untracked-files=no", ":/src", ":/kernels"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("-dirty" if changes.stdout else "")


def tuning_table(path: Path) -> str | None:
    """sha256 of the table that chose the kernels' configurations; None where a heuristic did."""
    return sha256_file(path) if path.is_file() else None


def merged(dumps: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What may differ among the shards of one run, from the manifests of their dumps.

    Returns:
        commits: of the code that generated them.
        smaller_batches: batch size of each group that did not fit the GPU's memory at the configured one.
    """
    dumps = list(dumps)
    return {
        "commits": sorted({dump["commit"] for dump in dumps if dump.get("commit")}),
        "smaller_batches": {group: size for dump in dumps for group, size in dump.get("smaller_batches", {}).items()},
    }
