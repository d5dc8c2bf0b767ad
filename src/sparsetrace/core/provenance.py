"""Where a data set came from: what its manifest records besides its settings. Imports no torch."""

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsetrace.core.files import sha256_file


def commit() -> str | None:
    """The git commit of this package's source, with `-dirty` if files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        # an installed package may lie within the checkout of another project
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
    """sha256 of the table that the kernels' configurations come from; None if they come from the heuristic."""
    return sha256_file(path) if path.is_file() else None


def merged(dumps: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What may differ between the shards of one run, merged from the manifests of their dumps.

    Returns:
        commits: commits of the code that generated the shards.
        smaller_batches: batch size of each group that did not fit the GPU's memory at the configured batch size.
    """
    dumps = list(dumps)
    return {
        "commits": sorted({dump["commit"] for dump in dumps if dump.get("commit")}),
        "smaller_batches": {group: size for dump in dumps for group, size in dump.get("smaller_batches", {}).items()},
    }
