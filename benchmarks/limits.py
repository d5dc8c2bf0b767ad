"""What a machine's links can carry: copies from a GPU to the host, and writes to a disk.

    python benchmarks/limits.py /scratch --gigabytes 20

Decoding that writes its operands can be no faster than either, so benchmarks of it measure both in the same run.
"""

import argparse
import errno
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Of one copy, and of one file: what a block writer handles at a time.
BLOCK_BYTES = 256 << 20
TOTAL_BYTES = 20_000_000_000
# O_DIRECT: alignment of addresses and sizes.
PAGE_BYTES = 4096
WRITE_WAYS = ("synced", "synced_last", "direct")


def copy_bandwidth(total_bytes: int = TOTAL_BYTES, block_bytes: int = BLOCK_BYTES) -> float:
    """Copy from the current GPU to pinned memory, two blocks in turn on one side stream.

    Args:
        total_bytes: copied in all, at least.
        block_bytes: of one copy.

    Returns:
        GB/s.
    """
    import torch

    source = torch.randint(0, 256, (block_bytes,), dtype=torch.uint8, device="cuda")
    targets = [torch.empty(block_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    copies = -(-total_bytes // block_bytes)
    stream = torch.cuda.Stream()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for target in targets:
            target.copy_(source, non_blocking=True)
        begin.record()
        for i in range(copies):
            targets[i % 2].copy_(source, non_blocking=True)
        end.record()
    stream.synchronize()
    return copies * block_bytes / (begin.elapsed_time(end) / 1e3) / 1e9


def write_bandwidth(
    folder: Path, total_bytes: int = TOTAL_BYTES, block_bytes: int = BLOCK_BYTES, way: str = "synced"
) -> float:
    """Write files of one block each from one thread, until all of them are on the disk, and remove them.

    Args:
        folder: on the disk in question.
        total_bytes: written in all, at least.
        block_bytes: of one file, a multiple of `PAGE_BYTES`.
        way: `synced` flushes each file before the next is begun; `synced_last` begins the flush of all when the last
            is written; `direct` goes around the page cache.

    Returns:
        GB/s.
    """
    if way not in WRITE_WAYS:
        raise ValueError(f"write_bandwidth: way must be one of {', '.join(WRITE_WAYS)}, got {way!r}")
    if block_bytes % PAGE_BYTES:
        raise ValueError(f"write_bandwidth: block_bytes must be a multiple of {PAGE_BYTES}, got {block_bytes}")
    # page-aligned, and filled with what no file system can shrink
    with mmap.mmap(-1, block_bytes) as buffer:
        for start in range(0, block_bytes, 1 << 20):
            size = min(1 << 20, block_bytes - start)
            buffer[start : start + size] = os.urandom(size)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if way == "direct" else 0)
        count = -(-total_bytes // block_bytes)
        waiting: list[int] = []
        with _emptied(folder, count) as paths, memoryview(buffer) as view:
            started = time.perf_counter()
            for path in paths:
                descriptor = os.open(path, flags, 0o600)
                waiting.append(descriptor)
                done = 0
                while done < block_bytes:
                    done += os.write(descriptor, view[done:])
                if way != "synced_last":
                    _finish(waiting)
            _finish(waiting)
            seconds = time.perf_counter() - started
    return count * block_bytes / seconds / 1e9


def _finish(descriptors: list[int]) -> None:
    while descriptors:
        os.fsync(descriptors[0])
        os.close(descriptors.pop(0))


@contextmanager
def _emptied(folder: Path, count: int) -> Iterator[list[Path]]:
    """Names of files that are removed afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f".limits-{os.getpid()}-{number:05d}" for number in range(count)]
    try:
        yield paths
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def disk_bandwidth(folder: Path, total_bytes: int = TOTAL_BYTES, block_bytes: int = BLOCK_BYTES) -> dict[str, float]:
    """Write in every way that the file system knows; GB/s of each. The limit is the largest."""
    found = {}
    for way in WRITE_WAYS:
        try:
            found[way] = write_bandwidth(folder, total_bytes, block_bytes, way)
        except OSError as error:
            # no O_DIRECT there; anything else is a fault of the disk
            if way != "direct" or error.errno != errno.EINVAL:
                raise
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=TOTAL_BYTES / 1e9)
    parser.add_argument("--no-gpu", action="store_true", help="measure the disk alone")
    arguments = parser.parse_args()
    total_bytes = int(arguments.gigabytes * 1e9)
    if not arguments.no_gpu:
        print(f"GPU to pinned memory: {copy_bandwidth(total_bytes):.2f} GB/s", flush=True)
    for way, rate in disk_bandwidth(arguments.folder, total_bytes).items():
        print(f"disk, {way}: {rate:.2f} GB/s", flush=True)


if __name__ == "__main__":
    main()
