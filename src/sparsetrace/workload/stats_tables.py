"""The tables of statistics: their schemas, and the sizes over which masks are compared."""

import pyarrow as pa

LAGS = range(1, 17)
SIZES = (2, 4, 8, 16, 32, 64)
BLOCKS = (4, 8, 16, 32, 64, 128, 256)
PATTERNS = ((2, 4), (4, 8), (8, 16))
TILES = (32, 128, 512)
TOP_INPUTS = 32
TOP_SHARES = (0.01, 0.1, 0.2, 0.5)
TOP_COLUMNS = {f"share_of_top_{round(100 * share)}_percent": share for share in TOP_SHARES}


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema({"layer": pa.int16(), "matrix": pa.string(), "masks": pa.string(), **columns})


_COUNT, _SHARE, _NAME = pa.int64(), pa.float64(), pa.string()
# All are written, also those without a row, so that none from an earlier selection is left over.
TABLES = {
    "sparsity": _schema(phase=_NAME, rows=_COUNT, nnz=_COUNT, sparsity=_SHARE),
    "positions": _schema(position=_COUNT, rows=_COUNT, nnz=_COUNT, sparsity=_SHARE),
    "neurons": _schema(input=_COUNT, hits=_COUNT, frequency=_SHARE),
    "concentration": _schema(
        inputs=_COUNT,
        never_kept=_COUNT,
        always_kept=_COUNT,
        gini=_SHARE,
        effective_inputs=_SHARE,
        **dict.fromkeys(TOP_COLUMNS, _SHARE),
    ),
    "overlap": _schema(lag=_COUNT, pairs=_COUNT, jaccard=_SHARE),
    "unions": _schema(over=_NAME, size=_COUNT, unions=_COUNT, density=_SHARE),
    "runs": _schema(kind=_NAME, length=_COUNT, runs=_COUNT),
    "blocks": _schema(block=_COUNT, occupied=_COUNT, blocks=_COUNT, occupancy=_SHARE, kept_in_occupied=_SHARE),
    "structured": _schema(pattern=_NAME, rows=_COUNT, rows_satisfied=_COUNT, groups_satisfied=_SHARE),
    "imbalance": _schema(tile=_COUNT, rows=_COUNT, mean=_SHARE, max=_SHARE),
    "coactivation": _schema(input_a=_COUNT, input_b=_COUNT, both=_COUNT, lift=_SHARE),
    "layers": _schema(next_layer=pa.int16(), pairs=_COUNT, jaccard=_SHARE),
}
