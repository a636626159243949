"""Measures speed on this machine, as ratios within one run.

    python tests/bench.py                   # time of one cached evaluation, by how many frames came before
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import run
from model import Cache, Denoiser, ModelConfig

repeat = 60                     # evaluations per position; the best counts, as other programs only ever add time
seed = 0                        # of the weights and frames


def evaluation_times(positions, repeat):
    """{frames read: best ms of one evaluation}, the positions measured in turn so that all see the same machine."""
    model = Denoiser(ModelConfig()).eval().requires_grad_(False)
    x, sigma, caches = torch.randn(1, 1, *model.cfg.frame_shape), torch.ones(1, 1), {n: Cache() for n in positions}
    for n, cache in caches.items():
        while cache.position < n:
            model.step(x, sigma, cache, commit=True)
    best = dict.fromkeys(positions, float("inf"))
    for _ in range(repeat):
        for n, cache in caches.items():
            began = time.perf_counter()
            model.step(x, sigma, cache)
            best[n] = min(best[n], 1e3 * (time.perf_counter() - began))
    return best


def main(cfg):
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(1)
    window = ModelConfig().window
    for n, ms in evaluation_times((1, window, 4 * window, 16 * window, 1000), cfg.repeat).items():
        print(f"{n:5d} frames read: {ms:6.2f} ms per evaluation of one 32 x 32 frame")


if __name__ == "__main__":
    run(main, globals())
