"""Checks and resolves what a caller chooses of a workload: tokens, positions, layers and matrices."""

import reprlib
from collections.abc import Iterable

import numpy as np

from sparsetrace.core.files import InputError
from sparsetrace.formats.sites import Leaf

# Tokens whose operands are asked for: a number, a slice of numbers or several numbers; None takes every row.
Tokens = int | slice | Iterable[int] | np.ndarray | None
# What a selection takes: a number, a slice of numbers or several numbers; None takes all.
Choice = int | slice | Iterable[int] | None


def choose_leaves(
    leaves: list[Leaf], known: Iterable[Leaf], layer: Choice, matrix: str | Iterable[str] | None
) -> list[Leaf]:
    """The leaves of some layers and of some matrices.

    Args:
        leaves: to choose from.
        known: all leaves of the workload; they decide which layers and matrices may be named.
        layer: layer numbers; None takes every layer and the matrices that are in none.
        matrix: names of matrices.

    Raises:
        InputError: no such layer or matrix.
    """
    known = list(known)
    names = choose_names(matrix, list(dict.fromkeys(name for _, name in known)), "matrix")
    if layer is None:
        return [leaf for leaf in leaves if leaf[1] in names]
    count = layer_count(known)
    numbers = np.arange(count)
    layers = numbers[choose(numbers, layer, "layer")] if isinstance(layer, slice) else integers(layer, "layer")
    if not len(layers) or not np.isin(layers, numbers).all():
        asked = layer if isinstance(layer, slice) else ", ".join(map(str, layers)) or "none"
        rule = f"0 to {count - 1}" if count else "left out, since no matrix belongs to a layer"
        raise InputError(f"workload: layer must be {rule}, got {asked}")
    return [leaf for leaf in leaves if leaf[0] is not None and leaf[0] in layers and leaf[1] in names]


def layer_count(leaves: Iterable[Leaf]) -> int:
    """Number of layers, up to the last one that has a matrix here."""
    return 1 + max((layer for layer, _ in leaves if layer is not None), default=-1)


def choose_names(wanted: str | Iterable[str] | None, known: Iterable[str], what: str) -> list[str]:
    """Names among those that are known.

    Args:
        wanted: one name or several; None for all.
        known: the names that there are.
        what: for the message.

    Raises:
        InputError: a name that is not known.
    """
    known = list(known)
    if wanted is None:
        return known
    names = list(wanted) if isinstance(wanted, Iterable) and not isinstance(wanted, str) else [wanted]
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"workload: {what} must be among {', '.join(known)}, got {', '.join(map(str, unknown))}")
    return names


def choose(numbers: np.ndarray, choice: Choice, what: str) -> np.ndarray:
    """Which of some numbers a choice takes.

    Args:
        numbers: int64 [n].
        choice: a slice is of the numbers, not of their places: start included, stop not, step counted from the start.
        what: for the message.

    Returns:
        bool [n].

    Raises:
        InputError: the choice is not made of whole numbers, or is a slice that counts from the end.
    """
    if choice is None:
        return np.ones(len(numbers), bool)
    if not isinstance(choice, slice):
        return np.isin(numbers, integers(choice, what))
    start = 0 if choice.start is None else choice.start
    step = 1 if choice.step is None else choice.step
    bounds = (start, start if choice.stop is None else choice.stop, step)
    if not all(isinstance(bound, int | np.integer) for bound in bounds) or min(bounds) < 0 or step < 1:
        raise InputError(
            f"workload: a slice of {what} must have a start and stop from 0 and a step from 1, got {choice}"
        )
    keep = numbers >= start
    if choice.stop is not None:
        keep &= numbers < choice.stop
    return keep if step == 1 else keep & ((numbers - start) % step == 0)


def integers(choice: int | Iterable[int] | np.ndarray, what: str) -> np.ndarray:
    """One number or several as int64 [n], in the order given; truth values and fractions are refused."""
    several = isinstance(choice, Iterable) and not isinstance(choice, str | np.ndarray)
    numbers = np.atleast_1d(np.asarray(list(choice) if several else choice))  # type: ignore[arg-type]
    if numbers.ndim != 1 or (len(numbers) and numbers.dtype.kind not in "iu"):
        got = reprlib.repr(choice)
        raise InputError(f"workload: {what} must be a whole number, a slice or a list of them, got {got}")
    return numbers.astype(np.int64)


def one_token(token: int) -> int:
    """A single token, for calls whose flat answer could not tell several apart."""
    if not isinstance(token, int | np.integer):
        raise InputError(f"workload: token must be one number, got {token!r}: use matrix() for several")
    return int(token)
