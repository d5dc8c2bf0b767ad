"""Sites of a decoder in numbers, against the widths written out by hand."""

import json
from dataclasses import asdict

import pytest

from sparsetrace.formats.architecture import ModelConfig, sites_of
from sparsetrace.formats.sites import Site, by_leaf, layer_sites, sites_from_json

CONFIG = ModelConfig(
    hidden_size=36,
    intermediate_size=43,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=99,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    sliding_window=None,
    tie_word_embeddings=False,
    dtype="float16",
)


def test_sites_of_a_decoder():
    sites = sites_of(CONFIG)
    assert [site.key for site in sites] == [
        *((layer, name) for layer in (0, 1) for name in ("attn_in", "attn_out", "mlp_in", "mlp_mid")),
        (None, "head_in"),
    ]
    assert sites[4] == Site("attn_in", 1, ("q", "k", "v"), 36, (32, 16, 16))
    assert [(site.in_features, site.width) for site in sites[:4]] == [(36, 64), (32, 36), (36, 86), (43, 36)]
    assert sites[-1] == Site("head_in", None, ("lm_head",), 36, (99,))
    assert layer_sites(sites) == sites[:-1]


def test_a_site_knows_its_columns_and_leaves():
    site = sites_of(CONFIG)[0]
    assert site.columns == {"q": slice(0, 32), "k": slice(32, 48), "v": slice(48, 64)}
    assert [site.outputs(matrix) for matrix in site.matrices] == [32, 16, 16]
    assert site.leaves == [(0, "q"), (0, "k"), (0, "v")]
    with pytest.raises(ValueError, match="not in tuple"):
        site.outputs("gate")


def test_leaves_lead_back_to_their_site_in_the_order_of_execution():
    found = by_leaf(sites_of(CONFIG))
    per_layer = ("q", "k", "v", "o", "gate", "up", "down")
    assert list(found) == [*((layer, matrix) for layer in (0, 1) for matrix in per_layer), (None, "lm_head")]
    assert found[1, "up"].key == (1, "mlp_in")


def test_round_trip_through_json():
    sites = (*sites_of(CONFIG), Site("experts_in", 7, ("gate", "up"), 8, (4, 4), experts=16))
    assert sites_from_json(json.loads(json.dumps([asdict(site) for site in sites]))) == sites
