"""Checks of this machine: what the pipeline needs, what is there, and what to do about what is missing."""

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsetrace.core import devices
from sparsetrace.core.provenance import commit

SCHEDULERS = {"sbatch": "SLURM", "qsub": "PBS or Grid Engine", "bsub": "LSF", "flux": "Flux"}
# Free disk space below which a warning is due; a demonstration run needs less.
LOW_DISK_BYTES = 2_000_000_000
# CUDA is asked in another process, so that a crash while it starts a GPU does not end this one.
PROBE = """
import json, torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        found["gpus"].append([torch.cuda.get_device_name(i), free, total])
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check.

    Args:
        what: what was checked.
        found: what is there.
        missing: what is wrong and what to do about it; None if nothing is.
        needed: whether nothing works without it; otherwise only GPUs or clusters need it.
    """

    what: str
    found: str
    missing: str | None = None
    needed: bool = False


def examine(results: Path) -> Iterator[Finding]:
    """Run all checks.

    Args:
        results: folder of a study's results, for its disk space; may not exist.
    """
    version = platform.python_version()
    too_old = None if (3, 11) <= sys.version_info < (3, 13) else "use Python 3.11 or 3.12"
    yield Finding("python", version, too_old, needed=True)
    yield Finding("sparsetrace", f"{_version('sparsetrace') or 'source'}, commit {commit() or 'unknown'}")
    gpus = devices.installed()
    yield _driver(gpus)
    yield from _torch(gpus)
    yield _package("triton", "GPU kernels: pip install triton", needed=False)
    yield _package("safetensors", "pip install 'sparsetrace[generate]'", needed=True)
    yield _package("snakemake", "pip install 'sparsetrace[workflow]'", needed=True)
    yield _package("filelock", "pip install 'sparsetrace[generate]'", needed=bool(gpus))
    yield _disk(results)
    yield _scheduler()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str, remedy: str, needed: bool) -> Finding:
    version = _version(name)
    return Finding(name, version or "none", None if version else remedy, needed)


def _driver(gpus: list[str]) -> Finding:
    if shutil.which("nvidia-smi") is None:
        return Finding(
            "driver", "none", "no NVIDIA driver: models run on the CPU, which is practical for small ones only"
        )
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    if answer.returncode or not gpus:
        lines = (answer.stdout + answer.stderr).strip().splitlines()
        return Finding("driver", "no GPU", f"nvidia-smi says: {lines[0] if lines else 'nothing'}", needed=True)
    return Finding("driver", "; ".join(answer.stdout.strip().splitlines()))


def _torch(gpus: list[str]) -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        yield Finding("torch", "none", "pip install 'sparsetrace[generate]'", needed=True)
        return
    answer = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=300)
    if answer.returncode:
        last_line = "".join(answer.stderr.strip().splitlines()[-1:])
        yield Finding("torch", "broken", f"import torch says: {last_line}: install it again", needed=True)
        return
    found = json.loads(answer.stdout)
    missing = None
    if gpus and found["cuda"] is None:
        missing = "this build of torch has no CUDA: install one that has it, or no GPU is used"
    elif gpus and not found["gpus"]:
        missing = f"torch for CUDA {found['cuda']} sees no GPU: the driver may be too old for it"
    yield Finding("torch", f"{found['version']}, CUDA {found['cuda'] or 'none'}", missing, needed=True)
    for number, (name, free, total) in enumerate(found["gpus"]):
        yield Finding(f"GPU {number}", f"{name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free")


def _disk(results: Path) -> Finding:
    where = next(folder for folder in (results.absolute(), *results.absolute().parents) if folder.exists())
    free = shutil.disk_usage(where).free
    missing = None if free > LOW_DISK_BYTES else "free some space, or name another folder in `results`"
    return Finding("disk", f"{free / 1e9:.0f} GB free at {where}", missing, needed=True)


def _scheduler() -> Finding:
    found = [name for command, name in SCHEDULERS.items() if shutil.which(command)]
    if not found:
        return Finding("scheduler", "none", "no cluster here: snakemake --cores all runs everything on this machine")
    plugin = _version("snakemake-executor-plugin-slurm")
    if "SLURM" in found and plugin is None:
        remedy = "pip install 'sparsetrace[cluster]', then snakemake --profile profiles/slurm"
        return Finding("scheduler", ", ".join(found), remedy)
    version = f", plugin {plugin}" if "SLURM" in found else ""
    return Finding("scheduler", ", ".join(found) + version)
