"""Sites: the places in a model where a vector is read, and the matrices that read it.

A model's sites are a tuple of `Site`, in the order of execution. `convert` derives it from the model's family and the
runtime folder records it; every later step iterates over it and knows no matrix by name.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# A layer and the name of a matrix. The layer is None where the matrix belongs to the model as a whole (`lm_head`).
Leaf = tuple[int | None, str]
# A layer and the name of a site.
SiteKey = tuple[int | None, str]
# For each site, its matrices in order, grouped: those of one group read the same operand.
Parts = dict[SiteKey, list[list[str]]]


@dataclass(frozen=True, slots=True)
class Site:
    """One vector per token, read by one matrix or by several side by side.

    Args:
        name: unique within the layer.
        layer: layer number; None where the site belongs to the model as a whole.
        matrices: names of the matrices that read the vector, in the order of their columns in the merged weight.
        in_features: length of the vector.
        out_features: outputs of each matrix.
        experts: number of experts that the tokens are routed to, each of which sees some tokens only; 0 where every
            token passes the site.
    """

    name: str
    layer: int | None
    matrices: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    experts: int = 0

    @property
    def key(self) -> SiteKey:
        """Layer and name."""
        return self.layer, self.name

    @property
    def leaves(self) -> list[Leaf]:
        """Layer and name of each matrix."""
        return [(self.layer, matrix) for matrix in self.matrices]

    @property
    def width(self) -> int:
        """Columns of the merged weight: outputs of all matrices."""
        return sum(self.out_features)

    def outputs(self, matrix: str) -> int:
        """Outputs of one matrix."""
        return self.out_features[self.matrices.index(matrix)]

    @property
    def columns(self) -> dict[str, slice]:
        """Columns of each matrix in the merged weight."""
        stop, columns = 0, {}
        for matrix, outputs in zip(self.matrices, self.out_features, strict=True):
            start, stop = stop, stop + outputs
            columns[matrix] = slice(start, stop)
        return columns


def layer_sites(sites: Iterable[Site]) -> tuple[Site, ...]:
    """The sites within layers. Methods decide about these; any other is captured as it is."""
    return tuple(site for site in sites if site.layer is not None)


def by_leaf(sites: Iterable[Site]) -> dict[Leaf, Site]:
    """The site of each layer and matrix, in the order of execution."""
    return {leaf: site for site in sites for leaf in site.leaves}


def layer_leaves(sites: Iterable[Site]) -> list[tuple[int, str]]:
    """Layer and name of every matrix that methods decide about, in the order of execution."""
    return [(layer, matrix) for layer, matrix in by_leaf(layer_sites(sites)) if layer is not None]


def sites_from_json(entries: list[dict[str, Any]]) -> tuple[Site, ...]:
    """The inverse of `dataclasses.asdict` on each site, after a round trip through JSON."""
    return tuple(
        Site(**entry | {"matrices": tuple(entry["matrices"]), "out_features": tuple(entry["out_features"])})
        for entry in entries
    )
