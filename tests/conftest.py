"""What every test shares: the repository on sys.path, and tests that need a GPU skipped without one."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# These tests' tensors are so small that a second thread costs more than it brings.
torch.set_num_threads(1)

# What a shell starts in the background ignores Ctrl-C, and so would the programs that these tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)                            # and what nohup starts, hangups
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def signals_as_they_were():
    """Scripts set signal handlers for the whole process."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture
def vectors_of_thousands(monkeypatch):
    """Worlds have vectors of actions, of three numbers between -4000 and 4000, from here on. What networks are given
    of them is put into the list."""
    from data import CanvasWorld
    from model import Denoiser
    given, clip, init, embed = [], CanvasWorld.clip, CanvasWorld.__init__, Denoiser.embed

    def of_vectors(self, cfg, split):
        init(self, cfg, split)
        self.action_dim = 3

    def observed(self, sigma, actions):
        given.append(actions)
        return embed(self, sigma, actions)
    monkeypatch.setattr(CanvasWorld, "__init__", of_vectors)
    monkeypatch.setattr(CanvasWorld, "clip", lambda self, i: (
        (clip(self, i)[0], np.random.default_rng(i).uniform(-4000, 4000, (self.frames, 3)).astype(np.float32))))
    monkeypatch.setattr(Denoiser, "embed", observed)
    return given
