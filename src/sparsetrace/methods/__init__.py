"""Sparsity methods: one file each, with a frozen parameter class that `METHODS` lists.

A method decides from the vector at a site which inputs of a matrix are kept, and optionally which outputs are not
computed. Importing this package loads no torch: the configuration needs the parameter classes, and it is read on nodes
that have no GPU. docs/methods.md shows how to add one.
"""

from sparsetrace.methods.base import MatrixRule, Method, operand_parts
from sparsetrace.methods.cats import Cats
from sparsetrace.methods.dense import Dense
from sparsetrace.methods.exact_zeros import ExactZeros
from sparsetrace.methods.griffin import Griffin
from sparsetrace.methods.magnitude import Magnitude
from sparsetrace.methods.nm import NM
from sparsetrace.methods.teal import Teal
from sparsetrace.methods.threshold_base import FromFile, PerLayer, ThresholdMethod, allocation_of
from sparsetrace.methods.topk import TopK
from sparsetrace.methods.wanda import Wanda
from sparsetrace.methods.weight_base import WeightMethod
from sparsetrace.methods.wina import Wina

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Dense, Teal, TopK, Cats, Wina, NM, Griffin, ExactZeros)
}
# Methods that mask weights, once per model; each can be combined with any of the above.
WEIGHT_METHODS: dict[str, type[WeightMethod]] = {method.name: method for method in (Magnitude, Wanda)}

__all__ = [
    "METHODS",
    "NM",
    "WEIGHT_METHODS",
    "Cats",
    "Dense",
    "ExactZeros",
    "FromFile",
    "Griffin",
    "Magnitude",
    "MatrixRule",
    "Method",
    "PerLayer",
    "Teal",
    "ThresholdMethod",
    "TopK",
    "Wanda",
    "WeightMethod",
    "Wina",
    "allocation_of",
    "operand_parts",
]
