"""Checks a workload against its own manifest, format and method; a fault is reported and does not stop the search.

For each file: its hash; that it can be read, page checksums included; its schema; which rows it has;
nnz = popcount of the mask = number of values; absmax and l2; no -0.0, Inf or NaN; the method's rule. For the whole: the
manifest's own hash and keys, unexpected files in `data/`, tokens and sequences, and the counts in `matrices.parquet`.
Only a manifest that lacks a key, has another type there, or names files outside its folder ends the search at once.

Dropped inputs are not stored, so only a part of each method's rule can be checked:

| method | checked |
|---|---|
| `teal` | every kept abs(x) is above the threshold |
| `topk`, `wina` with `select: topk` | no row keeps more than k; one with fewer had zeros among its k largest |
| `wina` with `select: threshold` | nothing: the scores need the norms of the weights, which `--recompute` has |
| `nm` | of each M neighbours at most N |
| `cats`, `griffin` | `out_mask` is there where the method has one; `down` keeps no neuron that it leaves out |
| `griffin` also | k neurons are computed, the same for `gate` and `up` and in every row of a sequence |
| `dense`, `exact_zeros` | there is no threshold and no `out_mask` |
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sparsetrace.core.files import read_json, sha256_json
from sparsetrace.formats.versions import refuse_unknown_format
from sparsetrace.workload.reader import Workload
from sparsetrace.workload.verify_faults import Fault, file_faults
from sparsetrace.workload.verify_leaves import data_faults
from sparsetrace.workload.verify_manifest import link_faults, manifest_faults, method_of
from sparsetrace.workload.verify_outputs import output_faults
from sparsetrace.workload.verify_tables import TABLES, read_tables, table_faults

# The data card, which people edit, to add a licence for example: its hash would say nothing.
CARD = "README.md"


def verify(folder: Path, report: Callable[[int, int], None] | None = None) -> list[Fault]:
    """Find everything wrong with a workload on disk.

    Args:
        folder: of the workload.
        report: called with (data files done, in all).

    Raises:
        InputError: there is no workload, or its version is unknown.
    """
    manifest = read_json(folder / "manifest.json", "verify")
    refuse_unknown_format(manifest, f"verify: {folder}")
    faults = []
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    if manifest.get("sha256") != sha256_json(content):
        faults.append(Fault("manifest.json", "its own sha256 must fit its content: it was edited or damaged"))
    if misshapen := list(manifest_faults(manifest)):
        return faults + misshapen
    if outside := list(link_faults(folder, manifest)):
        return faults + outside
    known = {file["path"] for file in manifest["files"]}
    for path in sorted((folder / "data").rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in known:
            faults.append(Fault(path.relative_to(folder).as_posix(), "must be in the manifest, got a file it lacks"))
    if not (folder / CARD).is_file():
        faults.append(Fault(CARD, "must be there, got nothing"))
    tables = read_tables(folder, manifest, faults)
    for file in manifest["files"]:
        if "matrix" not in file and file["path"] not in TABLES:
            faults += file_faults(folder, file)
    if len(tables) < len(TABLES):
        for file in manifest["files"]:
            faults += file_faults(folder, file) if "matrix" in file else []
        return faults
    faults += table_faults(manifest, tables)
    method = method_of(manifest, faults)
    faults += data_faults(folder, manifest, tables, method, report)
    if not faults and method is not None and method.out_masks:
        # this compares files with each other through the reader, which takes them for sound
        faults += output_faults(Workload(folder), method)
    return faults
