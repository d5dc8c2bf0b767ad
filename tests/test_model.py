"""The decoder against Hugging Face transformers, on random checkpoints written by `save_pretrained`.

Logits agree within 1e-5 of the largest in float32 (docs/architecture.md, Numbers), at prefill and at each cached
decode step.
"""

import dataclasses
from contextlib import ExitStack
from itertools import pairwise

import numpy as np
import pytest
import torch

from sparsetrace.core.settings import Conversion
from sparsetrace.formats.sites import layer_sites
from sparsetrace.model.convert import convert
from sparsetrace.model.decoder import KVCache, RMSNorm, context_of
from sparsetrace.model.patch import projections

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
    ("qwen3", "Qwen3", {"num_key_value_heads": 4}),
    ("qwen3-gqa-tied", "Qwen3", {"tie_word_embeddings": True, "rope_parameters": THETA}),
    ("qwen3-wide-heads", "Qwen3", {"head_dim": 24, "num_key_value_heads": 1}),
    ("qwen3-window-not-used", "Qwen3", {"sliding_window": 3}),
    ("qwen3-window", "Qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    ("qwen3-window-in-no-layer", "Qwen3", {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 3}),
]
# transformers' module of each matrix within a layer, by site
MODULES = {
    "attn_in": {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
    "attn_out": {"o": "self_attn.o_proj"},
    "mlp_in": {"gate": "mlp.gate_proj", "up": "mlp.up_proj"},
    "mlp_mid": {"down": "mlp.down_proj"},
}


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


@torch.inference_mode()
def test_each_operand_and_product_given_the_same_inputs(pair, device, rng):
    """Matrix by matrix, at prefill and at cached steps: what enters it, and what leaves it.

    Every layer is fed what transformers' own layer is fed, and every product of ours is then replaced by transformers',
    so that nothing but the way from one matrix to the next is compared.
    """
    theirs, ours = pair
    # what entered and what left each of transformers' modules in the last pass
    passed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    operands = {}

    def replacing(key, names):
        def hook(_module, inputs, _output):
            operands[key] = inputs[0]
            return torch.cat([passed[name][1] for name in names], dim=-1)

        return hook

    B, T, steps = 2, 9, 4
    tokens_BT = torch.from_numpy(rng.integers(0, ours.config.vocab_size, (B, T + steps))).to(device)
    cache, past = KVCache(ours.config, B, T + steps, device), None
    with ExitStack() as hooks:
        for name, module in theirs.named_modules():
            hook = module.register_forward_hook(
                lambda _, xs, y, name=name: passed.update({name: (xs[0] if xs else None, y)})
            )
            hooks.callback(hook.remove)
        for layer, site, projection in projections(ours):
            names = [f"model.layers.{layer}.{module}" for module in MODULES[site].values()]
            assert list(MODULES[site]) == list(projection.site.matrices)
            hook = projection.register_forward_hook(replacing((layer, site), names))
            hooks.callback(hook.remove)
        for start, stop in pairwise([0, *range(T, T + steps + 1)]):
            past = theirs(tokens_BT[:, start:stop], past_key_values=past, use_cache=True).past_key_values
            context = context_of(ours.config, torch.arange(start, stop, device=device).expand(B, -1), cache)
            operands.clear()
            for layer, block in enumerate(ours.layers):
                block(passed[f"model.layers.{layer}"][0], context, cache)
            assert operands.keys() == {site.key for site in layer_sites(ours.sites)}
            for layer, site, projection in projections(ours):
                for matrix, columns in projection.columns.items():
                    x_BTK, y_BTN = passed[f"model.layers.{layer}.{MODULES[site][matrix]}"]
                    assert_close(operands[layer, site], x_BTK)
                    assert_close(projection.product(x_BTK)[..., columns], y_BTN)
            assert_close(ours.norm(passed["model.norm"][0]), passed["lm_head"][0])
            assert_close(ours.logits(passed["lm_head"][0]), passed["lm_head"][1])


def test_bfloat16_norm_is_transformers_bit_for_bit(tiny, tmp_path, rng):
    config = tiny.model(tmp_path, rng, torch_dtype="bfloat16").config
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    ours, theirs = RMSNorm(config, config.hidden_size), LlamaRMSNorm(config.hidden_size, config.rms_norm_eps).bfloat16()
    with torch.no_grad():
        ours.weight.normal_(1, 0.3)
        theirs.weight.copy_(ours.weight)
    x = torch.randn(50, config.hidden_size).bfloat16()
    assert torch.equal(ours(x), theirs(x))


def test_matrices_tile_the_merged_weight(tiny, tmp_path, rng):
    model = tiny.model(tmp_path, rng)
    decoder = model.load(torch.device("cpu"))
    x_BTK = torch.randn(1, 3, 36)
    for layer, name, projection in projections(decoder):
        assert projection.site.key == (layer, name)
        merged_KN = torch.cat([projection.matrix(matrix) for matrix in projection.site.matrices], dim=1)
        assert torch.equal(merged_KN, projection.weight)
    block = decoder.layers[1]
    assert block.attn_in.columns == {"q": slice(0, 32), "k": slice(32, 48), "v": slice(48, 64)}
    assert block.mlp_in.columns == {"gate": slice(0, 43), "up": slice(43, 86)}
    assert block.attn_out.columns == {"o": slice(0, 36)}
    assert [site.in_features for site in block.sites] == [36, 32, 36, 43]
    attn_in = block.attn_in
    assert torch.equal(attn_in.product(x_BTK, slice(32, 64)), x_BTK @ attn_in.weight[:, 32:])
    assert torch.equal(attn_in.product(x_BTK), attn_in(x_BTK))
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.config.hidden_size = 1
