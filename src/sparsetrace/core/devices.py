"""Which GPU a job uses, settled before torch is imported.

Snakemake counts GPUs but hands out no numbers, so that every job of a node would take the first. Each job therefore
claims a device of its own: a lock on one file per device, which the kernel drops when the process ends, however it
ends. Under a scheduler `CUDA_VISIBLE_DEVICES` is trusted: one device is taken as it is, and several are shared out
among the jobs of that allocation.
"""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from sparsetrace.core.files import InputError

VISIBLE = "CUDA_VISIBLE_DEVICES"
# Set in every job of SLURM, PBS, LSF, Grid Engine and Flux.
SCHEDULER_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "FLUX_JOB_ID")
# While one shard is packed, the next can use its GPU.
SHARDS_PER_GPU = 2
POLL_SECONDS = 0.5


def installed() -> list[str]:
    """UUIDs of this machine's GPUs, or of their MIG slices, in the driver's order; none without a driver."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired):
        return []
    return parse_listing(listing.stdout) if listing.returncode == 0 else []


def parse_listing(text: str) -> list[str]:
    """Devices in what `nvidia-smi -L` prints; of a GPU that is cut up, only the slices can be used."""
    found: list[str] = []
    for uuid in re.findall(r"\(UUID: ([^)]+)\)", text):
        if uuid.startswith("MIG") and found and found[-1].startswith("GPU"):
            found.pop()
        found.append(uuid)
    return found


def candidates(devices: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The devices that this process may use: all of them, or those that `CUDA_VISIBLE_DEVICES` names.

    Args:
        devices: of the machine.
        environment: of the process.

    Returns:
        UUIDs; a name that is not of this machine ends the list, as it does in CUDA.
    """
    if VISIBLE not in environment:
        return list(devices)
    chosen: list[str] = []
    for name in (word.strip() for word in environment[VISIBLE].split(",")):
        if name.isdecimal():
            match = list(devices[int(name) : int(name) + 1])
        else:
            # CUDA accepts a UUID's beginning
            match = [device for device in devices if name and device.startswith(name)]
        if len(match) != 1:
            break
        chosen.extend(match)
    return chosen


def scheduler_job(environment: Mapping[str, str]) -> str | None:
    """The number of the scheduler's job that this process belongs to."""
    return next((environment[name] for name in SCHEDULER_JOBS if environment.get(name)), None)


@contextmanager
def claimed(device: str, waiting: Callable[[str], None] | None = None) -> Iterator[str | None]:
    """Keep one GPU to this process, as the only one that CUDA shows it.

    Must be entered before torch is imported; nothing is claimed for `cpu` or where there is no GPU.

    Args:
        device: `auto`, `cpu` or `cuda`.
        waiting: told once when every device is taken.

    Yields:
        The device's name, or None.
    """
    if device == "cpu":
        yield None
        return
    # a scheduler that set nothing gave no device, and its jobs are like any others
    job = scheduler_job(os.environ) if VISIBLE in os.environ else None
    if job is not None and len(names := [name for name in os.environ[VISIBLE].split(",") if name.strip()]) == 1:
        yield names[0]
        return
    choice = candidates(installed(), os.environ)
    if not choice:
        yield None
        return
    with lock_one(choice, lock_folder(job), waiting) as own:
        os.environ[VISIBLE] = own
        yield own


def lock_folder(job: str | None) -> Path:
    """Where the locks of this user's jobs lie: on this host, not on a shared disk, and apart for each allocation."""
    # not TMPDIR, which may differ from job to job
    return Path("/tmp") / f"sparsetrace-devices-{os.getuid()}" / (job or "all")


@contextmanager
def lock_one(
    devices: Sequence[str], folder: Path, waiting: Callable[[str], None] | None = None, poll: float = POLL_SECONDS
) -> Iterator[str]:
    """Hold the lock of the first device that is free, and wait where none is.

    Args:
        devices: names of devices.
        folder: of the lock files.
        waiting: told once when every device is taken.
        poll: seconds between two rounds.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise InputError(f"devices: {folder} must be this user's, got another's: remove it")
    locks = {device: FileLock(folder / f"{device}.lock", timeout=0) for device in devices}
    told = False
    while True:
        for device, lock in locks.items():
            try:
                lock.acquire()
            except Timeout:
                continue
            try:
                yield device
            finally:
                lock.release()
            return
        if not told and waiting is not None:
            waiting(f"waiting for one of {len(devices)} GPUs, all of which are in use by other jobs")
        told = True
        time.sleep(poll)


def auto_shards() -> int:
    """What `shards: auto` stands for on this machine."""
    return max(1, SHARDS_PER_GPU * len(candidates(installed(), os.environ)))
