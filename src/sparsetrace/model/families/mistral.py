"""Mistral: Llama with one sliding window for all layers."""

from typing import Any

from sparsetrace.model.families.base import Family, positive_integer


def _window(raw: dict[str, Any], where: str) -> int | None:
    return None if raw["sliding_window"] is None else positive_integer(raw, "sliding_window", where)


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    window=_window,
)
