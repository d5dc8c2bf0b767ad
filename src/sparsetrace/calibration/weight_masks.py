"""Weight-side methods: a runtime model becomes one whose masked weights are zero, and a table of the masks.

The pruned model is a runtime model like any other, with its own hash; beside it lies `weight_masks.parquet`, which
`sparsetrace index` puts into each workload made with it. Values stay in the checkpoint.

| column | what |
|---|---|
| `layer`, `matrix`, `input` | the row of the runtime weight [in, out]; the checkpoint stores its transpose, [out, in] |
| `nnz` | weights kept |
| `mask` | binary(ceil(N / 8)): kept outputs, lowest bit first; one row group per layer and matrix |
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsetrace.calibration.layer_inputs import BlockInputs, block_inputs, observe_sites
from sparsetrace.calibration.windows import calibration_windows, passes
from sparsetrace.core.checksum import Checksum
from sparsetrace.core.files import InputError, read_json, sha256_json, write_folder_beside, write_json
from sparsetrace.core.settings import Calibration, Machine
from sparsetrace.formats.tables import WEIGHT_MASKS
from sparsetrace.methods import WeightMethod
from sparsetrace.model.decoder import Block, Decoder
from sparsetrace.model.runtime import RuntimeModel, open_model, set_up_torch
from sparsetrace_kernels.torch_ops import pack_bits

# Shape suffixes: K input features, N output features, M bytes of a mask of N bits.

MASK_FILE = "weight_masks.parquet"
MASK_SETTINGS: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["matrix"], "write_page_checksum": True}


@dataclass(frozen=True, slots=True)
class PruneJob:
    """A model to be pruned.

    Args:
        model: converted.
        text: calibration text, needed where the method reads activations; None where there is none.
        out: folder of the pruned runtime model; written beside and renamed.
        method: decides the masks.
        calibration: how much of the text.
        machine: where the model runs.
    """

    model: RuntimeModel
    text: Path | None
    out: Path
    method: WeightMethod
    calibration: Calibration
    machine: Machine


def prune(job: PruneJob, report: Callable[[int, int], None] | None = None) -> RuntimeModel:
    """Mask the weights of a model.

    Args:
        job: which model, and how.
        report: called with (layers done, layers in all).

    Raises:
        InputError: the method needs a text and there is none, or it does not fit the model's widths.
    """
    model, method, out = job.model, job.method, job.out
    method.refuse_model(model.sites)
    if method.needs_norms and job.text is None:
        raise InputError(f"prune: --text must be given for method {method.name}, which reads activations, got none")
    if out.exists() and not (out / MASK_FILE).is_file() and any(out.iterdir()):
        raise InputError(f"prune: {out} must be a pruned model or not exist, got another folder: choose another --out")
    device = set_up_torch(job.machine)
    decoder = model.load(device)
    identity = {"method": method.name, "parameters": method.model_dump(mode="json"), "dense_model": model.model_hash}
    schema = WEIGHT_MASKS.with_metadata({"sparsetrace": json.dumps(identity)})
    with torch.inference_mode():
        inputs = _first_inputs(job, decoder, device)
        with write_folder_beside(out) as partial:
            with pq.ParquetWriter(partial / MASK_FILE, schema, **MASK_SETTINGS) as writer:
                for layer, block in enumerate(decoder.layers):
                    assert isinstance(block, Block)
                    for matrix, keep_KN in _prune_block(block, method, inputs):
                        writer.write_table(_mask_table(layer, matrix, keep_KN, schema))
                    # the next layer reads what the pruned one puts out
                    inputs = [(block(*arguments), *arguments[1:]) for arguments in inputs]
                    if report is not None:
                        report(layer + 1, len(decoder.layers))
            _write_model(partial, model, decoder, identity)
    return open_model(out)


def _first_inputs(job: PruneJob, decoder: Decoder, device: torch.device) -> list[BlockInputs]:
    """Inputs of the first layer in each pass; none where the method reads no activations."""
    if not job.method.needs_norms:
        return []
    assert job.text is not None
    context = job.model.config.max_position_embeddings
    windows_WT = calibration_windows(job.model.tokenizer(), job.text, job.calibration, context)
    return list(block_inputs(decoder, passes(windows_WT, device), 0))


def _prune_block(block: Block, method: WeightMethod, inputs: Sequence[BlockInputs]) -> Iterator[tuple[str, Tensor]]:
    """Mask the weights of one layer, whose inputs are given, and yield each matrix's mask."""
    norms = _norms(block, inputs) if method.needs_norms else {}
    for site in block.sites:
        projection = getattr(block, site.name)
        for matrix in site.matrices:
            weight_KN = projection.matrix(matrix)
            keep_KN = method.keep(weight_KN, norms.get(site.name))
            weight_KN.masked_fill_(~keep_KN, 0)
            yield matrix, keep_KN


def _norms(block: Block, inputs: Sequence[BlockInputs]) -> Mapping[str, Tensor]:
    """float64 [K] by site: Euclidean norm of each input over all positions."""
    squares: dict[str, Tensor] = {}

    def see(site: str, x_BTK: Tensor) -> None:
        squares_K = x_BTK.double().square().flatten(0, -2).sum(0)
        squares[site] = squares[site] + squares_K if site in squares else squares_K

    with observe_sites(block, see):
        for arguments in inputs:
            block(*arguments)
    return {site: squares_K.sqrt() for site, squares_K in squares.items()}


def _mask_table(layer: int, matrix: str, keep_KN: Tensor, schema: pa.Schema) -> pa.Table:
    K = keep_KN.shape[0]
    mask_KM = pack_bits(keep_KN).cpu().numpy()
    columns = {
        "layer": pa.array(np.full(K, layer), pa.int16()),
        "matrix": pa.array([matrix] * K),
        "input": pa.array(np.arange(K), pa.int32()),
        "nnz": pa.array(keep_KN.sum(1).cpu().numpy(), pa.int32()),
        "mask": pa.array([row.tobytes() for row in mask_KM], pa.binary()),
    }
    return pa.table(columns, schema=schema)


def _write_model(folder: Path, model: RuntimeModel, decoder: Decoder, identity: dict[str, Any]) -> None:
    """Write the files of the pruned model, cut into the same files as the dense one's."""
    state = decoder.state_dict()
    tensors = {name: dict(entry) for name, entry in model.tensors.items()}
    for file in sorted({entry["file"] for entry in tensors.values()}):
        loaded = load_file(model.folder / file)
        for name in loaded:
            if name.startswith("layers."):
                loaded[name] = state[name].cpu().contiguous()
                data = loaded[name].flatten().view(torch.uint8).numpy().data
                tensors[name] |= {"sha256": hashlib.sha256(data).hexdigest(), "xxh3": str(Checksum(data))}
        save_file(loaded, folder / file, metadata={"format": "sparsetrace-model"})
    for path in model.folder.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", MASK_FILE):
            shutil.copyfile(path, folder / path.name)
    content = read_json(model.folder / "config.json", "prune")
    hashes = {name: entry["sha256"] for name, entry in tensors.items()}
    same = tensors == model.tensors
    content |= {
        "model_hash": model.model_hash if same else sha256_json([model.model_hash, hashes]),
        "tensors": tensors,
        "pruned": identity,
    }
    write_json(folder / "config.json", content)
