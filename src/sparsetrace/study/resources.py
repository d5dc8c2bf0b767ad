"""Memory and time that a job asks of the scheduler, from the size of its model."""

from typing import NamedTuple


class Need(NamedTuple):
    """What one job asks for: memory in MB, time in minutes."""

    mem_mb: int
    runtime: int


# Minutes of each step: a fixed part, and a part for each GB of the model, on a slow disk and an old GPU.
MINUTES = {
    "convert": (10, 2),
    "calibrate": (30, 6),
    "allocate": (60, 15),
    "prune": (60, 6),
    "quality": (30, 6),
    "generate": (120, 15),
}
# The interpreter with torch, and the blocks of one group.
STEP_MB = 4000
# Two blocks in pinned memory, on their way from the GPU to the disk.
PINNED_MB = 3000
# `convert` holds only the tensors that it is writing, or two copies of a smaller model.
CONVERTED_MB = 4400


def needs(step: str, weight_bytes: int, attempt: int = 1) -> Need:
    """Memory and time of a step that handles a model.

    A step that runs the model holds its weights in host memory once, and a second time while they are read.

    Args:
        step: one of `MINUTES`.
        weight_bytes: size of the model.
        attempt: 1, or more after a job ran out of memory or time; the request grows in proportion.
    """
    twice_mb = 2 * weight_bytes // 1_000_000
    minutes, minutes_per_gb = MINUTES[step]
    mem_mb = STEP_MB + (min(twice_mb, CONVERTED_MB) if step == "convert" else twice_mb)
    mem_mb += PINNED_MB if step == "generate" else 0
    return Need(attempt * mem_mb, attempt * (minutes + minutes_per_gb * weight_bytes // 1_000_000_000))
