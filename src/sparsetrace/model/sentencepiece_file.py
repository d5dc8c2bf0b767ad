"""Reading `tokenizer.model`, SentencePiece's file: its pieces, and how it prepares text."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sparsetrace.core.files import InputError

# Types of a piece, and of a model, in sentencepiece_model.proto.
CONTROL, USER_DEFINED = 3, 4
BPE = 2
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class Pieces(NamedTuple):
    """What a `tokenizer.model` says.

    Args:
        vocabulary: id of each piece.
        added: pieces that a text is first divided at, each with whether it is a control token.
        charsmap: the compiled normalisation, empty for none.
        byte_fallback: whether characters without a piece become bytes.
        unknown: piece of what has none.
    """

    vocabulary: dict[str, int]
    added: dict[str, bool]
    charsmap: bytes
    byte_fallback: bool
    unknown: str


def read_pieces(path: Path) -> Pieces:
    """Read the file.

    Raises:
        InputError: it is no SentencePiece model, or not a BPE model.
    """
    vocabulary: dict[str, int] = {}
    added: dict[str, bool] = {}
    trainer: dict[int, bytes | int] = {}
    normalizer: dict[int, bytes | int] = {}
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(_bytes(value)))
                text, kind = _bytes(piece[1]).decode(), piece.get(3, 1)
                vocabulary[text] = len(vocabulary)
                if kind in (CONTROL, USER_DEFINED):
                    added[text] = kind == CONTROL
            elif number in (2, 3):
                (trainer if number == 2 else normalizer).update(_fields(_bytes(value)))
        charsmap, unknown = _bytes(normalizer.get(2, b"")), _bytes(trainer.get(45, b"<unk>")).decode()
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise InputError(f"tokenizer: {path} must hold a readable tokenizer, got {error!r:.80}") from None
    if not vocabulary or trainer.get(3, 1) != BPE:
        raise InputError(f"tokenizer: {path} must hold a readable tokenizer of BPE pieces, got another")
    return Pieces(vocabulary, added, charsmap, bool(trainer.get(35, 0)), unknown)


def merges_of(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, in the order in which they are merged: that of the pieces they make."""
    merges = []
    for piece, rank in vocabulary.items():
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        found = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += [(rank, len(left), len(right), left, right) for left, right in found]
    return [(left, right) for *_, left, right in sorted(merges, key=lambda merge: merge[:3])]


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of each field of a message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield number, value
        elif kind in (FIXED32, FIXED64, BYTES):
            size, at = _varint(data, at) if kind == BYTES else (4 if kind == FIXED32 else 8, at)
            if at + size > len(data):
                raise ValueError("a field that ends beyond the file")
            yield number, data[at : at + size]
            at += size
        else:
            raise ValueError(f"a field of type {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _bytes(value: bytes | int) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number in the place of bytes")
    return value
