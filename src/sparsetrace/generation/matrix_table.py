"""What the workload's `matrices.parquet` will say of each captured matrix, before anything is counted."""

import json
from typing import Any

from sparsetrace.calibration.thresholds import Thresholds
from sparsetrace.core.settings import Capture
from sparsetrace.formats.sites import Leaf, by_leaf
from sparsetrace.generation.selection import captured_matrices, holders
from sparsetrace.methods import Dense, MatrixRule, operand_parts
from sparsetrace.model.runtime import RuntimeModel


def matrix_table(model: RuntimeModel, thresholds: Thresholds, capture: Capture) -> list[dict[str, Any]]:
    """What the workload's `matrices.parquet` says of each captured matrix before anything is counted.

    For packing, `held_by` names the matrix under whose name the dump holds the operand, and `same_input_as` an earlier
    one whose row of the data set is this one's whatever x is.
    """
    sites = by_leaf(model.sites)
    wanted = captured_matrices(model.sites, capture)
    rules: dict[Leaf, MatrixRule] = {(rule.layer, rule.matrix): rule for rule in thresholds.rules}
    rows = {(row["layer"], row["matrix"]): row for row in thresholds.rows}
    held = holders(wanted, operand_parts(thresholds.method, model.sites, thresholds.rules))
    table = []
    for layer, matrix in wanted:
        site = sites[layer, matrix]
        # a matrix in no layer is captured as it is
        method = Dense() if layer is None else thresholds.method
        row = rows.get((layer, matrix), {})
        same = (
            other
            for other in site.matrices[: site.matrices.index(matrix)]
            if (layer, other) in wanted
            and not {matrix, other} & set(method.out_masks)
            and method.same_mask(rules[layer, other], rules[layer, matrix])
        )
        weight = model.weight(site)
        table.append(
            {
                "layer": layer,
                "matrix": matrix,
                "site": site.name,
                "held_by": held[layer, matrix],
                "same_input_as": next(same, None),
                "in_features": site.in_features,
                "out_features": site.outputs(matrix),
                "dtype": model.config.dtype,
                "method": method.name,
                "parameters": json.dumps(method.model_dump(), sort_keys=True),
                **{
                    name: row.get(name)
                    for name in ("threshold", "threshold_bits", "target_sparsity", "calibrated_sparsity")
                },
                "weight": weight,
                "weight_column": site.columns[matrix].start,
                "weight_columns": site.width,
                "weight_sha256": model.tensors[weight]["sha256"],
                "source_weight": model.source_weight((layer, matrix)),
            }
        )
    return table
