"""The checksum by which a step finds damage in the large files that it reads anyway."""

from typing import Any

from xxhash import xxh3_128


class Checksum:
    """xxh3 with 128 bits, fed piece by piece: 12 GB/s on a core, sha256 0.8 to 2. No guard against forgers.

    Args:
        data: the first piece, any contiguous buffer.
    """

    def __init__(self, data: Any = b"") -> None:
        self._state = xxh3_128(data)

    def update(self, data: Any) -> None:
        """Take the next piece."""
        self._state.update(data)

    def __str__(self) -> str:
        return str(self._state.hexdigest())
