"""Kernel tests run on the GPU if there is one, else on the CPU through Triton's interpreter."""

import os
import sys
from pathlib import Path

import pytest
import torch

# Triton reads this when it is imported, so before the test modules are
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# the importlib import mode leaves a test's own folder off the path
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device():
    # with its index, as the tensors report it
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Fill new tensors with NaN, or the value of all bits set, so that an unwritten output is noticed."""
    plain_empty, plain_empty_like = torch.empty, torch.empty_like

    def poison(tensor):
        # detached, as torch.compile makes parameters of its own
        tensor.detach().fill_(float("nan") if tensor.is_floating_point() else -1)
        return tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(plain_empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(plain_empty_like(*args, **kwargs)))
