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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsetrace.calibration.calibrate import PASS_TOKENS, calibration_windows
from sparsetrace.core.files import InputError, read_json, sha256_json, write_folder_beside, write_json
from sparsetrace.core.settings import Calibration, Machine
from sparsetrace.formats.tables import WEIGHT_MASKS
from sparsetrace.methods import WeightMethod
from sparsetrace.model.decoder import Block, Decoder
from sparsetrace.model.runtime import RuntimeModel, open_model, set_up_torch
from sparsetrace_kernels.torch_ops import pack_bits

MASK_FILE = "weight_masks.parquet"


def prune(
    model: RuntimeModel,
    text: Path | None,
    out: Path,
    method: WeightMethod,
    calibration: Calibration,
    machine: Machine,
    report: Callable[[int, int], None] | None = None,
) -> RuntimeModel:
    """Mask the weights of a model.

    Args:
        model: converted.
        text: calibration text; needed where the method reads activations.
        out: folder of the pruned runtime model; written beside and renamed.
        method: decides the masks.
        calibration: how much of the text.
        machine: where the model runs.
        report: called with (layers done, layers in all).

    Raises:
        InputError: the method needs a text and gets none, or does not fit the model's widths.
    """
    method.refuse_model(model.sites)
    if method.needs_norms and text is None:
        raise InputError(f"prune: --text must be given for method {method.name}, which reads activations, got none")
    if out.exists() and not (out / MASK_FILE).is_file() and any(out.iterdir()):
        raise InputError(f"prune: {out} must be a pruned model or not exist, got another folder: choose another --out")
    device = set_up_torch(machine)
    decoder = model.load(device)
    inputs: list[tuple[Any, ...]] = []
    if method.needs_norms:
        assert text is not None
        windows_WT = calibration_windows(model.tokenizer(), text, calibration, model.config.max_position_embeddings)
        inputs = list(_first_inputs(decoder, torch.from_numpy(windows_WT)))
    identity = {"method": method.name, "parameters": method.model_dump(mode="json"), "dense_model": model.model_hash}
    with write_folder_beside(out) as partial:
        schema = WEIGHT_MASKS.with_metadata({"sparsetrace": json.dumps(identity)})
        with pq.ParquetWriter(partial / MASK_FILE, schema, compression="zstd", use_dictionary=["matrix"]) as writer:
            for layer, block in enumerate(decoder.layers):
                assert isinstance(block, Block)
                with torch.inference_mode():
                    for matrix, keep_KN in _prune_block(block, method, inputs):
                        writer.write_table(_mask_table(layer, matrix, keep_KN, schema))
                    inputs = [(block(*arguments), *arguments[1:]) for arguments in inputs]
                if report is not None:
                    report(layer + 1, len(decoder.layers))
        _write_model(partial, model, decoder, identity)
    return open_model(out)


def _prune_block(block: Block, method: WeightMethod, inputs: list[tuple[Any, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Mask the weights of one layer, whose inputs are given, and yield each matrix's mask."""
    names = [site.name for site in block.sites]
    norms = {name: _norms(block, name, inputs) for name in names} if method.needs_norms else dict.fromkeys(names)
    for name in names:
        projection = getattr(block, name)
        for matrix in projection.columns:
            weight_KN = projection.matrix(matrix)
            keep_KN = method.keep(weight_KN, norms[name])
            weight_KN.masked_fill_(~keep_KN, 0)
            yield matrix, keep_KN


def _norms(block: Block, site: str, inputs: list[tuple[Any, ...]]) -> Tensor:
    """float64 [K]: Euclidean norm of each input of a site, over all positions."""
    projection = getattr(block, site)
    squares_K = torch.zeros(projection.weight.shape[0], dtype=torch.float64, device=projection.weight.device)

    def see(_: object, seen: tuple[Tensor, ...]) -> None:
        squares_K.add_(seen[0].double().square().flatten(0, -2).sum(0))

    hook = projection.register_forward_pre_hook(see)
    for arguments in inputs:
        block(*arguments)
    hook.remove()
    return squares_K.sqrt()


@torch.inference_mode()
def _first_inputs(decoder: Decoder, windows_WT: Tensor) -> Iterator[tuple[Any, ...]]:
    """Arguments of the first block's forward, for each batch of windows."""
    layers = decoder.layers
    decoder.layers = layers[:1]
    seen: list[tuple[Any, ...]] = []
    hook = layers[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    device = decoder.embedding.device
    for tokens_BT in windows_WT.split(max(1, PASS_TOKENS // windows_WT.shape[1])):
        decoder(tokens_BT.to(device), torch.arange(tokens_BT.shape[1], device=device).expand_as(tokens_BT))
        yield seen.pop()
    hook.remove()
    decoder.layers = layers


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
    """The pruned model's files, in those of the dense one."""
    state = decoder.state_dict()
    tensors = {name: dict(entry) for name, entry in model.tensors.items()}
    for file in sorted({entry["file"] for entry in tensors.values()}):
        loaded = load_file(model.folder / file)
        for name in loaded:
            if name.startswith("layers."):
                loaded[name] = state[name].cpu().contiguous()
                digest = hashlib.sha256(loaded[name].flatten().view(torch.uint8).numpy().data)
                tensors[name]["sha256"] = digest.hexdigest()
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
