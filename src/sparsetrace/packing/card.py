"""README.md of a workload: its data card, with the front matter that data hubs read."""

import json
from itertools import pairwise
from typing import Any

import pyarrow as pa


def data_card(manifest: dict[str, Any], matrices: pa.Table) -> str:
    """Text of the data card.

    Args:
        manifest: of the workload.
        matrices: its table of matrices.
    """
    decoding, batching = manifest["decoding"], manifest["batching"]
    rows = {
        "model": f"{manifest['source']} ({manifest['dtype']}, hash `{manifest['model_hash'][:12]}`)",
        "method": f"{manifest['label']} {manifest['parameters'] or ''}".strip(),
        "tokens captured": f"{manifest['tokens']:,}",
        "rows (layer x matrix x token)": f"{manifest['rows']:,}",
        "nonzeros": f"{manifest['nnz']:,}",
        "decoding": ", ".join(f"{key} {value}" for key, value in decoding.items()),
        **({"tokens given": f"hash `{manifest['given'][:12]}`"} if manifest.get("given") else {}),
        "batching": ", ".join(f"{key} {value}" for key, value in batching.items()),
        "captured": ", ".join(f"{key} {value}" for key, value in manifest["capture"].items() if value),
        "written": f"encoding {manifest['encoding']}, shared inputs {'once' if manifest['share_inputs'] else 'each'}",
        "made with": f"sparsetrace {manifest['versions']['sparsetrace']} on {manifest['device']}",
    }
    by_matrix = matrices.group_by("matrix").aggregate(
        [("target_sparsity", "mean"), ("calibrated_sparsity", "mean"), ("achieved_sparsity", "mean")]
    )
    means = {row["matrix"]: row for row in by_matrix.to_pylist()}

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    lines = [
        "---",
        # as JSON, which is valid YAML: a name may hold characters that YAML gives a meaning, such as a colon
        f"pretty_name: {json.dumps(manifest['source'] + ' ' + manifest['label'], ensure_ascii=False)}",
        "license: other",
        "license_name: that-of-the-model-and-the-prompts",
        f"size_categories: [{_size_category(manifest['rows'])}]",
        "task_categories: [other]",
        "tags: [sparsetrace, activation-sparsity, sparse-workload, parquet]",
        "configs:",
        "- config_name: data",
        "  data_files: data/*/*/*.parquet",
        "  default: true",
        *(
            line
            for table in ("tokens", "sequences", "matrices")
            for line in (f"- config_name: {table}", f"  data_files: {table}.parquet")
        ),
        "---",
        "",
        f"# Sparse workload: {manifest['source']}, {manifest['label']}",
        "",
        "The exact operand of every matrix multiply, for every layer, matrix and captured token, after activation",
        f"sparsification. Format: sparsetrace workload version {manifest['version']}. Read it with",
        "`sparsetrace.open(path)`, or as plain Parquet (`views.sql` for DuckDB).",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "Sparsity, averaged over the layers: the target, what that drops of the calibration text, and what was counted",
        "in this data set.",
        "",
        "| matrix | target | calibrated | achieved |",
        "|---|---|---|---|",
        *(
            f"| {m} | {share(means[m]['target_sparsity_mean'])} | {share(means[m]['calibrated_sparsity_mean'])} "
            f"| {share(means[m]['achieved_sparsity_mean'])} |"
            for m in dict.fromkeys(matrices["matrix"].to_pylist())
        ),
        "",
    ]
    return "\n".join(lines)


def _size_category(rows: int) -> str:
    """The size category of the Hugging Face hub that a number of rows falls into."""
    bounds = [(10**3, "1K"), (10**4, "10K"), (10**5, "100K"), (10**6, "1M"), (10**7, "10M"), (10**8, "100M")]
    bounds += [(10**9, "1B"), (10**10, "10B"), (10**11, "100B"), (10**12, "1T")]
    if rows < bounds[0][0]:
        return "n<1K"
    for (_, low), (high, name) in pairwise(bounds):
        if rows < high:
            return f"{low}<n<{name}"
    return "n>1T"
