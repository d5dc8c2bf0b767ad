"""Qwen3, the dense models: Llama with an RMSNorm of each head's queries and keys before the rotary embedding."""

from typing import Any

from sparsetrace.core.files import InputError
from sparsetrace.model.families.base import ALLOWED_VALUES, NORMS, QK_NORMS, Family, positive_integer

FULL, SLIDING = "full_attention", "sliding_attention"


def _window(raw: dict[str, Any], where: str) -> int | None:
    """The sliding window of all layers; transformers also runs models of which only some layers have one."""
    layers = positive_integer(raw, "num_hidden_layers", where)
    used = raw["use_sliding_window"] and raw["sliding_window"] is not None
    types = raw.get("layer_types")
    if types is None:
        types = [FULL] * layers
        if used:
            first = raw["max_window_layers"]
            if not isinstance(first, int):
                raise InputError(f"{where}: max_window_layers must be an integer, got {first!r}")
            types = [SLIDING if layer >= first else FULL for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(kind not in (FULL, SLIDING) for kind in types):
        raise InputError(f"{where}: layer_types must be {FULL} or {SLIDING} for each of {layers} layers, got {types!r}")
    if 0 < types.count(SLIDING) < layers:
        raise InputError(
            f"{where}: layer_types must be the same for all layers, got {types.count(FULL)} of {FULL} and "
            f"{types.count(SLIDING)} of {SLIDING}"
        )
    if types[0] == FULL:
        return None
    if not used:
        raise InputError(f"{where}: sliding_window must be given and used where layer_types are {SLIDING}, got neither")
    return positive_integer(raw, "sliding_window", where)


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    # `_window` reads them
    allowed_values={name: values for name, values in ALLOWED_VALUES.items() if name != "layer_types"},
    own_fields=frozenset({"use_sliding_window", "max_window_layers", "layer_types"}),
    window=_window,
    norms=NORMS | QK_NORMS,
)
