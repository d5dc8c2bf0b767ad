"""Sparsity methods: each one file, a frozen parameter class and an entry in `METHODS`.

A method, given a site's x, returns which inputs of a matrix are kept. Importing this package loads no torch: the
configuration needs the parameter classes, and it is read on nodes that have no GPU.
"""

from sparsetrace.methods.base import MatrixRule, Method
from sparsetrace.methods.dense import Dense
from sparsetrace.methods.teal import Teal

METHODS: dict[str, type[Method]] = {method.name: method for method in (Dense, Teal)}

__all__ = ["METHODS", "Dense", "MatrixRule", "Method", "Teal"]
