"""Training: the loss, what surrounds the optimizer, evaluation, and runs that stop, go on, split up and go wrong."""

import itertools
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._inductor.exc import InductorError

import sample
import train
from config import UserError, read_settings
from data import Batches, find_images, load_batch, measure, open_source, to_network
from model import Denoiser, ModelConfig
from sample import ema_exponent

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")

TINY = {
    "frame_size": 16, "digit_size": 8, "patch_size": 4, "channels": 16, "channel_mults": (1,), "head_dim": 16,
    "video_attn_resolutions": (4,), "frames": 5, "window": 3, "batch_size": 4, "max_steps": 6, "warmup_steps": 2,
    "log_interval": 1, "eval_interval": 0, "checkpoint_interval": 100, "eval_clips": 4, "eval_context": 2,
    "picture_steps": 2, "device": "cpu",
}


# ------------------------------------------------------------------------------------------------
# Helpers


def write_digits(folder, n=40, seed=0):
    """An MNIST images file of n blobs, so that nothing is downloaded and nothing drawn with a font."""
    y, x = np.mgrid[:28, :28]
    rng = np.random.default_rng(seed)
    centres, sizes = rng.uniform(8, 20, (n, 2)), rng.uniform(3, 6, n)
    blobs = [np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * s**2)) for (cy, cx), s in zip(centres, sizes)]
    folder.mkdir(parents=True, exist_ok=True)
    pixels = (255 * np.array(blobs)).astype(np.uint8).tobytes()
    (folder / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + pixels)
    return folder


def flags(settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def strict_json(text):
    """NaN and Infinity, which Python writes and reads, are not JSON."""

    def refuse(word):
        raise ValueError(f"{word} is not JSON: {text}")

    return json.loads(text, parse_constant=refuse)


def read_log(folder):
    return [strict_json(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def leaves(value, path=()):
    """(path, leaf) of every leaf of nested dicts and lists, as a dict."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, part in items for name, leaf in leaves(part, (*path, key)).items()}
    return {path: value}


def assert_same(one, other):
    """Bit for bit, whatever is nested in them; what differs is named."""
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys()
    assert any(isinstance(leaf, torch.Tensor) for leaf in one.values())
    different = [path for path, leaf in one.items()
                 if not (torch.equal(leaf, other[path]) if isinstance(leaf, torch.Tensor) else leaf == other[path])]
    assert different == []


def assert_same_run(folder, other):
    """Two runs in different folders left the same checkpoint, the same snapshots and the same log."""

    def without_folder(state):
        return {**state, "settings": {**state["settings"], "out_dir": None}}

    assert_same(without_folder(load(folder)), without_folder(load(other)))
    snapshots = [sorted(path.name for path in run.glob("ema-*.pt")) for run in (folder, other)]
    assert snapshots[0] == snapshots[1] != []
    for name in snapshots[0]:
        assert_same(*(torch.load(run / name, weights_only=True) for run in (folder, other)))
    logs = [read_log(run) for run in (folder, other)]
    for log in logs:
        log[0]["settings"]["out_dir"] = None
        for entry in log:
            entry.pop("frames_per_second", None)
    assert logs[0] == logs[1]


class Break(Exception):
    pass


def at_step(monkeypatch, k, act):
    """Calls `act` once, in the middle of optimizer step k (0 is the first)."""
    original, done = train.learning_rate, []

    def learning_rate(step, cfg):
        if step == k and not done:
            done.append(step)
            act()
        return original(step, cfg)

    monkeypatch.setattr(train, "learning_rate", learning_rate)


def stop_at(monkeypatch, k, number):
    at_step(monkeypatch, k, lambda: os.kill(os.getpid(), number))


def build(cfg, awake=False):
    """(model, source, stats). With `awake` the gains, which start at 0, are not: all weights have gradients."""
    torch.manual_seed(0)
    source = open_source(cfg, "train")
    model = train.build_model(cfg, source, CPU)
    if awake:
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.fill_(0.5)
    return model, source, measure(source)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture
def tiny(tmp_path, digits):
    """Makes the settings of a tiny run in tmp_path / `name`."""

    def settings(name="run", **changes):
        folders = {"data_dir": digits, "out_dir": tmp_path / name}
        return read_settings(vars(train), flags(TINY | folders | changes))

    return settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits):
    """Folder of a run of 60 steps, evaluated at step 30 and at its end. Not to be written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    changes = {"data_dir": digits, "out_dir": folder, "batch_size": 8, "max_steps": 60, "warmup_steps": 10,
               "log_interval": 6, "eval_interval": 30, "eval_clips": 12, "lr": 0.03,
               "context_noise": 0.1}
    train.main(read_settings(vars(train), flags(TINY | changes)))
    return folder


@pytest.fixture
def half_done(tmp_path, finished):
    """(folder, its settings): a copy of the finished run, free to be spoilt, without the checkpoint before the last."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, ignore=lambda *_: ["checkpoint-previous.pt"])
    settings = read_log(folder)[0]["settings"] | {"out_dir": str(folder)}
    return folder, SimpleNamespace(**{key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()})


# ------------------------------------------------------------------------------------------------
# A run learns, and leaves a log and pictures


def test_training_lowers_the_loss_and_the_denoising_error(finished, tiny):
    log = read_log(finished)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.4

    state = load(finished)
    cfg = SimpleNamespace(**state["settings"])
    untrained, _, stats = build(cfg)
    before = train.error_table(untrained, open_source(cfg, "val"), stats, cfg, CPU)
    one = cfg.eval_sigmas.index(1.0)
    after = [entry for entry in log if "sigmas" in entry][-1]["first_and_later_error"]
    assert after[one][1] < 0.75 * before[one][1]


def test_the_log_is_json_that_begins_with_the_settings_and_has_the_error_table(finished, digits):
    first, *rest = read_log(finished)
    assert first["step"] == 0
    assert first["settings"]["batch_size"] == 8 and first["settings"]["data_dir"] == str(digits)
    assert set(first["settings"]) == set(vars(read_settings(vars(train), [])))
    assert first["origin"].startswith("MNIST") and str(digits) in first["origin"]
    assert first["parameters"] == sum(p.numel() for p in build(SimpleNamespace(**first["settings"]))[0].parameters())

    trained = [entry for entry in rest if "loss" in entry]
    evaluated = [entry for entry in rest if "sigmas" in entry]
    assert [entry["step"] for entry in trained] == list(range(6, 61, 6))
    assert [entry["step"] for entry in evaluated] == [30, 60]
    assert [entry["step"] for entry in rest] == sorted(entry["step"] for entry in rest)
    for entry in trained:
        assert entry["grad_norm"] > 0 and entry["frames_per_second"] > 0 and entry["lr"] > 0
    for entry in evaluated:
        assert entry["sigmas"] == first["settings"]["eval_sigmas"]
        assert np.shape(entry["first_and_later_error"]) == (len(entry["sigmas"]), 2)
        assert np.all(np.array(entry["first_and_later_error"]) > 0)


def test_each_evaluation_leaves_a_picture(finished):
    names = ["log.png", "rollout-00000030.png", "rollout-00000060.png"]
    assert sorted(path.name for path in finished.glob("*.png")) == names
    for path in finished.glob("rollout-*.png"):
        with Image.open(path) as picture:
            picture.load()
            cell = 16 * 2 + 2
            assert picture.size == (5 * cell, 8 * cell)  # 5 frames of 4 clips, each above its rollout


def test_what_an_evaluation_shows_is_of_held_out_clips_and_averaged_weights(finished, tmp_path):
    """The last one's table and picture, made anew from the checkpoint: its first average, the validation split, and the
    same sampler with the noise of the past that `sample.py` takes."""
    state = load(finished)
    cfg = SimpleNamespace(**state["settings"])
    model, _ = sample.load_model(finished / "checkpoint.pt", cfg.ema_widths[0], CPU)
    held_out, stats = open_source(cfg, "val"), state["stats"]
    table = train.error_table(model, held_out, stats, cfg, CPU)
    logged = [entry["first_and_later_error"] for entry in read_log(finished) if "sigmas" in entry]
    np.testing.assert_allclose(logged[-1], table, rtol=1e-4)
    clips, _ = load_batch(held_out, range(4))
    how = {"levels": sample.noise_levels(cfg.picture_steps), "seed": cfg.seed, "context_noise": cfg.context_noise / 2}
    made = sample.roll_out(model, clips, cfg.eval_context, min(cfg.picture_frames, held_out.frames), stats, how)
    sample.write(tmp_path / "expected.png", sample.with_truth(clips, made), cfg.eval_context, scale=2)
    with Image.open(tmp_path / "expected.png") as expected, Image.open(finished / "rollout-00000060.png") as found:
        difference = np.asarray(expected).astype(int) - np.asarray(found)
    assert np.abs(difference).max() <= 1


def test_a_run_is_compiled_if_it_is_to_be(tiny, monkeypatch):
    compiled = []
    monkeypatch.setattr(train, "compiled", lambda model: compiled.append(model) or model)
    train.main(tiny(max_steps=1, compile=True))
    assert len(compiled) == 1


def test_evaluating_does_not_change_what_is_learned(tiny, tmp_path):
    train.main(tiny("never", max_steps=3, dropout=0.2))
    train.main(tiny("often", max_steps=3, dropout=0.2, eval_interval=1, picture_frames=3))
    never, often = (load(tmp_path / name) for name in ("never", "often"))
    for part in ("model", "optimizer", "ema"):
        assert_same(never[part], often[part])


# ------------------------------------------------------------------------------------------------
# The loss


def stub(denoised=None, u=None):
    """A network that notes what it is given."""

    def network(x, sigma, actions=None):
        network.given = x, sigma, actions
        return denoised(x, sigma) if callable(denoised) else denoised, u

    return network


@pytest.mark.parametrize("context_noise", [0.0, 0.3])
def test_the_loss_is_the_formula_on_the_noised_copies(context_noise):
    """Against plain float64 loops over b, r, t: lambda / exp(u) |D - x|^2 / (c h w) + u."""
    b, r, t, shape = 2, 3, 4, (2, 3, 5)
    rng = np.random.default_rng(1)
    cfg = SimpleNamespace(P_mean=-0.7, P_std=1.3, sigma_data=0.6, context_noise=context_noise)
    clips, denoised = rng.normal(size=(b, t, *shape)), rng.normal(size=(b, r, t, *shape))
    u, z, eps = rng.normal(size=(b, r, t)), rng.normal(size=(b, r, t)), rng.normal(size=(b, r, t, *shape))
    level, clean_eps = rng.uniform(size=b), rng.normal(size=(b, t, *shape))
    noise = [z, eps] + [level * context_noise, clean_eps] * (context_noise > 0)
    network, actions = stub(torch.tensor(denoised), torch.tensor(u)), torch.zeros(b, t)
    loss = train.loss_of(network, torch.tensor(clips), actions, [torch.tensor(part) for part in noise], cfg)

    x, sigmas, passed = (part.numpy() for part in network.given)
    total = 0.0
    for i in range(b):
        np.testing.assert_allclose(sigmas[i, 0], np.full(t, level[i] * context_noise))
        np.testing.assert_allclose(x[i, 0], clips[i] + level[i] * context_noise * clean_eps[i])
        for s in range(r):
            for k in range(t):
                sigma = math.exp(-0.7 + 1.3 * z[i, s, k])
                np.testing.assert_allclose(sigmas[i, s + 1, k], sigma)
                np.testing.assert_allclose(x[i, s + 1, k], clips[i, k] + sigma * eps[i, s, k])
                weight = (sigma**2 + 0.6**2) / (sigma * 0.6) ** 2
                error = ((denoised[i, s, k] - clips[i, k]) ** 2).sum() / math.prod(shape)
                total += weight * error / math.exp(u[i, s, k]) + u[i, s, k]
    assert loss.item() == pytest.approx(total / (b * r * t), rel=1e-12)
    assert x.shape == (b, 1 + r, t, *shape) and passed is not None


def noise_of(samples, seed=0, context_noise=1.0):
    cfg = SimpleNamespace(seed=seed, context_noise=context_noise)
    return train.draw_noise(samples, 2, (3, 1, 4, 4), cfg, CPU)


def test_a_samples_noise_depends_on_seed_and_number_alone():
    parts = noise_of([7, 3, 1000])
    assert [tuple(part.shape) for part in parts] == [(3, 2, 3), (3, 2, 3, 1, 4, 4), (3,), (3, 3, 1, 4, 4)]
    torch.manual_seed(5)
    for part, elsewhere, alone in zip(parts, noise_of([3, 5, 9, 7]), noise_of([1000])):
        assert torch.equal(part[0], elsewhere[3]) and torch.equal(part[1], elsewhere[0])
        assert torch.equal(part[2], alone[0])
    for part, without in zip(parts[:2], noise_of([7, 3, 1000], context_noise=0.0), strict=True):
        assert torch.equal(part, without)


def test_other_samples_seeds_and_copies_have_other_noise():
    drawn = [noise_of([7, 8]), noise_of([7, 8], seed=1), noise_of([9, 10])]
    for parts in zip(*drawn):
        values = torch.cat([part.flatten() for part in parts])
        assert len(values.unique()) == len(values)


def test_noise_is_standard_normal_and_its_level_uniform():
    z, eps, level, clean_eps = noise_of(range(2000))
    for part in (z, eps, clean_eps):
        n = part.numel()
        assert abs(part.mean()) < 5 / math.sqrt(n)
        assert abs(part.var() - 1) < 5 * math.sqrt(2 / n)
    assert 0 <= level.min() < 0.01 and 0.99 < level.max() < 1 and abs(level.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 2000)


# ------------------------------------------------------------------------------------------------
# Learning rate and averaged weights


@pytest.mark.parametrize("actions", [torch.arange(1, 4).repeat(400, 1), torch.ones(400, 3, 2)])
def test_a_share_of_the_clips_has_its_actions_hidden_by_seed_and_number(actions):
    def hide(numbers, seed=0):
        cfg = SimpleNamespace(seed=seed, action_dropout=0.25)
        return train.hide_actions(actions[:len(numbers)], numbers, cfg)
    found = hide(range(400))
    unknown = found.isnan() if actions.is_floating_point() else found == -1
    hidden = unknown.flatten(1).all(1)
    assert torch.equal(hidden, unknown.flatten(1).any(1)) and 60 < hidden.sum() < 140
    assert torch.equal(found[~hidden], actions[~hidden])
    assert torch.equal(hide(range(100, 104)).nan_to_num(-7), found[100:104].nan_to_num(-7))
    assert not torch.equal(hide(range(400), seed=1).nan_to_num(-7), found.nan_to_num(-7))


def test_the_learning_rate_warms_up_linearly_then_falls_linearly_to_zero():
    cfg = SimpleNamespace(lr=0.5, warmup_steps=10, decay="linear", max_steps=1000, ref_steps=100)
    for step in range(10):
        assert train.learning_rate(step, cfg) == pytest.approx(0.5 * (step + 1) / 10 * (1 - step / 1000), rel=1e-12)
    for step in (10, 250, 999):
        assert train.learning_rate(step, cfg) == pytest.approx(0.5 * (1000 - step) / 1000, rel=1e-12)
    assert train.learning_rate(1000, cfg) == 0
    cfg.warmup_steps = 0
    assert train.learning_rate(0, cfg) == 0.5


def test_the_square_root_schedule_sets_in_at_its_reference_step():
    cfg = SimpleNamespace(lr=0.5, warmup_steps=10, decay="sqrt", max_steps=1000, ref_steps=100)
    assert train.learning_rate(4, cfg) == pytest.approx(0.25)
    assert train.learning_rate(50, cfg) == train.learning_rate(100, cfg) == 0.5
    assert train.learning_rate(400, cfg) == pytest.approx(0.25, rel=1e-12)
    assert train.learning_rate(2500, cfg) == pytest.approx(0.1, rel=1e-12)


@pytest.mark.parametrize("shapes", [[(8, 20), (30, 8), (8, 8)], [(1, 128), (1, 1), (5, 1)], [(5, 5)]])
def test_an_orthogonalised_matrix_keeps_its_singular_vectors_and_makes_their_values_alike(shapes):
    """Values from 1 down to 1 / 200 come to lie between 0.6 and 1.25."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False) for shape in shapes]
    matrices = [1e3 * u * torch.logspace(0, -2.3, len(s)) @ vt for u, s, vt in parts]
    for (u, _, vt), made in zip(parts, train.orthogonal(matrices), strict=True):
        values = u.mT @ made @ vt.mT
        assert 0.6 < values.diagonal().min() and values.diagonal().max() < 1.25
        torch.testing.assert_close(values, values.diagonal().diag(), rtol=0, atol=1e-3)


def test_a_matrix_of_zeros_has_no_direction():
    zeros, other = train.orthogonal([torch.zeros(3, 4), torch.ones(3, 5)])
    assert zeros.eq(0).all() and other.abs().min() > 0.1


def newton_schulz(x):
    """The iteration as it is published, on one matrix in double precision."""
    rows, columns = x.shape
    x = (x if rows <= columns else x.T).double()
    x = x / x.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - (4.7750 * square - 2.0315 * square @ square) @ x
    return x if rows <= columns else x.T


def test_steps_go_along_the_orthogonalised_momentum_by_the_learning_rate():
    """Weights of several shapes, some of them alike, a vector among them; three steps, the rate changing."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 2, 3, 3, 3), (6, 54), (20, 4), (4,), (1,)]
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer, expected = train.Muon(weights), [w.detach().double() for w in weights]
    averages = [0.0] * len(shapes)
    for lr in (0.1, 0.02, 0.3):
        optimizer.param_groups[0]["lr"] = lr
        for i, w in enumerate(weights):
            w.grad = torch.randn(w.shape, generator=generator)
            averages[i] = 0.95 * averages[i] + 0.05 * w.grad.double()
            ahead = 0.95 * averages[i] + 0.05 * w.grad.double()
            ahead = ahead.reshape(len(ahead) if ahead.ndim > 1 else 1, -1)
            move = newton_schulz(ahead) * max(ahead.shape) ** 0.5
            expected[i] = expected[i] - lr * move.reshape(w.shape)
        optimizer.step()
        for w, target in zip(weights, expected, strict=True):
            torch.testing.assert_close(w.detach().double(), target, rtol=0, atol=1e-4)


def test_adam_learns_too(tiny, tmp_path):
    train.main(tiny(max_steps=40, log_interval=5, optimizer="adam", lr=0.02))
    losses = [entry["loss"] for entry in read_log(tmp_path / "run") if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3


def test_averages_weigh_step_t_with_the_power_function(tiny):
    """After N steps the weights of step i count (i/N)^(gamma+1) - ((i-1)/N)^(gamma+1): t^gamma, integrated."""
    weight = torch.nn.Linear(3, 2).double()
    ema = train.PowerEMA(weight, (0.05, 0.2))
    history, steps = [], 7
    for step in range(1, steps + 1):
        with torch.no_grad():
            weight.weight.copy_(torch.randn(2, 3, dtype=torch.float64))
        history.append(weight.weight.detach().clone())
        ema.update(step)
        if step == 1:
            assert all(torch.equal(average["weight"], weight.weight) for average in ema.averages.values())
    for width, average in ema.averages.items():
        times = np.arange(steps + 1) / steps
        shares = np.diff(times ** (ema_exponent(width) + 1))
        expected = sum(share * past for share, past in zip(shares.tolist(), history))
        torch.testing.assert_close(average["weight"], expected, rtol=0, atol=1e-12)


def test_the_averages_follow_the_weights_of_the_step_just_taken(tiny, tmp_path):
    train.main(tiny(max_steps=1))
    state = load(tmp_path / "run")
    for average in state["ema"].values():
        assert_same(average, {name: state["model"][name] for name in average})


def test_a_width_is_rebuilt_from_the_checkpoint_of_a_stopped_run_too(tiny, tmp_path, monkeypatch):
    """Its last steps are in no snapshot. Beside a run that tracked that width."""
    for name, widths in (("rebuilt", (0.05, 0.1)), ("tracked", (0.08,))):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_at(patch, 28, signal.SIGTERM)
            train.main(tiny(name, ema_widths=widths, max_steps=60, checkpoint_interval=10))
    state, tracked = load(tmp_path / "rebuilt"), load(tmp_path / "tracked")["ema"][0.08]
    rebuilt = sample.reconstruct_ema(tmp_path / "rebuilt", state, 0.08)
    for name, average in tracked.items():
        assert (rebuilt[name] - average).norm() < 0.1 * average.norm(), name


def test_a_width_that_snapshots_cannot_give_is_refused(tiny, tmp_path):
    """The last steps' weights, which a narrow one is made of, are in no snapshot."""
    train.main(tiny(max_steps=40, checkpoint_interval=10))
    state = load(tmp_path / "run")
    sample.reconstruct_ema(tmp_path / "run", state, 0.07)
    with pytest.raises(UserError, match=r"ema=0.01: \d+% of it are out of reach .* as wide as 0.05 or 0.1, or 0"):
        sample.reconstruct_ema(tmp_path / "run", state, 0.01)


def test_snapshots_of_another_run_are_not_mixed_in(tiny, tmp_path):
    train.main(tiny(max_steps=2, checkpoint_interval=1))
    for path in (tmp_path / "run").glob("checkpoint*.pt"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds snapshots ema-\*\.pt of another run: move them away"):
        train.main(tiny(max_steps=2))


def test_the_averaged_model_is_on_the_sphere_and_another_one(tiny):
    model, _, _ = build(tiny(), awake=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shrink = {name: 0.3 * torch.roll(p.detach(), 1, 0) for name, p in model.named_parameters() if p.ndim > 1}
    average = {name: p.detach() + 1 for name, p in model.named_parameters()} | shrink
    averaged = train.averaged_model(Denoiser(model.cfg), model, average, CPU)
    assert not averaged.training and not any(p.requires_grad for p in averaged.parameters())
    for name, p in averaged.named_parameters():
        unit = 1 / average[name].square().mean(tuple(range(1, p.ndim)), keepdim=True).sqrt() if p.ndim > 1 else 1
        torch.testing.assert_close(p, average[name] * unit, rtol=1e-5, atol=1e-6)
    assert_same(dict(averaged.named_buffers()), dict(model.named_buffers()))
    assert model.training
    assert_same(model.state_dict(), before)


# ------------------------------------------------------------------------------------------------
# Evaluation


@pytest.fixture
def evaluation(tiny):
    """(table of a stub denoiser, settings, held-out source, stats)."""
    cfg = tiny(eval_clips=20, eval_sigmas=(0.5, 2.0, 7.0), eval_context=3)
    source, stats = open_source(cfg, "val"), measure(open_source(cfg, "train"))

    def table(denoised, *ranks):
        return train.error_table(stub(denoised), source, stats, cfg, CPU, *ranks)

    return table, cfg, source, stats


def test_a_perfect_denoiser_has_no_error_and_a_blind_one_the_variance(evaluation):
    table, cfg, source, stats = evaluation
    assert table(lambda x, sigma: x[:, :1].expand_as(x[:, 1:])) == [[0, 0]] * 3
    clips = to_network(load_batch(source, range(20))[0], stats, cfg.sigma_data).double()
    blind = table(lambda x, sigma: torch.zeros_like(x[:, 1:]))
    variance = clips.square().mean((0, 2, 3, 4)) / cfg.sigma_data**2
    for first, later in blind:
        assert first == pytest.approx(variance[0].item(), rel=1e-5)
        assert later == pytest.approx(variance[3:].mean().item(), rel=1e-5)
        assert 0.7 < later < 1.3  # of digits that the statistics were not measured on


def test_the_columns_are_the_first_frame_and_those_with_enough_context(evaluation):
    """With a denoiser that is off by sigma * (1 + t), each entry says which frames and noise level it is of."""
    table, cfg, _, _ = evaluation

    def off(x, sigma):
        return x[:, :1] + (sigma[:, 1:] * (1 + torch.arange(x.shape[2])))[..., None, None, None]

    for (first, later), sigma in zip(table(off), (0.5, 2.0, 7.0), strict=True):
        assert first == pytest.approx((sigma / cfg.sigma_data) ** 2, rel=1e-5)
        assert later == pytest.approx((sigma / cfg.sigma_data) ** 2 * (4**2 + 5**2) / 2, rel=1e-5)


def test_the_noised_frames_have_the_noise_they_are_said_to_have(evaluation):
    table, cfg, _, _ = evaluation
    for (first, later), sigma in zip(table(lambda x, sigma: x[:, 1:]), (0.5, 2.0, 7.0), strict=True):
        n = 20 * 16 * 16  # values of the first frames
        for error in (first, later):
            assert error / (sigma / cfg.sigma_data) ** 2 == pytest.approx(1, abs=5 * math.sqrt(2 / n))


def test_the_table_does_not_depend_on_how_many_processes_share_the_clips(evaluation, monkeypatch):
    table, _, _, _ = evaluation
    alone = table(lambda x, sigma: 0.5 * x[:, 1:])
    parts = []
    monkeypatch.setattr(train, "sum_over_ranks", lambda x: parts.append(x.clone()) or x)
    table(lambda x, sigma: 0.5 * x[:, 1:], 1, 2)
    assert len(parts) == 2 and 0 < parts[1].item() < 20  # clips of rank 1
    monkeypatch.setattr(train, "sum_over_ranks", lambda x: x + parts.pop(0))
    np.testing.assert_allclose(table(lambda x, sigma: 0.5 * x[:, 1:], 0, 2), alone, rtol=1e-5)


# ------------------------------------------------------------------------------------------------
# Micro-batches and processes: however the batch is split up, the step is the same


def first_gradients(cfg, accumulate):
    """(gradients of the first step, its loss) of a network in which every weight matters."""
    cfg.accumulate = accumulate
    model, source, stats = build(cfg, awake=True)
    with Batches(source, cfg.batch_size, CPU, accumulate=accumulate) as batches:
        loss = train.gradients(model, batches, cfg, stats, CPU)
    return {name: p.grad for name, p in model.named_parameters()}, loss.item()


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_give_the_gradients_of_the_whole_batch(tiny, accumulate):
    cfg = tiny(context_noise=0.2, noised_copies=2)
    whole, loss = first_gradients(cfg, 1)
    parts, same_loss = first_gradients(cfg, accumulate)
    assert same_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in whole.items():
        assert gradient.norm() > 0, name
        # float32 rounds at 1e-8 where a gain's gradient nearly cancels, differently on one thread and on two
        assert (parts[name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-8, name


def test_gradients_are_exchanged_in_the_last_micro_batch_only(tiny, monkeypatch):
    cfg, events = tiny(accumulate=4), []
    model, source, stats = build(cfg)

    @contextmanager
    def no_sync():
        events.append("alone")
        yield
        events.append("end")

    class Replica(torch.nn.Module):
        def forward(self, *inputs):
            events.append("pass")
            return model(*inputs)

    network = Replica()
    network.no_sync = no_sync
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    with Batches(source, cfg.batch_size, CPU, accumulate=4) as batches:
        train.gradients(network, batches, cfg, stats, CPU)
    assert events == ["alone", "pass", "end"] * 3 + ["pass"]


def weights_moved(one, other):
    """Largest distance of a weight between two checkpoints' networks."""
    return max((value - other["model"][name]).abs().max().item() for name, value in one["model"].items())


@pytest.fixture
def whole_batch(tiny, tmp_path):
    """(untrained weights, checkpoint, log) of three steps in one process, one pass each."""
    cfg = tiny("whole", batch_size=8, max_steps=3, eval_interval=3, eval_clips=10, picture_frames=3)
    train.main(cfg)
    torch.manual_seed(cfg.seed)
    start = {"model": train.build_model(cfg, open_source(cfg, "train"), CPU).state_dict()}
    return start, load(tmp_path / "whole"), read_log(tmp_path / "whole")


def assert_close_runs(folder, whole_batch):
    """The same up to rounding: a gain makes a full step of a gradient that is all rounding, so a single weight
    may differ more than its gradient did, but by little of the way that it went."""
    start, state, log = whole_batch
    assert weights_moved(start, state) > 0.02
    assert weights_moved(load(folder), state) < 1e-4
    for entry, expected in zip(read_log(folder)[1:], log[1:], strict=True):
        assert entry.keys() == expected.keys()
        for key in entry.keys() & {"loss", "grad_norm", "first_and_later_error"}:
            np.testing.assert_allclose(entry[key], expected[key], rtol=1e-5, err_msg=f"{key}, step {entry['step']}")


def test_a_run_in_micro_batches_is_the_same_run(tiny, tmp_path, whole_batch):
    train.main(tiny("parts", batch_size=8, accumulate=4, max_steps=3, eval_interval=3, eval_clips=10, picture_frames=3))
    assert_close_runs(tmp_path / "parts", whole_batch)


def test_sharding_needs_processes_and_no_compiler(tiny):
    with pytest.raises(UserError, match="shard=True .*torchrun"):
        train.main(tiny(shard=True))
    with pytest.raises(UserError, match="shard=True and compile=True"):
        train.main(tiny(shard=True, compile=True))


def torchrun_command(settings, *options):
    """`torchrun .. train.py` on the CPU."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, str(ROOT / "train.py"),
            *flags(TINY | settings)]


def torchrun(folder, settings, *options, **env):
    """It, finished."""
    return subprocess.run(torchrun_command(settings, *options), cwd=folder, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


@pytest.mark.parametrize("count, changes", [(2, {"accumulate": 2}), (4, {}),
                                            (2, {"shard": True, "accumulate": 2, "recompute": True})])
def test_several_processes_are_one_with_the_joint_batch(tmp_path, digits, whole_batch, count, changes):
    """The micro-batches of all processes, and their share of the evaluation, count; sharded, a checkpoint is whole."""
    done = torchrun(tmp_path, {"data_dir": digits, "out_dir": "many", "batch_size": 8, "max_steps": 3,
                               "eval_interval": 3, "eval_clips": 10, "picture_frames": 3} | changes,
                    f"--nproc_per_node={count}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done at step 3") == done.stdout.count("Only ") == 1 and f"{count} x cpu" in done.stdout
    assert "Warning" not in done.stderr
    assert_close_runs(tmp_path / "many", whole_batch)
    assert_alike(load(tmp_path / "many"), whole_batch[1])


def test_the_exchange_of_gradients_ends_before_its_process_group(tmp_path, digits):
    """Where DistributedDataParallel's reducer goes last, it waits for the group's threads with the interpreter locked,
    and they may be waiting for that lock: a process hangs at the end of one run in some hundred."""
    (tmp_path / "sitecustomize.py").write_text("""if __import__("os").environ.get("RANK"):
    import gc, torch, torch.distributed as dist
    destroy = dist.destroy_process_group
    def noting():
        kind = torch.nn.parallel.DistributedDataParallel
        print("reducers", sum(issubclass(type(x), kind) for x in gc.get_objects()), flush=True)
        destroy()
    dist.destroy_process_group = noting
""")
    done = torchrun(tmp_path, {"data_dir": digits, "batch_size": 4, "max_steps": 2}, "--nproc_per_node=2",
                    PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("reducers 0") == 2


def assert_alike(state, other):
    """Two checkpoints with the same keys and shapes, and nearly the same averages and moments."""
    assert state["model"].keys() == other["model"].keys()
    for width, average in other["ema"].items():
        for name, tensor in average.items():
            torch.testing.assert_close(state["ema"][width][name], tensor, rtol=0, atol=1e-4)
    assert state["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()
    for number, moments in other["optimizer"]["state"].items():
        for key, tensor in moments.items():
            torch.testing.assert_close(state["optimizer"]["state"][number][key], tensor, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shard", [False, True])
def test_a_run_goes_on_with_another_number_of_processes(tiny, tmp_path, digits, whole_batch, monkeypatch, shard):
    settings = dict(batch_size=8, max_steps=3, eval_interval=3, eval_clips=10, picture_frames=3)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 0, signal.SIGTERM)
        train.main(tiny("many", **settings))
    done = torchrun(tmp_path, settings | {"data_dir": digits, "out_dir": "many", "shard": shard}, "--nproc_per_node=2")
    assert done.returncode == 0, done.stderr
    assert "at step 1 of 3" in done.stdout and "2 x cpu" in done.stdout
    assert_close_runs(tmp_path / "many", whole_batch)


def test_a_killed_process_under_torchrun_is_started_again_and_goes_on(tmp_path, digits):
    """Rank 1 is killed in its fourth step, once: the launcher starts both anew, from the checkpoint of step 2."""
    (tmp_path / "sitecustomize.py").write_text("""if __import__("os").environ.get("RANK") == "1":
    import os, pathlib, signal, sys, threading, time
    mark, log = pathlib.Path("killed"), pathlib.Path("restarted/log.jsonl")
    def kill():
        while not (log.exists() and log.read_text().count("\\n") > 3):
            time.sleep(0.001)
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if not mark.exists():
        threading.Thread(target=kill, daemon=True).start()
""")
    settings = {"data_dir": digits, "batch_size": 4, "max_steps": 40, "checkpoint_interval": 2}
    whole = torchrun(tmp_path, settings | {"out_dir": "whole"}, "--nproc_per_node=2")
    done = torchrun(tmp_path, settings | {"out_dir": "restarted"}, "--nproc_per_node=2", "--max-restarts=3",
                    PYTHONPATH=str(tmp_path))
    assert whole.returncode == done.returncode == 0, done.stderr
    assert (tmp_path / "killed").exists() and "resuming restarted/checkpoint.pt at step" in done.stdout
    assert_same_run(tmp_path / "restarted", tmp_path / "whole")


def test_a_launcher_that_is_told_to_stop_lets_its_processes_save(tmp_path, digits):
    settings = {"data_dir": digits, "out_dir": "stopped", "batch_size": 4, "max_steps": 10 ** 6}
    launcher = subprocess.Popen(torchrun_command(settings, "--nproc_per_node=2"), cwd=tmp_path, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
    try:
        log = tmp_path / "stopped" / "log.jsonl"
        while launcher.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
            time.sleep(0.05)
        launcher.terminate()
        said, _ = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    step = load(tmp_path / "stopped")["step"]
    assert launcher.returncode != 0 and said.count(f"stopped at step {step}") == 1
    assert step == read_log(tmp_path / "stopped")[-1]["step"] >= 3


def test_a_batch_that_is_not_finite_in_one_process_is_skipped_by_both(tmp_path, digits):
    """A not finite pixel in rank 1's clips of step 1: both processes leave the step out, and stay alike."""
    (tmp_path / "sitecustomize.py").write_text("""import os
if os.environ.get("RANK") == "1":
    import importlib.abc, importlib.machinery, sys
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "data":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            load = spec.loader.exec_module
            def exec_module(module):
                load(module)
                to_network = module.to_network
                def spoilt(frames, *rest):
                    x = to_network(frames, *rest)
                    spoilt.calls += 1
                    return x * float("nan") if spoilt.calls == 2 else x
                spoilt.calls = 0
                module.to_network = spoilt
            spec.loader.exec_module = exec_module
            return spec
    import importlib.util
    sys.meta_path.insert(0, Finder())
""")
    done = torchrun(tmp_path, {"data_dir": digits, "out_dir": "run", "batch_size": 4, "max_steps": 4},
                    "--nproc_per_node=2", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 1: the gradient norm is nan; the step is skipped (clips 4 to 7)") >= 1
    state = load(tmp_path / "run")
    assert state["step"] == 4 and all(value.isfinite().all() for value in state["model"].values())
    assert [entry["grad_norm"] is None for entry in read_log(tmp_path / "run")[1:]] == [False, True, False, False]


# ------------------------------------------------------------------------------------------------
# Runs that stop and go on


EVERYTHING = {"dropout": 0.2, "context_noise": 0.3, "accumulate": 2, "noised_copies": 2, "eval_interval": 4,
              "picture_frames": 3, "optimizer": "adam"}


@pytest.mark.parametrize("changes, stops", [
    ({}, [(0, signal.SIGINT), (4, signal.SIGTERM)]),
    (EVERYTHING, [(2, signal.SIGHUP)]),
], ids=["plain", "everything random"])
def test_a_stopped_run_goes_on_bit_for_bit(tiny, tmp_path, monkeypatch, changes, stops):
    changes = changes | {"log_interval": 4, "checkpoint_interval": 2}
    train.main(tiny("whole", **changes))
    for step, number in stops:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            stop_at(patch, step, number)
            train.main(tiny("stopped", **changes))
        assert ended.value.code == 128 + number
        assert load(tmp_path / "stopped")["step"] == step + 1
    train.main(tiny("stopped", **changes))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_killed_run_goes_on_from_its_last_checkpoint(tiny, tmp_path, monkeypatch):
    """What the log says of steps after that checkpoint is dropped, as they are taken again."""

    def die():
        raise Break

    changes = {"checkpoint_interval": 2, "dropout": 0.2}
    train.main(tiny("whole", **changes))
    with monkeypatch.context() as patch, pytest.raises(Break):
        at_step(patch, 5, die)
        train.main(tiny("killed", **changes))
    assert load(tmp_path / "killed")["step"] == 4
    assert read_log(tmp_path / "killed")[-1]["step"] == 5
    train.main(tiny("killed", **changes))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_a_new_log(tiny, tmp_path, monkeypatch):
    def die():
        raise Break

    with monkeypatch.context() as patch, pytest.raises(Break):
        at_step(patch, 1, die)
        train.main(tiny(max_steps=2))
    train.main(tiny(max_steps=2))
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == [0, 1, 2]


def test_a_log_cut_off_in_the_middle_of_a_line_does_not_stop_a_run_from_going_on(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 2, signal.SIGTERM)
        train.main(tiny(max_steps=4))
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo\n5\n')
    with open(tmp_path / "run" / "log.jsonl", "ab") as file:
        file.write(b"\xff\n")
    train.main(tiny(max_steps=4))
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == [0, 1, 2, 3, 4]


def test_a_second_signal_ends_at_once_and_leaves_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 3, twice)
    with pytest.raises(SystemExit) as ended:
        train.main(tiny(checkpoint_interval=2))
    assert load(tmp_path / "run")["step"] == 2 and ended.value.code == 130


def test_torchruns_own_sigterm_behind_another_ends_no_step(tiny, tmp_path, monkeypatch):
    """A system that ends all processes ends torchrun too, which then does the same to ours, milliseconds later. A
    second later, somebody means it."""
    clock = [100.0]

    def twice(seconds):
        def send():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                clock[0] += seconds
        return send
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        at_step(patch, 3, twice(0.1))
        train.main(tiny())
    assert load(tmp_path / "run")["step"] == 4 and stopped.value.code == 128 + signal.SIGTERM
    with pytest.raises(SystemExit):
        at_step(monkeypatch, 4, twice(2))
        train.main(tiny())
    assert load(tmp_path / "run")["step"] == 4


def assert_refused(cfg, folder):
    """The message of the UserError; no file was changed."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError) as error:
        train.main(cfg)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_that_another_process_was_asked_to_stop_saves_too(tiny, tmp_path, monkeypatch):
    asked = []
    at_step(monkeypatch, 2, lambda: asked.append(1))
    monkeypatch.setattr(train, "any_process", lambda happened, device: happened or asked)
    with suppress(SystemExit):
        train.main(tiny())
    assert load(tmp_path / "run")["step"] == 3


def test_what_happened_in_another_process_is_heard_of(monkeypatch):
    assert train.any_process([1], CPU) and not train.any_process([], CPU)
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    for elsewhere in (0, 1, 3):
        monkeypatch.setattr(train, "sum_over_ranks", lambda x, n=elsewhere: x + n)
        assert train.any_process([1], CPU) and bool(train.any_process([], CPU)) == (elsewhere > 0)


def test_a_run_from_scratch_that_torchrun_starts_again_goes_on(tiny, tmp_path, monkeypatch):
    cfg = tiny(init_from="scratch", max_steps=4)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 2, signal.SIGTERM)
        train.main(cfg)
    assert "init_from=scratch would overwrite" in assert_refused(cfg, tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train.main(cfg)
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("key, value", [("lr", 0.01), ("max_steps", 90), ("ema_widths", (0.05,)), ("seed", 1)])
def test_a_run_is_not_continued_with_other_settings(half_done, key, value):
    folder, cfg = half_done
    old = getattr(cfg, key)
    setattr(cfg, key, value)
    message = assert_refused(cfg, folder)
    assert str(folder / "checkpoint.pt") in message
    differences = message.split("settings", 1)[1]
    assert all(differences.count(part) for part in (key, str(old).strip("()"), str(value).strip("()")))
    assert not any(f"{other} " in differences for other in ("digits", "batch_size", "frames"))


def test_a_run_is_continued_with_other_settings_if_that_is_asked_for(half_done, capsys):
    folder, cfg = half_done
    state = load(folder)
    cfg.init_from, cfg.lr, cfg.max_steps, cfg.ema_widths = "changed", 0.005, state["step"] + 1, (0.05, 0.15)
    train.main(cfg)
    said = capsys.readouterr().out
    assert "going on with other settings" in said and "lr was" in said and "ema_widths was" in said
    after = load(folder)
    assert after["step"] == state["step"] + 1 and set(after["ema"]) == {0.05, 0.15}
    assert not any(x.requires_grad for average in after["ema"].values() for x in average.values())
    assert 0 < weights_moved(after, state) < 0.05 and after["settings"]["lr"] == 0.005
    cfg.channels = 32
    assert "another network: " in assert_refused(cfg, folder)


def test_another_optimizer_begins_without_the_moments_of_the_first(half_done):
    folder, cfg = half_done
    steps, cfg.optimizer, cfg.init_from = cfg.max_steps, "adam", "changed"
    cfg.max_steps += 1
    train.main(cfg)
    state = load(folder)
    assert state["step"] == steps + 1
    for moments in state["optimizer"]["state"].values():
        assert set(moments) == {"step", "exp_avg", "exp_avg_sq"} and moments["step"] == 1


def test_a_run_goes_on_with_the_scale_of_the_data_it_began_with(half_done, monkeypatch):
    """Measured anew, a folder that has grown would rescale what a half-trained network is given."""
    folder, cfg = half_done
    before, cfg.max_steps, cfg.init_from = load(folder)["stats"], cfg.max_steps + 1, "changed"
    monkeypatch.setattr(train, "measure", lambda source: before | {"mean": [0.9], "std": [0.01], "reach": 7.0})
    train.main(cfg)                                         # how far actions reach is no matter of scale
    assert load(folder)["step"] == cfg.max_steps and load(folder)["stats"] == before | {"reach": 7.0}


def test_a_run_that_is_farther_than_asked_is_not_said_to_be_done(half_done):
    folder, cfg = half_done
    cfg.max_steps, cfg.init_from = 50, "changed"
    assert "is of step 60 already" in assert_refused(cfg, folder)


def test_a_setting_that_a_run_did_not_have_yet_had_its_default(half_done, monkeypatch):
    """As when one was added to train.py."""
    folder, cfg = half_done
    monkeypatch.setattr(train, "ball_radius", 4.0, raising=False)
    cfg.ball_radius = 4.0
    train.main(cfg)
    cfg.ball_radius = 5.0
    assert "ball_radius was 4.0, now 5.0" in assert_refused(cfg, folder)


def test_a_run_does_not_go_on_with_other_data_unasked(half_done, digits, tmp_path, monkeypatch, capsys):
    """Digits that were held out would be trained on, and those trained on be held out; a copy elsewhere is the same."""
    folder, cfg = half_done
    monkeypatch.chdir(tmp_path)
    # the first is a word of what the data are said to be, too, and the second is in the name of a file
    for place in ("MNIST", "idx3", f"{tmp_path / 'moved'}/"):
        shutil.copytree(digits, place)
        cfg.data_dir, cfg.max_steps, cfg.init_from = place, cfg.max_steps + 1, "changed"
        train.main(cfg)
        assert "the data were" not in capsys.readouterr().out
    shutil.copy(digits / "t10k-images-idx3-ubyte", tmp_path / "moved/train-images-idx3-ubyte")
    find_images.cache_clear()                               # as in a process of its own
    cfg.init_from = "auto"
    message = assert_refused(cfg, folder)
    assert "the data were MNIST, digits 0 to 35 of" in message and "now MNIST train split, 40 digits" in message


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that is asked for")


@pytest.mark.parametrize("wish, device", [("auto", "cpu"), ("cpu", "cpu"), pytest.param("cuda", None, marks=NO_GPU),
                                          pytest.param("cuda:0", None, marks=NO_GPU)])
def test_a_process_of_torchrun_gets_the_device_it_was_told_or_says_why_not(monkeypatch, wish, device):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0,
                        "GROUP_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train.dist, "rendezvous", lambda _: iter([(None, 0, 1)]))
    monkeypatch.setattr(train.dist, "init_process_group", lambda *_, **__: None)
    if device:
        assert train.start_processes(SimpleNamespace(device=wish)) == (torch.device(device), 0, 1)
    else:
        with pytest.raises(UserError, match="device 'cuda:0' cannot be used"):
            train.start_processes(SimpleNamespace(device=wish))


def test_a_launcher_that_does_not_say_which_gpu_is_none(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert train.start_processes(SimpleNamespace(device="cpu")) == (torch.device("cpu"), 0, 1)


def test_an_evaluation_that_fails_loses_no_step(tiny, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError("no memory for the table")
    monkeypatch.setattr(train, "error_table", fail)
    with pytest.raises(MemoryError, match="for the table"):
        train.main(tiny(eval_interval=3))
    assert load(tmp_path / "run")["step"] == 3


@pytest.mark.parametrize("at", [3, 6])
def test_an_evaluation_that_was_cut_off_is_made_up_for_once(tiny, tmp_path, monkeypatch, at):
    """In the middle of the run, and at its end."""
    changes, error_table = {"eval_interval": 3, "checkpoint_interval": 3}, train.error_table
    train.main(tiny("whole", **changes))

    def cut_off(*arguments):
        if next(steps) == at:
            raise KeyboardInterrupt
        return error_table(*arguments)
    steps = iter([3, 6])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "error_table", cut_off)
        train.main(tiny("cut", **changes))
    for _ in range(2):
        train.main(tiny("cut", **changes))
        assert_same_run(tmp_path / "cut", tmp_path / "whole")
        assert (tmp_path / "cut" / f"rollout-0000000{at}.png").exists()


WORLD = {"dataset": "world", "digits": 3, "canvas_size": 24, "speed": "4,4"}


def test_in_training_evaluation_and_pictures_vectors_of_actions_have_one_scale(tiny, vectors_of_thousands):
    train.main(tiny(**WORLD, max_steps=2, eval_interval=2))
    assert len(vectors_of_thousands) > 10
    assert all(1 < actions.abs().max() < 2 for actions in vectors_of_thousands)         # 3 ** .5 of uniform ones


def test_an_evaluation_holds_no_more_clips_at_once_than_training(tiny, monkeypatch):
    def counted(source, numbers, device):
        sizes.append(len(numbers))
        return load_batch(source, numbers, device)
    sizes = []
    monkeypatch.setattr(train, "load_batch", counted)
    cfg = tiny(batch_size=4, accumulate=2, eval_clips=5)
    train.error_table(*build(cfg), cfg, CPU)
    assert sizes == [2, 2, 1]


def test_frames_per_second_count_the_steps_since_the_last_line(tiny, tmp_path, monkeypatch):
    """A clock that only optimizer steps move, by a second each; stopped between two lines."""
    clock, optimizer_step = [0.0], train.optimizer_step

    def slow(*arguments):
        clock[0] += 1
        return optimizer_step(*arguments)
    monkeypatch.setattr(train, "optimizer_step", slow)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, 4, signal.SIGTERM)
        train.main(tiny(log_interval=3))
    train.main(tiny(log_interval=3))
    assert [entry["frames_per_second"] for entry in read_log(tmp_path / "run")[1:]] == [20, 20]


def test_frames_per_second_are_of_training_alone(tiny, tmp_path, monkeypatch):
    """A clock that steps, evaluations and saves all move by a second."""
    clock = [0.0]

    def slowly(function):
        def call(*arguments):
            clock[0] += 1
            return function(*arguments)
        return call
    for owner, name in ((train, "optimizer_step"), (train.Run, "evaluate"), (train.Run, "save")):
        monkeypatch.setattr(owner, name, slowly(getattr(owner, name)))
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    train.main(tiny(log_interval=2, eval_interval=3, checkpoint_interval=2))
    assert [entry["frames_per_second"] for entry in read_log(tmp_path / "run") if "loss" in entry] == [20, 20, 20]


def test_the_log_has_the_mean_loss_since_its_last_line_and_the_last_steps_whatever_the_interval(tiny, tmp_path):
    logs = []
    for interval in (1, 4):
        cfg = tiny(f"every {interval}", log_interval=interval, max_steps=6)
        train.main(cfg)
        logs.append({entry["step"]: entry for entry in read_log(Path(cfg.out_dir)) if "loss" in entry})
    each, means = logs
    assert list(each) == [1, 2, 3, 4, 5, 6] and list(means) == [4, 6]
    assert means[4]["loss"] == pytest.approx(sum(each[step]["loss"] for step in (1, 2, 3, 4)) / 4, rel=1e-6)
    assert means[6]["loss"] == pytest.approx((each[5]["loss"] + each[6]["loss"]) / 2, rel=1e-6)
    assert [means[step]["lr"] for step in (4, 6)] == [train.learning_rate(step, cfg) for step in (3, 5)]


def test_another_network_is_named_by_its_differences(half_done, monkeypatch):
    folder, cfg = half_done
    build_model = train.build_model
    monkeypatch.setattr(train, "build_model", lambda cfg, source, device: build_model(
        cfg, SimpleNamespace(shape=source.shape, action_dim=3), device))
    with pytest.raises(UserError, match="of another network: action_dim was 0, now 3"):
        train.main(cfg)


def test_the_log_is_drawn(finished, tmp_path):
    pytest.importorskip("matplotlib")
    with Image.open(finished / "log.png") as picture:
        assert min(picture.size) > 500 and len(np.unique(picture.convert("L"))) > 50
    shutil.copy(finished / "log.jsonl", tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:         # a loss that was not finite is drawn as a gap
        file.write('{"step": 66, "loss": null, "grad_norm": null, "lr": 0.1, "frames_per_second": 3.0}\n')
    train.draw_log(tmp_path)
    assert (tmp_path / "log.png").exists()


def test_the_log_goes_to_tensorboard_too(tiny, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train.main(tiny(max_steps=3, tensorboard=True, checkpoint_interval=2, eval_interval=3))
    (tmp_path / "run" / "checkpoint.pt").unlink()           # so that the third step is done again
    train.main(tiny(max_steps=3, tensorboard=True, checkpoint_interval=2, eval_interval=3))
    events = accumulator.EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("loss")]
    (evaluated,) = (entry for entry in read_log(tmp_path / "run") if "sigmas" in entry)
    for sigma, errors in zip(evaluated["sigmas"], evaluated["first_and_later_error"]):
        for frames, error in zip(("first frame", "frames with context"), errors):
            (event,) = events.Scalars(f"error, {frames}/sigma {sigma:g}")
            assert event.step == 3 and event.value == pytest.approx(error, rel=1e-6)
    logged = [(entry["step"], entry["loss"]) for entry in read_log(tmp_path / "run") if "loss" in entry]
    assert [step for step, _ in written] == [1, 2, 3]
    np.testing.assert_allclose(written, logged, rtol=1e-6)


def test_a_missing_tensorboard_is_named(tiny, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        train.main(tiny(tensorboard=True))


@pytest.mark.parametrize("init_from", ["scratch", "nothing"])
def test_a_run_is_not_overwritten(half_done, init_from):
    folder, cfg = half_done
    cfg.init_from = init_from
    assert f"init_from={init_from}" in assert_refused(cfg, folder).replace("'", "")


def test_settings_that_do_not_touch_the_result_may_change(half_done, tmp_path, capsys):
    folder, cfg = half_done
    vars(cfg).update(log_interval=3, eval_interval=0, checkpoint_interval=7, eval_clips=3, eval_context=1,
                     eval_sigmas=(2.0,), picture_frames=2, picture_steps=1, accumulate=4,
                     out_dir=str(tmp_path / "moved"))
    shutil.move(folder, cfg.out_dir)
    train.main(cfg)
    assert "resuming" in capsys.readouterr().out


class Exploit:
    """A pickle that runs code when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("damage", ["truncated", "empty", "pickle", "torch pickle", "of another program"])
def test_a_damaged_or_foreign_checkpoint_is_refused_and_left_as_it_is(half_done, damage, tmp_path):
    folder, cfg = half_done
    path, code_ran = folder / "checkpoint.pt", tmp_path / "code_ran"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Exploit(code_ran), protocol=2))
    elif damage == "torch pickle":
        torch.save({**load(folder), "origin": Exploit(code_ran)}, path)
    else:
        torch.save({"weights": torch.zeros(3)}, path)
    assert str(path) in assert_refused(cfg, folder)
    assert not code_ran.exists()


def test_a_flipped_bit_is_noticed(half_done, tmp_path):
    """Wherever it is, but for the zeros between tensors, which nobody reads."""
    folder, _ = half_done
    path, expected = folder / "checkpoint.pt", load(folder)
    content, rng, refused = path.read_bytes(), random.Random(0), 0
    for position in rng.sample(range(len(content)), 60):
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            assert_same(sample.load_file(path, sample.CHECKPOINT_KEYS), expected)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 40


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_run_whose_newest_checkpoint_is_torn_goes_on_from_the_one_before(tiny, tmp_path, capsys, damage):
    changes = {"checkpoint_interval": 2, "max_steps": 6}
    train.main(tiny("whole", **changes))
    train.main(tiny("torn", **changes))
    path = tmp_path / "torn" / "checkpoint.pt"
    assert torch.load(path.with_name("checkpoint-previous.pt"), weights_only=True)["step"] == 4
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-1000])
    capsys.readouterr()
    train.main(tiny("torn", **changes))
    said = capsys.readouterr().out
    assert "checkpoint-previous.pt at step 4 of 6" in said and f"{path}" in said
    assert_same_run(tmp_path / "torn", tmp_path / "whole")
    assert torch.load(path.with_name("checkpoint-previous.pt"), weights_only=True)["step"] == 4    # not the damaged one
    aside = tmp_path / "torn" / "checkpoint-damaged.pt"
    assert aside.exists() == (damage == "truncated") and (not aside.exists() or aside.read_bytes() == content[:-1000])


def test_snapshots_of_steps_that_are_done_again_go_as_their_lines_of_the_log_do(tiny, tmp_path):
    folder = tmp_path / "run"
    train.main(tiny(checkpoint_interval=2))
    (folder / "checkpoint.pt").unlink()
    (folder / "ema-mine.pt").touch()
    train.main(tiny(checkpoint_interval=100, max_steps=5, lr=0.001, init_from="changed"))            # from step 4 on
    left = sorted(path.name for path in folder.glob("ema-*"))
    assert left == [*(f"ema-0000000{step}.pt" for step in (2, 4, 5)), "ema-mine.pt"]
    settings = [(entry["step"], entry["settings"]["lr"]) for entry in read_log(folder) if "settings" in entry]
    assert settings == [(0, train.lr), (4, 0.001)]


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(tiny, tmp_path):
    """kill -9 in the middle of steps and of saves; `KILLS=50 python -m pytest -k killed_at_random` tries harder.
    Whenever a run dies, its newest checkpoint can be read."""
    wanted = int(os.environ.get("KILLS", 4))
    changes = {"checkpoint_interval": 3, "max_steps": 24 * wanted, "ema_widths": (0.1,), "log_interval": 10}
    train.main(tiny("whole", **changes))
    rng, path, kills = random.Random(0), tmp_path / "killed" / "checkpoint.pt", 0
    while kills < wanted:
        child = os.fork()
        if child == 0:
            train.tqdm.set_lock(threading.RLock())          # else its end while it holds ours would be ours, too
            with open(os.devnull, "w") as nowhere, suppress(BaseException):
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
                train.main(tiny("killed", **changes))
            os._exit(0)
        time.sleep(rng.uniform(0.1, 0.5))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        newest = path if path.exists() else path.with_name("checkpoint-previous.pt")
        if newest.exists():
            assert 0 < torch.load(newest, weights_only=True)["step"] <= 24 * wanted
        if not os.WIFSIGNALED(status):
            break
    assert kills > 0
    train.main(tiny("killed", **changes))
    assert_same(load(tmp_path / "killed")["model"], load(tmp_path / "whole")["model"])
    assert_same(load(tmp_path / "killed")["optimizer"], load(tmp_path / "whole")["optimizer"])


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk(saves): during those saves (numbers, 0 is the first) no file may grow beyond 10 kB, by the kernel's
    own limit on file sizes."""
    size, limits = resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)
    handler, count, save = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), itertools.count(), train.Run.save

    def fill(saves):
        def limited(run):
            run.writer.wait()                                           # what was saved before it has its space
            full = next(count) in saves
            resource.setrlimit(size, (10_000, limits[1]) if full else limits)
            save(run)
        monkeypatch.setattr(train.Run, "save", limited)

    yield fill
    resource.setrlimit(size, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_failed_save_keeps_the_last_checkpoint_and_training_goes_on(tiny, tmp_path, full_disk, capsys):
    train.main(tiny("whole", checkpoint_interval=2))
    full_disk({1})
    train.main(tiny("full", checkpoint_interval=2))
    said = [line for line in capsys.readouterr().out.splitlines() if "training goes on" in line]
    assert len(said) == 1 and "checkpoint.pt cannot be written" in said[0]
    assert_same(load(tmp_path / "full")["model"], load(tmp_path / "whole")["model"])
    folder = tmp_path / "full"
    assert torch.load(folder / "checkpoint-previous.pt", weights_only=True)["step"] == 2
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_log_and_pictures_that_cannot_be_written_do_not_end_a_run(tiny, tmp_path, monkeypatch, capsys):
    """Folders are in their way, in that of the log from step 2 to step 4."""
    folder, kept = tmp_path / "run", tmp_path / "log.jsonl"

    def in_the_way():
        shutil.move(folder / "log.jsonl", kept)
        for name in ("log.jsonl", "log.png", "rollout-00000003.png"):
            (folder / name).mkdir()

    def out_of_the_way():
        (folder / "log.jsonl").rmdir()
        shutil.move(kept, folder / "log.jsonl")
    at_step(monkeypatch, 2, in_the_way)
    at_step(monkeypatch, 4, out_of_the_way)
    train.main(tiny(max_steps=5, eval_interval=3))
    said = capsys.readouterr().out
    assert all(f"{what}: " in said for what in ("log.jsonl", "the log's picture", "the picture of a rollout"))
    assert load(folder)["step"] == 5 and (folder / "rollout-00000005.png").is_file()
    assert [entry["step"] for entry in read_log(folder) if "loss" in entry] == [1, 2, 5]


def test_a_torn_line_of_the_log_and_other_noise_levels_do_not_end_a_run(tiny, tmp_path, monkeypatch, capsys):
    train.main(tiny(max_steps=2, eval_interval=2, eval_sigmas=(1.0,)))
    evaluate = train.Run.evaluate

    def tear(run):
        with open(run.folder / "log.jsonl", "a") as file:
            file.write('{"step": 3, "lo\n')
        evaluate(run)
    monkeypatch.setattr(train.Run, "evaluate", tear)
    train.main(tiny(max_steps=4, eval_interval=2, eval_sigmas=(1.0, 3.0), init_from="changed"))
    assert load(tmp_path / "run")["step"] == 4
    assert "training goes on" not in capsys.readouterr().out


@pytest.mark.parametrize("saves, steps", [({1, 2}, 8), ({2}, 6)])
def test_two_failed_saves_in_a_row_or_the_last_one_end_the_run_and_keep_what_there_is(tiny, tmp_path, full_disk, saves,
                                                                                      steps):
    full_disk(saves)
    with pytest.raises(UserError, match=r"checkpoint\.pt cannot be written"):
        train.main(tiny(checkpoint_interval=2, max_steps=steps))
    assert load(tmp_path / "run")["step"] == 2 * min(saves)


def test_a_checkpoint_of_another_version_is_refused(half_done):
    folder, cfg = half_done
    torch.save({**load(folder), "version": 99}, folder / "checkpoint.pt")
    assert "version 99" in assert_refused(cfg, folder)


def test_a_compiled_network_trains_alike_and_is_compiled_once(monkeypatch):
    """Traced, with its operations left as they are: weights that change must not make it be traced again."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    graphs = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    cfg = SimpleNamespace(**TINY, lr=0.01, decay="linear", grad_clip=1.0, sigma_data=0.5, P_mean=0.0, P_std=1.0,
                          seed=0, context_noise=0.1)
    losses = {}
    for name, prepare in (("eager", lambda model: model), ("compiled", train.compiled)):
        torch.manual_seed(0)
        model = Denoiser(ModelConfig(frame_shape=(1, 16, 16), patch_size=4, channels=16, channel_mults=(1,),
                                     head_dim=16, video_attn_resolutions=(4,), window=3))
        network, optimizer, counts = prepare(model), torch.optim.Adam(model.parameters()), []
        for step in range(4):
            clips = torch.randn(2, 5, 1, 16, 16, generator=torch.Generator().manual_seed(step))
            loss = train.loss_of(network, clips, None, train.draw_noise([0, 1], 1, clips.shape[1:], cfg, CPU), cfg)
            loss.backward()
            train.optimizer_step(model, optimizer, step, cfg)
            losses.setdefault(name, []).append(loss.item())
            counts.append(graphs["unique_graphs"])
    assert losses["compiled"] == pytest.approx(losses["eager"], abs=1e-4)
    assert counts[0] > 0 and counts[1] == counts[3]


def test_a_compiler_that_is_missing_is_named(tiny, monkeypatch):
    def fail(*_):
        raise InductorError(RuntimeError("no g++\nand more"), None)
    monkeypatch.setattr(train, "loss_of", fail)
    with pytest.raises(UserError, match=r"compiling failed .--compile needs a C\+\+ compiler.*no g\+\+") as caught:
        train.main(tiny(compile=True))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------
# Runs that go wrong


@pytest.mark.parametrize("clip, factor", [(0.5, 0.25), (10.0, 1.0)])
def test_gradients_longer_than_grad_clip_are_scaled_down_to_it(tiny, clip, factor):
    """Of a norm of 2, all weights' together, none of it along a weight."""
    cfg = tiny(grad_clip=clip)
    model, _, _ = build(cfg)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    model.project_gradients()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    given = [parameter.grad.mul_(2 / norm).clone() for parameter in model.parameters()]
    optimizer, taken = torch.optim.SGD(model.parameters()), []
    optimizer.register_step_pre_hook(lambda *_: taken.extend(p.grad.clone() for p in model.parameters()))
    assert train.optimizer_step(model, optimizer, 0, cfg) == pytest.approx(2, rel=1e-4)
    for one, other in zip(taken, given, strict=True):
        torch.testing.assert_close(one, other * factor, rtol=1e-3, atol=1e-7)


def plant(monkeypatch, factor, k):
    """Multiplies the loss of optimizer step k; returns the weights before each step and after the last."""
    loss_of, optimizer_step, weights = train.loss_of, train.optimizer_step, []

    def spoilt_loss(*arguments):
        return loss_of(*arguments) * (factor if len(weights) == k + 1 else 1)

    def watched_step(model, *arguments):
        norm = optimizer_step(model, *arguments)
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return norm

    def watched_start(model, *arguments):
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return ema(model, *arguments)

    ema = train.PowerEMA
    monkeypatch.setattr(train, "loss_of", spoilt_loss)
    monkeypatch.setattr(train, "optimizer_step", watched_step)
    monkeypatch.setattr(train, "PowerEMA", watched_start)
    return weights


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_with_a_gradient_that_is_not_finite_is_not_taken(tiny, tmp_path, monkeypatch, capsys, factor):
    weights = plant(monkeypatch, factor, 1)
    train.main(tiny(max_steps=4))
    assert_same(weights[1], weights[2])
    for one, other in ((0, 1), (2, 3), (3, 4)):
        assert any(not torch.equal(weights[one][name], weights[other][name]) for name in weights[0])
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert len(said) == 1 and said[0].startswith("step 1:")
    for path, leaf in leaves(load(tmp_path / "run")).items():
        assert not isinstance(leaf, torch.Tensor) or leaf.isfinite().all(), path


def test_a_run_ends_after_some_gradients_in_a_row_that_are_not_finite(tiny, tmp_path, monkeypatch, capsys):
    """The third such in a row ends it; two before, with a good one between, do not. The batch is named."""
    loss_of, calls, spoilt = train.loss_of, itertools.count(), {1, 3, 4, 5}
    monkeypatch.setattr(train, "loss_of", lambda *a: loss_of(*a) * (math.nan if next(calls) in spoilt else 1))
    with pytest.raises(UserError, match="step 5: 3 gradients in a row"):
        train.main(tiny(max_steps=8, max_skipped=3, checkpoint_interval=1))
    said = capsys.readouterr().out
    assert "clips 4 to 7" in said and "clips 20 to 23" in said and "clips 8 to 11" not in said
    assert all(p.isfinite().all() for p in load(tmp_path / "run")["model"].values())


def test_weights_that_are_not_finite_are_not_saved(tiny, tmp_path, monkeypatch):
    optimizer_step, calls = train.optimizer_step, itertools.count()

    def spoil(model, *arguments):
        norm = optimizer_step(model, *arguments)
        if next(calls) == 3:
            model.noise_emb.weight.data[0, 0] = math.nan
        return norm

    monkeypatch.setattr(train, "optimizer_step", spoil)
    with pytest.raises(UserError, match="step 4: weights are not finite"):
        train.main(tiny(checkpoint_interval=2, max_steps=8))
    assert load(tmp_path / "run")["step"] == 2


def test_the_log_remains_json_after_a_loss_that_is_not_finite(tiny, tmp_path, monkeypatch):
    plant(monkeypatch, math.nan, 1)
    train.main(tiny(max_steps=4))
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == [0, 1, 2, 3, 4]


def test_the_log_is_json_with_a_setting_that_is_not_finite(tiny, tmp_path):
    train.main(tiny(max_steps=1, grad_clip=math.inf))
    assert read_log(tmp_path / "run")[0]["settings"]["grad_clip"] is None


@pytest.mark.parametrize("key, value, named", [
    ("video_attn_resolutions", (3,), "attention resolution 3"),
    ("head_dim", 24, "head_dim 24"),
    ("patch_size", 5, "divisible by 5"),
    ("window", 0, "window=0"),
    ("accumulate", 3, "accumulate=3"),
    ("batch_size", 0, "batch_size=0"),
    ("seed", -1, "seed=-1"),
    ("seed", 2 ** 63, "seed=9223372036854775808"),
    ("warmup_steps", -5, "warmup_steps=-5"),
    ("P_mean", math.nan, "P_mean=nan"),
    ("P_std", math.inf, "P_std=inf"),
    ("lr", math.inf, "lr=inf"),
    ("grad_clip", math.nan, "grad_clip=nan"),
    ("eval_sigmas", (1.0, math.nan), "eval_sigmas=(1.0, nan)"),
    ("decay", "cosine", "cosine"),
    ("optimizer", "sgd", "sgd"),
    ("accumulate", 0, "accumulate=0"),
    ("grad_clip", 0.0, "grad_clip=0"),
    ("grad_clip", -1.0, "grad_clip=-1"),
    ("max_skipped", 0, "max_skipped=0"),
    ("eval_sigmas", (), "eval_sigmas=()"),
    ("ema_widths", (0.0,), "ema_widths=(0.0,)"),
    ("ema_widths", (0.5,), "ema_widths=(0.5,)"),
    ("channel_mults", (), "channel_mults=()"),
    ("patch_size", 0, "patch_size=0"),
    ("picture_steps", 0, "picture_steps=0"),
    ("sigma_data", 0.0, "sigma_data=0"),
    ("context_noise", -1.0, "context_noise=-1"),
    ("dropout", 1.5, "at most 1"),
    ("device", "abacus", "abacus"),
    ("device", "meta", "'meta' cannot be used"),
    ("dataset", "video", "digits"),
    ("dataset", "vidoe", "vidoe"),
])
def test_a_setting_that_cannot_work_is_one_line_that_names_it(tiny, tmp_path, key, value, named):
    with pytest.raises(UserError) as error:
        train.main(tiny(**{key: value}))
    assert named in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("dataset, own", [
    ("digits", {"digits", "digit_size", "speed", "whole_pixels", "bounce"}),
    ("world", {"digits", "digit_size", "speed", "canvas_size", "action_dropout"}),
    ("video", {"stride", "flip", "action_dropout"})])
def test_what_a_dataset_makes_no_use_of_is_told(dataset, own, tiny, monkeypatch, capsys):
    changes = {"digits": 3, "digit_size": 11, "stride": 2, "flip": True, "action_dropout": 0.5, "speed": (1.5, 2.0),
               "canvas_size": 99, "whole_pixels": False, "bounce": "random"}
    train.check_settings(tiny(dataset=dataset, frame_size=48, **changes))
    told = capsys.readouterr().out
    assert told.startswith(f"dataset={dataset} makes no use of ")
    assert set(told.split(" of ")[1].strip().split(", ")) == changes.keys() - own
    monkeypatch.setenv("RANK", "1")
    train.check_settings(tiny(dataset=dataset, **changes))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("frames, told", [(5, "frames=5: no frame will see window=6 frames\n"), (6, "")])
def test_clips_shorter_than_the_window_are_told(tiny, frames, told, capsys):
    train.check_settings(tiny(frames=frames, window=6, picture_frames=5))
    assert capsys.readouterr().out == told
    train.check_settings(tiny(frames=frames, window=6, picture_frames=5, video_attn_resolutions=""))
    assert capsys.readouterr().out == ""
    train.check_settings(tiny(frames=frames, window=2, temporal_kernel=6, picture_frames=5))
    assert ("temporal_kernel=6" in capsys.readouterr().out) == (frames < 6)


def test_fewer_channels_than_a_patch_has_values_are_refused(tiny, tmp_path):
    """They cannot carry its noise, which would stay in every frame: seen on RGB patches of 4 x 4 in 32 channels."""
    train.build_model(tiny(), open_source(tiny(), "val"), CPU)           # 16 in 16
    with pytest.raises(UserError, match="16 values, and 8 channels"):
        train.main(tiny(channels=8, head_dim=8))


def test_heads_too_small_for_a_gpus_attention_are_refused_there_alone(tiny, monkeypatch):
    cfg = tiny(head_dim=8, video_attn_resolutions=(4,), window=3)
    source = open_source(cfg, "val")
    train.build_model(cfg, source, CPU)
    with pytest.raises(UserError, match="head_dim=8.*16"):
        train.build_model(cfg, source, torch.device("cuda"))
    monkeypatch.setattr(train.Denoiser, "to", lambda model, device: model)
    for changes in ({"head_dim": 16}, {"window": 1}, {"video_attn_resolutions": ()}):
        train.build_model(SimpleNamespace(**vars(cfg) | changes), source, torch.device("cuda"))


def test_a_folder_that_cannot_be_written_is_one_line_that_names_it(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file" / "run", Path("/proc/run")):       # /proc: nobody may make a folder there
        with pytest.raises(UserError, match=f"{folder}.* cannot be written"):
            train.main(tiny(out_dir=str(folder)))


@pytest.mark.parametrize("limit", ["frames=3 eval_context=3", "picture_frames=1", "eval_clips=0", "ema_widths=()",
                                   "log_interval=0", "checkpoint_interval=0", "max_steps=0"])
def test_a_setting_at_its_limit_works_or_is_refused_before_training(tiny, tmp_path, limit):
    folder, changes = tmp_path / "run", dict(part.split("=") for part in limit.split())
    try:
        train.main(tiny(**{"max_steps": 2, "eval_interval": 2} | changes))
    except UserError as error:
        assert any(key in str(error) for key in changes)
        assert not (folder / "checkpoint.pt").exists()
        assert not (folder / "log.jsonl").exists() or read_log(folder)[-1]["step"] == 0
    else:
        assert load(folder)["step"] == int(changes.get("max_steps", 2))
        read_log(folder)
