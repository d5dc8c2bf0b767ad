"""The words that every part shares; imports nothing, so that reading a configuration is quick."""

from typing import Final

MATRICES: Final = ("q", "k", "v", "o", "gate", "up", "down")
# A site is where an input is read; the matrices of one site read the same vector.
SITES: Final = {"attn_in": ("q", "k", "v"), "attn_out": ("o",), "mlp_in": ("gate", "up"), "mlp_mid": ("down",)}
SITE_OF: Final = {matrix: site for site, matrices in SITES.items() for matrix in matrices}
# Of each (layer, site): its matrices in order, those that read one operand together.
Parts = dict[tuple[int, str], list[list[str]]]
