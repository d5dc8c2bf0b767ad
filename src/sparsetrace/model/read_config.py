"""Hugging Face's config.json becomes a `ModelConfig`, or the field that stands in the way is named; without torch."""

from pathlib import Path
from typing import Any

from sparsetrace.core.files import InputError
from sparsetrace.core.settings import Conversion
from sparsetrace.formats.architecture import HIDDEN_ACTS, ModelConfig
from sparsetrace.formats.numbers import FORMATS
from sparsetrace.model.families.base import QK_NORMS, Family, positive_integer, positive_number, truth_value
from sparsetrace.model.families.registry import FAMILIES
from sparsetrace.model.rope import read_rope
from sparsetrace.model.weight_files import stored_dtype

READ_FIELDS = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("rope_parameters", "sliding_window", "tie_word_embeddings", "torch_dtype", "dtype", "bos_token_id"),
    *("eos_token_id", "architectures", "model_type", "hidden_act"),
}
# Fields that say nothing about inference in floating point: training, defaults of generation, housekeeping.
HARMLESS_FIELDS = {
    *("_name_or_path", "transformers_version", "initializer_range", "attention_dropout", "use_cache", "pad_token_id"),
    *("pretraining_tp", "max_sequence_length", "return_dict", "output_attentions", "output_hidden_states"),
    *("is_encoder_decoder", "use_bfloat16", "chunk_size_feed_forward", "problem_type", "id2label", "label2id"),
}

# transformers' own where config.json has none
DEFAULT_EPS = 1e-6


def read_config(raw: dict[str, Any], conversion: Conversion, checkpoint: Path) -> tuple[Family, ModelConfig]:
    """Family and architecture from the content of config.json.

    Raises:
        InputError: names each field that is missing, unsupported or unknown.
    """
    where = f"convert: {checkpoint / 'config.json'}"
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise InputError(f"{where}: model_type must be one of {', '.join(FAMILIES)}, got {raw.get('model_type')!r}")
    if (named := raw.get("architectures") or [family.architecture]) != [family.architecture]:
        raise InputError(f"{where}: architectures must be [{family.architecture}], got {named}")
    raw = {**family.defaults, **raw}
    _refuse_unsupported(raw, family, set(conversion.ignore_fields), where)
    heads = positive_integer(raw, "num_attention_heads", where)
    hidden = positive_integer(raw, "hidden_size", where)
    kv_heads = heads if raw.get("num_key_value_heads") is None else positive_integer(raw, "num_key_value_heads", where)
    if heads % kv_heads:
        raise InputError(
            f"{where}: num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {kv_heads}"
        )
    # where a family has a default of its own, null is none of its values
    derived = raw.get("head_dim") is None and "head_dim" not in family.defaults
    head_dim = hidden // heads if derived else positive_integer(raw, "head_dim", where)
    if derived and hidden % heads:
        raise InputError(
            f"{where}: hidden_size must be a multiple of num_attention_heads where there is no head_dim, got {hidden} "
            f"and {heads}"
        )
    if head_dim % 2:
        raise InputError(f"{where}: head_dim must be even, since halves of it are rotated, got {head_dim}")
    rope_theta, rope_scaling = read_rope(raw, set(conversion.ignore_fields), where)
    return family, ModelConfig(
        hidden_size=hidden,
        intermediate_size=positive_integer(raw, "intermediate_size", where),
        num_hidden_layers=positive_integer(raw, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=positive_integer(raw, "vocab_size", where),
        max_position_embeddings=positive_integer(raw, "max_position_embeddings", where),
        rms_norm_eps=positive_number({"rms_norm_eps": DEFAULT_EPS, **raw}, "rms_norm_eps", where),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        sliding_window=family.window(raw, where),
        tie_word_embeddings=truth_value(raw, "tie_word_embeddings", where),
        dtype=_dtype(raw, conversion, checkpoint, where),
        hidden_act=raw.get("hidden_act", "silu"),
        qk_norm=set(QK_NORMS) <= set(family.norms),
    )


def _refuse_unsupported(raw: dict[str, Any], family: Family, ignored: set[str], where: str) -> None:
    """Refuse fields of unknown effect, and values that the decoder cannot run."""
    known = READ_FIELDS | HARMLESS_FIELDS | family.own_fields | set(family.allowed_values) | ignored
    if unknown := sorted(set(raw) - known):
        raise InputError(
            f"{where}: fields must be ones whose effect is known, got {', '.join(unknown)}: "
            "if they do not alter inference, list them in ignore_fields"
        )
    # ignored or not: the decoder needs one that it has
    if raw.get("hidden_act", "silu") not in HIDDEN_ACTS:
        remedy = ": ignore_fields cannot stand for an activation function" if "hidden_act" in ignored else ""
        raise InputError(f"{where}: hidden_act must be {_either(HIDDEN_ACTS)}, got {raw['hidden_act']!r}{remedy}")
    for name, allowed in family.allowed_values.items():
        if name in raw and raw[name] not in allowed and name not in ignored:
            raise InputError(f"{where}: {name} must be {_either(allowed)}, got {raw[name]!r}")


def _either(values: tuple[Any, ...]) -> str:
    return " or ".join(map(repr, values))


def _dtype(raw: dict[str, Any], conversion: Conversion, checkpoint: Path, where: str) -> str:
    """The dtype asked for, or that of config.json, or where it names none, that of the tensors."""
    if conversion.dtype != "auto":
        return conversion.dtype
    # transformers 5 renamed the field
    named = {name: raw[name] for name in ("torch_dtype", "dtype") if raw.get(name) is not None}
    for name, dtype in named.items():
        if not isinstance(dtype, str) or dtype not in FORMATS:
            raise InputError(f"{where}: {name} must be one of {', '.join(FORMATS)}, got {dtype!r}: choose a dtype")
    if len(set(named.values())) > 1:
        given = ", ".join(f"{dtype} in {name}" for name, dtype in named.items())
        raise InputError(f"{where}: dtype must be the same wherever it is given, got {given}: choose a dtype")
    return next(iter(named.values()), None) or stored_dtype(checkpoint)
