"""Writing blocks in the background: a few at a time; one more has to wait, and no error is lost."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

# Blocks being written at a time: one reaches the disk while the next is copied to the page cache.
PENDING = 2


class BlockWriter:
    """Runs the tasks that write the blocks of a group, then the task that seals it."""

    def __init__(self) -> None:
        self._blocks = ThreadPoolExecutor(PENDING, "block")
        # a pool of its own: a seal waits for blocks
        self._seals = ThreadPoolExecutor(1, "seal")
        self._pending: deque[Future[int]] = deque()
        self._group: list[tuple[str, Future[int]]] = []
        self._sealing: deque[Future[None]] = deque()

    def ready(self) -> None:
        """Wait until another block may be written: back-pressure from the disk.

        Raises:
            Whatever an earlier task raised.
        """
        self._check()
        while len(self._pending) >= PENDING:
            self._pending.popleft().result()

    def submit(self, name: str, task: Callable[[], int]) -> None:
        """Run `task`, which writes the block `name` of the open group and returns its number of rows."""
        self.ready()
        future = self._blocks.submit(task)
        self._pending.append(future)
        self._group.append((name, future))

    def close(self, then: Callable[[list[str], int], None] | None = None) -> tuple[list[str], int]:
        """End the open group.

        Args:
            then: called in the background with what this returns otherwise, once the group's blocks are written; None
                waits for them.

        Returns:
            Names of the blocks that have rows, and the number of rows; nothing yet where `then` is given.
        """
        self._check()
        group, self._group = self._group, []
        if then is None:
            return _written(group)
        self._sealing.append(self._seals.submit(lambda: then(*_written(group))))
        return [], 0

    def abandon(self) -> list[str]:
        """Drop the open group once none of its tasks runs any more; returns the names of its blocks."""
        group, self._group = self._group, []
        futures = [future for _, future in group]
        for future in futures:
            future.cancel()
        wait(futures)
        # those of earlier groups are still running
        self._pending = deque(future for future in self._pending if future not in futures)
        return [name for name, _ in group]

    def wait(self) -> None:
        """Wait for every seal; raises what a task raised."""
        while self._sealing:
            self._sealing.popleft().result()

    def shutdown(self) -> None:
        """Stop: tasks that have not begun are dropped, running ones end first."""
        self._blocks.shutdown(cancel_futures=True)
        self._seals.shutdown(cancel_futures=True)

    def _check(self) -> None:
        while self._sealing and self._sealing[0].done():
            self._sealing.popleft().result()
        for future in self._pending:
            if future.done():
                future.result()


def _written(group: list[tuple[str, Future[int]]]) -> tuple[list[str], int]:
    rows = [(name, future.result()) for name, future in group]
    return [name for name, count in rows if count], sum(count for _, count in rows)
