"""Kernel tests run on the GPU if there is one, else on the CPU through Triton's interpreter."""

import os
import sys
from pathlib import Path

import torch

# Triton reads this when it is imported, so before the test modules are
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# the importlib import mode leaves a test's own folder off the path
sys.path.insert(0, str(Path(__file__).parent))
