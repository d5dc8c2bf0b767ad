"""Methods that decide by the gate name what a model lacks: `gate` and `up` at one site, and `down` behind it."""

from dataclasses import replace

import pytest

from sparsetrace.core.files import InputError
from sparsetrace.formats.sites import Site
from sparsetrace.methods import Cats, Dense, Griffin, Teal, TopK

ATTENTION = (Site("attn_in", 0, ("q", "k", "v"), 6, (6, 4, 4)), Site("attn_out", 0, ("o",), 6, (6,)))
GATED = Site("mlp_in", 0, ("gate", "up"), 6, (10, 10))
DOWN = Site("mlp_mid", 0, ("down",), 10, (6,))
HEAD = Site("head_in", None, ("lm_head",), 6, (20,))


def layers(*own: tuple[Site, ...]) -> tuple[Site, ...]:
    """Sites of a model whose layers have attention and these."""
    inside = [replace(site, layer=layer) for layer, sites in enumerate(own) for site in (*ATTENTION, *sites)]
    return (*inside, HEAD)


CASES = [
    # id, sites, message
    (
        "no-gate",
        layers((GATED, DOWN), (replace(GATED, matrices=("up",), out_features=(10,)), DOWN)),
        "every layer must have the matrices gate, up and down, got no gate in layer 1, which has q, k, v, o, up, down",
    ),
    (
        "other-names",
        layers((Site("mlp", 0, ("fc1",), 6, (10,)),)),
        "got no gate, up, down in layer 0, which has .* fc1",
    ),
    ("no-down", layers((GATED,)), "got no down in layer 0"),
    (
        "two-sites",
        layers((Site("gate_in", 0, ("gate",), 6, (10,)), Site("up_in", 0, ("up",), 6, (10,)), DOWN)),
        "gate and up must be the two matrices of one site, got gate at gate_in of layer 0",
    ),
    (
        "other-order",
        layers((replace(GATED, matrices=("up", "gate")), DOWN)),
        "must be the two matrices of one site, got up, gate at mlp_in of layer 0",
    ),
    (
        "widths",
        layers((GATED, replace(DOWN, in_features=9))),
        "must have as many outputs as down has inputs, 9, got 10 and 10 in layer 0",
    ),
    (
        "unequal",
        layers((replace(GATED, out_features=(10, 9)), DOWN)),
        "must have as many outputs as down has inputs, 10, got 10 and 9 in layer 0",
    ),
]


@pytest.mark.parametrize(("sites", "message"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
@pytest.mark.parametrize("method", [Cats(sparsity=0.5), Griffin(sparsity=0.5)], ids=lambda method: method.name)
def test_refuses_what_has_no_gate(method, sites, message):
    with pytest.raises(InputError, match=f"^method {method.name}: .*{message}") as error:
        method.refuse_model(None, sites)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", [Cats(sparsity=0.5), Griffin(sparsity=0.5)], ids=lambda method: method.name)
def test_takes_gated_layers(method):
    method.refuse_model(None, layers((GATED, DOWN), (GATED, DOWN)))


@pytest.mark.parametrize("sites", [pytest.param(case[1], id=case[0]) for case in CASES])
def test_other_methods_take_any_structure(sites):
    for method in (Teal(sparsity=0.5), TopK(sparsity=0.5), Dense()):
        method.refuse_model(None, sites)
