"""Clear the lock that a killed run of Snakemake left in its folder."""

from pathlib import Path

import psutil

from sparsetrace.core.files import InputError


def unlock(folder: Path) -> bool:
    """Remove the lock of a folder's last run, if there is one; returns whether there was.

    Args:
        folder: working directory of the run; an absolute path.

    Raises:
        InputError: a process of snakemake or sparsetrace still works in this folder, other than this one and those
            that started it.
    """
    locks = list((folder / ".snakemake" / "locks").glob("*.lock"))
    if not locks:
        return False
    this = psutil.Process()
    family = {process.pid for process in (this, *this.parents())}
    for process in psutil.process_iter(["pid", "cwd", "cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        ours = "snakemake" in command or "sparsetrace" in command
        if process.pid not in family and ours and process.info["cwd"] == str(folder):
            raise InputError(
                f"unlock: the run that locked this folder must be over, got process {process.pid} ({command[:60]}): "
                "wait for it or stop it"
            )
    for lock in locks:
        lock.unlink()
    return True
