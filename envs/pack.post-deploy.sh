#!/usr/bin/env bash
# Snakemake runs this in a freshly made conda environment; the working directory is the checkout unless told otherwise.
set -euo pipefail
python -m pip install --no-deps "${SPARSETRACE_CHECKOUT:-.}"
