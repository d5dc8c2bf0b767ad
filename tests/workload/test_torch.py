"""The torch data sets feed a training loop: every row once, in every number of workers, in the model's own dtype."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from workload_testing import build

import sparsetrace
from sparsetrace.core.files import InputError
from sparsetrace.workload.torch_data import OperandDataset, OperandStream


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("kind", [OperandDataset, OperandStream])
def test_every_row_once(built, workers, kind):
    ds = sparsetrace.open(built.workload)
    data = kind(ds, 1, "down")
    loader = DataLoader(data, batch_size=4, num_workers=workers)
    rows = torch.cat(list(loader))
    assert rows.dtype == getattr(torch, built.dtype)
    found = rows.float().numpy()
    wanted = built.values(1, "down").astype(np.float32)
    if kind is OperandDataset:
        assert len(data) == len(wanted)
        assert np.array_equal(found, wanted)
    else:
        assert sorted(map(tuple, found)) == sorted(map(tuple, wanted))


def test_workers_that_start_anew(half):
    """Spawned workers get the workload by pickle."""
    ds = sparsetrace.open(half.workload).select(sequence=[0, 1]).twin(2)
    loader = DataLoader(OperandDataset(ds, 0, "o"), batch_size=8, num_workers=1, multiprocessing_context="spawn")
    assert np.array_equal(torch.cat(list(loader)).numpy(), ds.matrix(0, "o").dense())


def test_a_training_step_learns(half):
    """A linear autoencoder's loss falls."""
    ds = sparsetrace.open(half.workload)
    torch.manual_seed(0)
    model = torch.nn.Linear(67, 67)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(20):
        for x in DataLoader(OperandDataset(ds, 0, "down"), batch_size=16, shuffle=True):
            x = x.float().clamp(-10, 10)
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


@pytest.mark.parametrize("kind", [OperandDataset, OperandStream])
def test_refusals(half, tmp_path, kind):
    """When it is made, not in a worker."""
    with pytest.raises(InputError, match="layer and matrix must be 0 to 1"):
        kind(sparsetrace.open(half.workload), 9, "down")
    masks = sparsetrace.open(build(tmp_path, "float16", level="masks").workload)
    with pytest.raises(InputError, match="values must have been captured, got capture level `masks`"):
        kind(masks, 1, "down")


def test_more_workers_than_rows(half):
    part = sparsetrace.open(half.workload).select(token=[3, 4])
    loader = DataLoader(OperandStream(part, 1, "down"), batch_size=None, num_workers=3)
    assert np.array_equal(torch.stack(list(loader)).numpy(), part[1, "down", :])
    assert list(DataLoader(OperandStream(part.select(phase="forced"), 1, "down"), num_workers=2)) == []
