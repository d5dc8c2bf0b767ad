"""Put what a study made into README.md, between its markers; the numbers there come from nowhere else.

make run && .venv/bin/python benchmarks/readme.py demo results
snakemake --cores 2 --configfile docs/tinystories.yaml
.venv/bin/python benchmarks/readme.py tinystories results-tinystories
"""

import argparse
import re
from pathlib import Path

import sparsetrace

README = Path(__file__).parents[1] / "README.md"


def table(results: Path) -> str:
    """One row per data set below a study's results."""
    lines = [
        "| data set | target | calibrated | achieved | tokens | rows (layer x matrix x token) | nonzeros | on disk |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for manifest in sorted(results.glob("*/*/*/workload/manifest.json")):
        ds = sparsetrace.open(manifest.parent)
        label = "/".join(manifest.parts[-4:-2])
        inputs, shares = ds.matrix_table["in_features"].to_numpy(), []
        for kind in ("target", "calibrated", "achieved"):
            share = ds.matrix_table[f"{kind}_sparsity"].to_numpy(zero_copy_only=False)
            mean = 100 * (share * inputs).sum() / inputs.sum()
            shares.append("-" if mean != mean else f"{mean:.2f} %")
        size = sum(file["bytes"] for file in ds.manifest["files"])
        lines.append(
            f"| `{label}` | {' | '.join(shares)} | {ds.manifest['tokens']:,} | {ds.manifest['rows']:,} "
            f"| {ds.manifest['nnz']:,} | {size / 1e6:.1f} MB |"
        )
    return "\n".join(lines)


def put(page: Path, marker: str, rows: str) -> None:
    """Put a table between a page's `<!-- MARKER:begin -->` and `<!-- MARKER:end -->`."""
    pattern = f"(<!-- {marker}:begin -->\n).*?(<!-- {marker}:end -->)"
    text, count = re.subn(
        pattern, lambda match: f"{match[1]}{rows}\n{match[2]}", page.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"error: {page.name} must have the markers of {marker} once, got {count}")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("marker", help="name in README.md's `<!-- NAME:begin -->`")
    parser.add_argument("results", type=Path, help="the study's results folder")
    arguments = parser.parse_args()
    put(README, arguments.marker, table(arguments.results))
