"""The inputs of a layer against hooks on the whole model, and the model afterwards."""

import numpy as np
import pytest
import torch

from sparsetrace.calibration import windows
from sparsetrace.calibration.layer_inputs import block_inputs, observe_sites
from sparsetrace.calibration.windows import passes
from sparsetrace.model.patch import observe

CPU = torch.device("cpu")


@pytest.fixture
def made(tiny, tmp_path, rng, monkeypatch):
    """A decoder and two passes, of three windows and of one."""
    monkeypatch.setattr(windows, "PASS_TOKENS", 23)
    decoder = tiny.model(tmp_path, rng, num_hidden_layers=3).load(CPU)
    return decoder, list(passes(rng.integers(3, 96, (4, 7)), CPU))


def hooks(decoder):
    return sum(len(module._forward_pre_hooks) for module in decoder.modules())


def test_passes_are_the_windows_in_order(rng, monkeypatch):
    monkeypatch.setattr(windows, "PASS_TOKENS", 23)
    windows_WT = rng.integers(0, 96, (7, 7))
    found = list(passes(windows_WT, CPU))
    assert [tuple(tokens.shape) for tokens, _ in found] == [(3, 7), (3, 7), (1, 7)]
    assert np.array_equal(torch.cat([tokens for tokens, _ in found]).numpy(), windows_WT)
    for tokens, positions in found:
        assert positions.tolist() == [list(range(7))] * len(tokens)


@pytest.mark.parametrize("layer", [0, 1, 2])
@torch.inference_mode()
def test_block_inputs_are_those_of_the_whole_model(made, layer):
    decoder, steps = made
    layers = decoder.layers
    expected, entering = [], {}
    hook = layers[layer].register_forward_pre_hook(lambda _, arguments: expected.append(arguments[0]))
    with observe(decoder, lambda at, site, x: entering.setdefault((at, site), []).append(x)):
        for tokens, positions in steps:
            decoder(tokens, positions)
    hook.remove()
    found = list(block_inputs(decoder, steps, layer))
    assert [torch.equal(arguments[0], x) for arguments, x in zip(found, expected, strict=True)] == [True, True]
    assert decoder.layers is layers
    # run alone on them, the layer's sites read what they read in the model
    seen = {}
    with observe_sites(layers[layer], lambda site, x: seen.setdefault(site, []).append(x)):
        for arguments in found:
            layers[layer](*arguments)
    assert list(seen) == ["attn_in", "attn_out", "mlp_in", "mlp_mid"]
    for site, vectors in seen.items():
        assert all(torch.equal(x, y) for x, y in zip(vectors, entering[layer, site], strict=True))
    assert hooks(decoder) == 0


@torch.inference_mode()
def test_the_model_is_whole_after_an_interruption(made):
    decoder, steps = made
    layers = decoder.layers
    inputs = block_inputs(decoder, steps, 0)
    next(inputs)
    inputs.close()
    assert decoder.layers is layers and hooks(decoder) == 0
    with pytest.raises(ZeroDivisionError), observe_sites(layers[0], lambda site, x: 1 / 0):
        layers[0](*next(block_inputs(decoder, steps, 0)))
    assert decoder.layers is layers and hooks(decoder) == 0
