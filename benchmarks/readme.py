"""Put what `make run` made into README.md, between the `show` markers; the numbers there come from nowhere else.

make run && .venv/bin/python benchmarks/readme.py
"""

import re
from pathlib import Path

import sparsetrace

ROOT = Path(__file__).parents[1]
LABELS = ("teal-0.25", "teal-0.5", "teal-0.65")


def table() -> str:
    """One row per data set of the default study."""
    lines = [
        "| data set | target | calibrated | achieved | tokens | rows (layer x matrix x token) | nonzeros | on disk |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label in LABELS:
        ds = sparsetrace.open(ROOT / "results" / "demo" / "default" / label / "workload")
        inputs, shares = ds.matrix_table["in_features"].to_numpy(), []
        for kind in ("target", "calibrated", "achieved"):
            share = ds.matrix_table[f"{kind}_sparsity"].to_numpy()
            shares.append(f"{100 * (share * inputs).sum() / inputs.sum():.2f} %")
        size = sum(file["bytes"] for file in ds.manifest["files"])
        lines.append(
            f"| `{label}` | {' | '.join(shares)} | {ds.manifest['tokens']:,} | {ds.manifest['rows']:,} "
            f"| {ds.manifest['nnz']:,} | {size / 1e6:.1f} MB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = re.sub(
        "(<!-- show:begin -->\n).*?(<!-- show:end -->)",
        lambda match: f"{match[1]}{table()}\n{match[2]}",
        readme.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    readme.write_text(text, encoding="utf-8")
