"""The background writer: few blocks under way, whatever group they are of, and no error lost."""

import threading

import pytest

from sparsetrace.generation.writer import PENDING, BlockWriter


@pytest.mark.parametrize("end", ["close", "abandon"])
def test_blocks_of_an_earlier_group_count_as_under_way(end):
    """The memory that a block is written from is used again after `PENDING` more, also across the end of a group."""
    writer, gate, sealed = BlockWriter(), threading.Event(), []
    writer.submit("slow", lambda: gate.wait(20) and 1)
    writer.close(lambda blocks, rows: sealed.append((blocks, rows)))
    for number in range(PENDING - 1):
        writer.submit(f"quick {number}", lambda: 2)
    getattr(writer, end)()
    if end == "abandon":
        writer.submit("other", lambda: 3)
    waiting = threading.Thread(target=writer.ready)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive(), "the first block is not written yet"
    gate.set()
    waiting.join(20)
    assert not waiting.is_alive()
    writer.wait()
    assert sealed == [(["slow"], 1)]
    writer.shutdown()


def test_an_error_reaches_whoever_comes_next():
    writer = BlockWriter()

    def fails():
        raise OSError("No space left on device")

    writer.submit("block", fails)
    # at the end of the group if it is known by then, else when its seal is waited for
    with pytest.raises(OSError, match="No space left"):
        writer.close(lambda blocks, rows: pytest.fail("a group that is not whole was sealed"))
        writer.wait()
    writer.shutdown()
