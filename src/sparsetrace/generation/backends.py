"""Which backend runs a model, and making it.

The Triton backend is imported late: the torch backend also runs where Triton is not installed.
"""

from typing import Literal

import torch

from sparsetrace.core.files import InputError
from sparsetrace.formats.architecture import ModelConfig
from sparsetrace.generation.backend import Backend, BackendName, EngineSetup
from sparsetrace.generation.torch_backend import TorchBackend
from sparsetrace.methods import MatrixRule, Method


def choose_backend(
    wanted: Literal["auto", "torch", "triton"],
    device: torch.device,
    config: ModelConfig,
    method: Method,
    rules: list[MatrixRule],
) -> BackendName:
    """The backend that a study means.

    Raises:
        InputError: `triton` is wanted and cannot be had.
    """
    if wanted == "torch":
        return "torch"
    if device.type != "cuda":
        if wanted == "triton":
            raise InputError("machine: engine must be torch or auto without a GPU, got triton")
        return "torch"
    from sparsetrace.generation.fused import unsupported

    reason = unsupported(config, method, rules)
    if reason is not None and wanted == "triton":
        raise InputError(f"machine: engine must be torch or auto here, got triton: {reason}")
    return "torch" if reason is not None else "triton"


def new_backend(setup: EngineSetup, block_rows: int) -> Backend:
    """The backend that a setup names.

    Raises:
        InputError: it cannot run the model under the method.
    """
    if setup.backend == "triton":
        from sparsetrace.generation.triton_backend import TritonBackend

        return TritonBackend(setup, block_rows)
    return TorchBackend(setup, block_rows)
