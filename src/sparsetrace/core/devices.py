"""Which GPU a job uses, decided before torch is imported.

Snakemake counts GPUs but assigns no numbers, so that every job on a node would take the first. Each job therefore
claims a device of its own: it locks one file per device, and the operating system releases the lock when the process
ends, however it ends. Under a scheduler `CUDA_VISIBLE_DEVICES` is trusted: a single device is taken as it is, and the
jobs of an allocation share several between them.
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
# While one shard is packed, the next one can use the GPU.
SHARDS_PER_GPU = 2
POLL_SECONDS = 0.5


def installed() -> list[str]:
    """UUIDs of this machine's GPUs, or of their MIG slices, in the driver's order; empty without a driver."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired):
        return []
    return parse_listing(listing.stdout) if listing.returncode == 0 else []


def parse_listing(text: str) -> list[str]:
    """UUIDs in the output of `nvidia-smi -L`; of a GPU that is cut into MIG slices, those of the slices alone."""
    found: list[str] = []
    for uuid in re.findall(r"\(UUID: ([^)]+)\)", text):
        if uuid.startswith("MIG") and found and found[-1].startswith("GPU"):
            found.pop()
        found.append(uuid)
    return found


def visible_devices(devices: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The devices that a process may use: all of them, or those that `CUDA_VISIBLE_DEVICES` names.

    Args:
        devices: UUIDs of the machine's devices.
        environment: environment variables of the process.

    Returns:
        UUIDs; a name that matches no device of the machine, or several, ends the list, as it does in CUDA.
    """
    if VISIBLE not in environment:
        return list(devices)
    chosen: list[str] = []
    for name in (word.strip() for word in environment[VISIBLE].split(",")):
        if name.isdecimal():
            match = list(devices[int(name) : int(name) + 1])
        else:
            # CUDA accepts the beginning of a UUID
            match = [device for device in devices if name and device.startswith(name)]
        if len(match) != 1:
            break
        chosen.extend(match)
    return chosen


def scheduler_job(environment: Mapping[str, str]) -> str | None:
    """Number of the scheduler's job that a process belongs to; None outside of one."""
    return next((environment[name] for name in SCHEDULER_JOBS if environment.get(name)), None)


@contextmanager
def claimed(device: str, on_wait: Callable[[str], None] | None = None) -> Iterator[str | None]:
    """Keep one GPU to this process, as the only one that is visible to CUDA.

    Must be entered before torch is imported. Nothing is claimed for `cpu` or where there is no GPU.

    Args:
        device: `auto`, `cpu` or `cuda`.
        on_wait: called once, with a message, when all devices are taken.

    Yields:
        The device's name; None if nothing was claimed.
    """
    if device == "cpu":
        yield None
        return
    # a scheduler that does not set the variable assigned no device: its jobs claim one like any other
    job = scheduler_job(os.environ) if VISIBLE in os.environ else None
    if job is not None and len(names := [name for name in os.environ[VISIBLE].split(",") if name.strip()]) == 1:
        yield names[0]
        return
    devices = visible_devices(installed(), os.environ)
    if not devices:
        yield None
        return
    with lock_one(devices, lock_folder(job), on_wait) as own:
        os.environ[VISIBLE] = own
        yield own


def lock_folder(job: str | None) -> Path:
    """Folder of the locks of this user's jobs: on this host, not on a shared disk, and one for each allocation."""
    # TMPDIR may differ from job to job
    return Path("/tmp") / f"sparsetrace-devices-{os.getuid()}" / (job or "all")


@contextmanager
def lock_one(
    devices: Sequence[str], folder: Path, on_wait: Callable[[str], None] | None = None, poll: float = POLL_SECONDS
) -> Iterator[str]:
    """Hold the lock of the first free device; wait while none is free.

    Args:
        devices: names of the devices.
        folder: folder of the lock files.
        on_wait: called once, with a message, when all devices are taken.
        poll: seconds between two attempts.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise InputError(f"devices: {folder} must be this user's, got another's: remove it")
    locks = {device: FileLock(folder / f"{device}.lock", timeout=0) for device in devices}
    waited = False
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
        if not waited and on_wait is not None:
            on_wait(f"waiting for one of {len(devices)} GPUs, all of which are in use by other jobs")
        waited = True
        time.sleep(poll)


def auto_shards() -> int:
    """The number of shards that `shards: auto` stands for on this machine."""
    return max(1, SHARDS_PER_GPU * len(visible_devices(installed(), os.environ)))
