"""What `print(ds)` shows of a workload: one screen of text."""

from sparsetrace.workload.stored import StoredWorkload

SHARES = ("target", "calibrated", "achieved")


def summary(stored: StoredWorkload, selection: list[str]) -> str:
    """Name, sizes, and for each matrix its shape and its mean sparsity over the layers.

    Args:
        stored: the whole workload.
        selection: lines about the selection.
    """
    manifest, files = stored.manifest, stored.manifest["files"]
    lines = [
        f"sparsetrace workload {stored.folder.where}",
        f"  model     {manifest['source']}, {stored.layers} layers, {manifest['dtype']}",
        f"  method    {manifest['label']}",
        f"  tokens    {manifest['tokens']:,} captured of {stored.tokens.num_rows:,} fed, "
        f"in {stored.sequences.num_rows:,} sequences",
        f"  rows      {manifest['rows']:,} (layer x matrix x token), {manifest['nnz']:,} nonzeros",
        f"  on disk   {sum(file['bytes'] for file in files) / 1e6:,.1f} MB",
        *selection,
        "",
        f"  {'matrix':8}{'inputs':>8}{'outputs':>9}{'target':>9}{'calibrated':>12}{'achieved':>10}",
    ]
    names = dict.fromkeys(matrix for _, matrix in stored.by_leaf)
    for matrix in names:
        rows = [row for (_, name), row in stored.by_leaf.items() if name == matrix]
        means = (_mean([row[f"{share}_sparsity"] for row in rows]) for share in SHARES)
        target, calibrated, achieved = ("-" if mean is None else f"{mean:.4f}" for mean in means)
        lines.append(
            f"  {matrix:8}{rows[0]['in_features']:>8}{rows[0]['out_features']:>9}"
            f"{target:>9}{calibrated:>12}{achieved:>10}"
        )
    return "\n".join(lines)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
