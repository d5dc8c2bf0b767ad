"""The embedded model in numbers; without torch."""

from typing import Final

from sparsetrace.formats.architecture import ModelConfig

CONFIG: Final = ModelConfig(
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=1024,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    sliding_window=None,
    tie_word_embeddings=True,
    dtype="float32",
)
# Ids of the tokenizer: unknown, begin, end.
UNK, BOS, EOS = 0, 1, 2
