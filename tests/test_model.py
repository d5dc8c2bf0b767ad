"""The decoder against Hugging Face transformers, on random checkpoints written by `save_pretrained`.

Logits agree within 1e-5 of the largest in float32 (DESIGN, contract 6), at prefill and at each cached decode step.
"""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

from sparsetrace.core.settings import Conversion
from sparsetrace.model.convert import convert
from sparsetrace.model.decoder import KVCache, RMSNorm

transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
THETA = {"rope_type": "default", "rope_theta": 123.0}
CASES = [
    # id, architecture, changes to the configuration
    ("llama", "Llama", {"num_key_value_heads": 4}),
    ("llama-tied", "Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("llama-gqa", "Llama", {"rope_parameters": THETA}),
    ("llama-gqa-tied", "Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    # wide heads, so that frequencies lie in all three bands and near their ends
    ("llama-gqa-rope3", "Llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    ("llama-narrow-heads", "Llama", {"head_dim": 6, "hidden_size": 40}),
    ("mistral", "Mistral", {"num_key_value_heads": 4, "sliding_window": None}),
    ("mistral-gqa-tied", "Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    ("mistral-gqa-window", "Mistral", {"sliding_window": 5}),
    # not 1, with which transformers' own cache keeps every position (`keys[-window + 1:]`)
    ("mistral-window-of-two", "Mistral", {"sliding_window": 2, "tie_word_embeddings": True}),
]


def oracle(tiny, folder, architecture, changes):
    """A random transformers model, and the same converted."""
    config = {
        "hidden_size": 36,
        "intermediate_size": 43,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": tiny.vocabulary,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # larger ones amplify rounding until transformers itself is 1e-5 off its own float64 result
        "initializer_range": 0.15,
    }
    config = getattr(transformers, f"{architecture}Config")(**(config | changes), attn_implementation="eager")
    theirs = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.normal_(1, 0.3)
    theirs.save_pretrained(tiny.tokenizer(folder / "checkpoint"))
    return theirs, convert(folder / "checkpoint", folder / "model", Conversion())


def assert_close(ours, theirs):
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    assert (ours.cpu() - theirs.cpu()).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.fixture(scope="module", params=[pytest.param(case[1:], id=case[0]) for case in CASES])
def pair(request, tiny, tmp_path_factory, device):
    tiny.rng(request.node.nodeid + str(request.param))
    theirs, model = oracle(tiny, tmp_path_factory.mktemp("model"), *request.param)
    return theirs.to(device), model.load(device)


@torch.inference_mode()
def test_prefill_logits(pair, device, rng):
    theirs, ours = pair
    tokens_BT = torch.from_numpy(rng.integers(0, ours.config.vocab_size, (3, 41))).to(device)
    positions_BT = torch.arange(41, device=device).expand(3, -1)
    assert_close(ours.logits(ours(tokens_BT, positions_BT)), theirs(tokens_BT).logits)


@torch.inference_mode()
def test_each_decode_step(pair, device, rng):
    theirs, ours = pair
    B, prompt, steps = 2, 11, 24
    tokens_BT = torch.from_numpy(rng.integers(0, ours.config.vocab_size, (B, prompt + steps))).to(device)
    cache = KVCache(ours.config, B, prompt + steps, device)
    past = None
    bounds = [0, *range(prompt, prompt + steps + 1)]
    for start, stop in pairwise(bounds):
        positions_BT = torch.arange(start, stop, device=device).expand(B, -1)
        hidden_BTC = ours(tokens_BT[:, start:stop], positions_BT, cache)
        reference = theirs(tokens_BT[:, start:stop], past_key_values=past, use_cache=True)
        past = reference.past_key_values
        assert_close(ours.logits(hidden_BTC), reference.logits)


@torch.inference_mode()
def test_slots_of_different_length(pair, device, rng):
    """Prompts padded to one length, decoded side by side, each as if it were alone."""
    theirs, ours = pair
    lengths, steps = np.array([3, 13, 8]), 6
    B, T = len(lengths), int(lengths.max())
    texts = [rng.integers(0, ours.config.vocab_size, length + steps) for length in lengths]
    tokens_BT = np.zeros((B, T), dtype=np.int64)
    for slot, length in enumerate(lengths):
        tokens_BT[slot, :length] = texts[slot][:length]
    cache = KVCache(ours.config, B, T + steps, device)
    hidden_BTC = ours(torch.from_numpy(tokens_BT).to(device), torch.arange(T, device=device).expand(B, -1), cache)
    ours_at = {(slot, p): hidden_BTC[slot, p] for slot in range(B) for p in range(lengths[slot])}
    for step in range(steps):
        fed_B1 = torch.tensor([[int(texts[slot][lengths[slot] + step])] for slot in range(B)], device=device)
        hidden_BTC = ours(fed_B1, torch.from_numpy(lengths + step)[:, None].to(device), cache)
        ours_at |= {(slot, int(lengths[slot]) + step): hidden_BTC[slot, 0] for slot in range(B)}
    for slot in range(B):
        alone_TV = theirs(torch.from_numpy(texts[slot])[None].to(device)).logits[0]
        logits_TV = ours.logits(torch.stack([ours_at[slot, p] for p in range(len(texts[slot]))]))
        assert_close(logits_TV, alone_TV)


def test_bfloat16_norm_is_transformers_bit_for_bit(tiny, tmp_path, rng):
    config = tiny.model(tmp_path, rng, torch_dtype="bfloat16").config
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    ours, theirs = RMSNorm(config), LlamaRMSNorm(config.hidden_size, config.rms_norm_eps).bfloat16()
    with torch.no_grad():
        ours.weight.normal_(1, 0.3)
        theirs.weight.copy_(ours.weight)
    x = torch.randn(50, config.hidden_size).bfloat16()
    assert torch.equal(ours(x), theirs(x))


def test_columns_tile_the_merged_weight(tiny, tmp_path, rng):
    config = tiny.model(tmp_path, rng).config
    q, k, v = (config.columns("attn_in")[matrix] for matrix in "qkv")
    assert (q, k, v) == (slice(0, 32), slice(32, 48), slice(48, 64))
    assert config.columns("mlp_in") == {"gate": slice(0, 43), "up": slice(43, 86)}
    assert config.columns("attn_out") == {"o": slice(0, 36)}
    assert [config.in_features(site) for site in ("attn_in", "attn_out", "mlp_in", "mlp_mid")] == [36, 32, 36, 43]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1
