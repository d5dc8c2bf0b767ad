"""Workloads packed from small dumps of known operands; see `workload_testing`."""

import sys
from pathlib import Path

import pytest

# the import mode `importlib` does not add a test's own folder to the path
sys.path.insert(0, str(Path(__file__).parent))

from workload_testing import build


@pytest.fixture(scope="session", params=["float16", "bfloat16", "float32"])
def built(request, tmp_path_factory):
    """A workload of each number format in two shards, with the dense operands that it was made from."""
    return build(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def half(tmp_path_factory):
    """A float16 workload, for tests that do not depend on the number format."""
    return build(tmp_path_factory.mktemp("half"), "float16")
