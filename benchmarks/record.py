"""What every benchmark's rows begin with, and how rows are appended to a CSV."""

import csv
import hashlib
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE, KERNELS = ROOT / "src" / "sparsetrace", ROOT / "kernels" / "sparsetrace_kernels"
WHERE = ("gpu", "torch", "triton", "commit")


def source_version(*packages: Path) -> str:
    """Name the code measured: the commit, or a hash of the packages' sources where they are not committed."""
    git = ["git", "-C", str(ROOT)]
    status = subprocess.run([*git, "status", "--porcelain", *packages], capture_output=True, text=True, check=False)
    if status.returncode == 0 and not status.stdout:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        return head.stdout.strip()
    digest = hashlib.sha256()
    for path in sorted(path for package in packages for path in package.rglob("*")):
        if path.suffix in (".py", ".json"):
            digest.update(path.read_bytes())
    return f"sources-{digest.hexdigest()[:12]}"


def environment() -> dict[str, str]:
    """Of a process that imports this checkout's packages."""
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    return os.environ | {"PYTHONPATH": os.pathsep.join([f"{ROOT}/src", f"{ROOT}/kernels", *inherited])}


def where() -> dict[str, str]:
    """The columns of `WHERE`: where and what is measured."""
    import torch

    try:
        from triton import __version__ as triton
    except ModuleNotFoundError:
        triton = "none"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return dict(zip(WHERE, (gpu, torch.__version__, triton, source_version(PACKAGE, KERNELS)), strict=True))


def append(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a CSV, which is begun with its head where it is not there; a column that a row lacks is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
