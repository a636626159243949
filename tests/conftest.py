"""What every test shares: the repository on sys.path, and tests that need a GPU skipped without one."""

import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# These tests' tensors are so small that a second thread costs more than it brings.
torch.set_num_threads(1)

# What a shell starts in the background ignores Ctrl-C, and so would the programs that these tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
