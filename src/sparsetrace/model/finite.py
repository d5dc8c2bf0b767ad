"""The one text for an activation that is NaN or Inf: each step that looks at activations names the place; no torch."""

from sparsetrace.core.files import InputError


def not_finite(step: str, place: str) -> InputError:
    """The error to raise.

    Args:
        step: command that found it, such as `generate`.
        place: layer, matrix or site, and token, in words.
    """
    return InputError(
        f"{step}: activations must be finite, got Inf or NaN in {place}: the checkpoint may need a dtype of wider range"
    )
