"""How a target sparsity is spread over the matrices of a model.

| allocation | target of a matrix |
|---|---|
| `uniform` | the setting's |
| `per_layer` | given in config |
| `greedy` | looked up in the search table of its layer, which `sparsetrace.calibration.greedy` makes |
| `file` | a threshold of the user's own, or one that `sparsetrace import-teal` wrote |
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from sparsetrace.calibration.histogram import Provenance
from sparsetrace.calibration.search_table import SearchTable, read_search_table
from sparsetrace.calibration.target import Target
from sparsetrace.calibration.threshold_file import read_threshold_file
from sparsetrace.core.files import InputError
from sparsetrace.formats.sites import layer_leaves
from sparsetrace.methods import FromFile, Method, PerLayer, ThresholdMethod, allocation_of


def allocate_targets(
    method: Method, provenance: Provenance, tables: Sequence[Path]
) -> tuple[dict[tuple[int, str], Target], tuple[str, ...]]:
    """The target of each layer and matrix, in the order of execution.

    Args:
        method: with the target of the setting, and the allocation where it has one.
        provenance: of the histograms that thresholds will be looked up in.
        tables: search tables, one per layer; read where the allocation is greedy.

    Returns:
        The targets, and what a person should know of them, a sentence each.

    Raises:
        InputError: the allocation does not fit the model.
    """
    allocation = allocation_of(method)
    if isinstance(allocation, FromFile):
        return read_threshold_file(Path(allocation.file), provenance.sites), ()
    if allocation == "greedy":
        assert isinstance(method, ThresholdMethod)
        return _greedy_targets(method, provenance, tables)
    if isinstance(allocation, PerLayer):
        allocation.refuse_model(provenance.sites)
    return {leaf: Target(method.target(*leaf)) for leaf in layer_leaves(provenance.sites)}, ()


def _greedy_targets(
    method: ThresholdMethod, provenance: Provenance, paths: Sequence[Path]
) -> tuple[dict[tuple[int, str], Target], tuple[str, ...]]:
    assert method.sparsity is not None
    tables = _tables_by_layer(paths, method, provenance)
    found = {
        layer: table.lookup(method.sparsity, f"thresholds: layer {layer}") for layer, table in sorted(tables.items())
    }
    targets = {(layer, matrix): Target(found[layer][0][matrix]) for layer, matrix in layer_leaves(provenance.sites)}
    worse = {layer: steps for layer, table in sorted(tables.items()) if (steps := table.worse_than_uniform())}
    rows = sum(len(table.error) for table in tables.values())
    notes = [
        f"greedy loses to uniform in {sum(map(len, worse.values()))} of {rows} rows"
        + (f", layers {_listed(worse)}" if worse else "")
    ]
    if uniform := [layer for layer, (_, is_uniform) in found.items() if is_uniform]:
        notes.append(f"looked up as uniform: layers {_listed(uniform)}")
    return targets, tuple(notes)


def _tables_by_layer(paths: Sequence[Path], method: Method, provenance: Provenance) -> dict[int, SearchTable]:
    """The search table of every layer.

    Raises:
        InputError: a layer has no table, or a table is of another model or method.
    """
    tables: dict[int, SearchTable] = {}
    for path in paths:
        identity, table = read_search_table(path)
        wanted = {"model_hash": provenance.model_hash, "method": method.name}
        if other := [name for name, value in wanted.items() if identity[name] != value]:
            raise InputError(f"thresholds: {path} must be of this model and method, got another {', '.join(other)}")
        tables[identity["layer"]] = table
    if missing := [layer for layer in range(provenance.layers) if layer not in tables]:
        raise InputError(
            f"thresholds: greedy must have a table for every layer, got none for {_listed(missing)}: "
            "run `sparsetrace allocate`"
        )
    return tables


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))
