"""What methods that decide by the gate require of every layer: `gate` and `up` at one site, and `down` behind it."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from sparsetrace.core.files import InputError
from sparsetrace.formats.sites import layer_sites

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sparsetrace.formats.sites import Site


def refuse_without_gate(method: str, sites: Iterable[Site]) -> None:
    """Refuse a model with a layer whose feed-forward network is not down(activation(gate(x)) * up(x)).

    Args:
        method: name of the method, for the message.
        sites: of the model.

    Raises:
        InputError: names the layer and the matrices.
    """
    for layer, own in groupby(layer_sites(sites), key=lambda site: site.layer):
        site_of = {matrix: site for site in own for matrix in site.matrices}
        if missing := [matrix for matrix in ("gate", "up", "down") if matrix not in site_of]:
            raise InputError(
                f"method {method}: every layer must have the matrices gate, up and down, got no "
                f"{', '.join(missing)} in layer {layer}, which has {', '.join(site_of)}"
            )
        gated, down = site_of["gate"], site_of["down"]
        if gated.matrices != ("gate", "up"):
            raise InputError(
                f"method {method}: gate and up must be the two matrices of one site, got {', '.join(gated.matrices)} "
                f"at {gated.name} of layer {layer}"
            )
        if set(gated.out_features) != {down.in_features}:
            raise InputError(
                f"method {method}: gate and up must have as many outputs as down has inputs, {down.in_features}, got "
                f"{gated.out_features[0]} and {gated.out_features[1]} in layer {layer}"
            )
