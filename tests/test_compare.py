"""The older regimes pass what their names say, and the comparison measures what its tables say."""

import itertools
import json
import math
from types import SimpleNamespace

import compare
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from regimes import REGIMES, BothWaysConv
from test_train import write_digits

import train
from config import UserError, plain_settings
from data import CanvasWorld, load_batch, open_source
from model import Cache, Sequence, border_gain

SMALL = {"frames": 6, "frame_size": 16, "digit_size": 10, "channels": 16, "channel_mults": (1, 2), "head_dim": 16,
         "patch_size": 2, "window": 4, "noised_copies": 1, "eval_clips": 2, "batch_size": 2, "context_noise": 0.0,
         "device": "cpu", "shorter": (), "regimes": ("last", "whole"), "gflop": 3.0, "points": 2, "canvas_size": 32}


@pytest.fixture
def cfg(tmp_path):
    settings = plain_settings(compare.DEFAULTS | vars(compare)) | SMALL
    folders = {"data_dir": str(write_digits(tmp_path / "mnist")), "out": str(tmp_path / "out")}
    return SimpleNamespace(**settings | folders)


@pytest.fixture
def model_of(cfg):
    """A regime's network with random output gains, so that all of it counts."""
    def make(name):
        torch.manual_seed(0)
        model = compare.build(name, cfg, open_source(cfg, "train"))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.fill_(0.5)
        return model
    return make


def noised_pass():
    """x 2 2 6 1 16 16 and sigma 2 2 6, as train.clean_and_noised gives them."""
    g = torch.Generator().manual_seed(1)
    clips, noise = torch.randn(2, 6, 1, 16, 16, generator=g), torch.randn(2, 1, 6, 1, 16, 16, generator=g)
    return train.clean_and_noised(clips / 2, torch.rand(2, 1, 6, generator=g) + 0.3, noise)


@torch.no_grad()
def readers(model, copy, t):
    """The frames whose denoised result changes, and those for which it does not, bit for bit, when frame `t` of the
    clean (0) or the noised copy (1) does."""
    x, sigma = noised_pass()
    before, changed = model(x, sigma)[0], x.clone()
    changed[:, copy, t] += 1
    difference = (model(changed, sigma)[0] - before).abs().amax(dim=(0, 1, 3, 4, 5))
    return {i for i, value in enumerate(difference.tolist()) if value > 0}


# ------------------------------------------------------------------------------------------------
# What each regime's training pass sees


def test_the_frames_of_a_whole_clip_all_see_each_other_and_no_clean_copy(model_of):
    model = model_of("whole").train()
    assert readers(model, copy=1, t=0) == readers(model, copy=1, t=5) == set(range(6))
    assert readers(model, copy=0, t=2) == set()


def test_independently_noised_frames_see_the_noised_frames_before_them(model_of):
    model = model_of("independent").train()
    assert readers(model, copy=1, t=3) == {3, 4, 5}
    assert readers(model, copy=0, t=3) == set()


@pytest.mark.parametrize("name,k", [("stack1", 1), ("stack4", 4)])
def test_stacking_sees_k_clean_frames_and_forgets_what_is_older(model_of, name, k):
    model = model_of(name).train()
    assert readers(model, copy=0, t=0) == set(range(1, k + 1))
    assert readers(model, copy=1, t=2) == {2}


@pytest.mark.parametrize("name", REGIMES)
def test_all_are_evaluated_given_the_clean_past_alone(model_of, name):
    model = model_of(name).eval()
    x, sigma = noised_pass()
    assert readers(model, copy=0, t=2) - {4, 5} == {3}
    assert readers(model, copy=1, t=2) == ({0, 1, 2} if name == "whole" else {2})        # its future is noised too


def test_a_whole_clips_convolution_is_a_3d_one_over_the_frames_before_at_and_after():
    conv, x = BothWaysConv(5, 7, 3), torch.randn(2 * 6, 5, 4, 4)
    out = conv(x, torch.ones(12, 7), Sequence(1, 6)).unflatten(0, (2, 6))
    volume, weight = x.unflatten(0, (2, 6)).transpose(1, 2), conv.weight.transpose(1, 2)[:, :, [1, 0, 2]]
    expected = F.conv3d(volume, weight, padding=1).transpose(1, 2) / conv.fan_in ** 0.5 * border_gain(4, 4)
    expected[:, [0, -1]] *= 1.5 ** 0.5
    assert torch.allclose(out, expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# The losses are ours, of other frames


def test_the_last_frames_loss_is_ours_of_the_last_frame(model_of, cfg):
    ours, last = model_of("ours"), model_of("last")
    last.load_state_dict(ours.state_dict())
    clips = noised_pass()[0][:, 0]
    noise = train.draw_noise([0, 1], 1, clips.shape[1:], cfg, torch.device("cpu"))
    frame_by_frame = []

    def restricted(x, sigma, actions):
        denoised, u = ours(x, sigma, actions)
        frame_by_frame.append((denoised[:, :, -1:], u[:, :, -1:]))
        return denoised, u
    train.loss_of(restricted, clips, None, noise, cfg)
    expected = train.loss_of(lambda *_: frame_by_frame[0], clips[:, -1:], None, [z[:, :, -1:] for z in noise], cfg)
    assert torch.allclose(last.loss(clips, None, noise, cfg), expected, rtol=1e-5)
    expected.backward()
    last.loss(clips, None, noise, cfg).backward()
    for (name, a), b in zip(last.named_parameters(), ours.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5), name


def test_a_whole_clip_has_one_noise_level(model_of, cfg, monkeypatch):
    model, seen = model_of("whole"), []
    monkeypatch.setattr(model, "forward", lambda x, sigma, actions: seen.append(sigma) or (x[:, 1:], 0 * sigma[:, 1:]))
    noise = train.draw_noise([0, 1], 1, (6, 1, 16, 16), cfg, torch.device("cpu"))
    model.loss(torch.zeros(2, 6, 1, 16, 16), None, noise, cfg)
    assert torch.equal(seen[0][:, 1], seen[0][:, 1, :1].expand(-1, 6)) and len(seen[0][:, 1].unique()) == 2


def test_the_last_frame_is_cheaper_than_a_pass_over_noised_frames_and_dearer_than_one_frame(cfg):
    cost = {name: compare.clip_flops(name, cfg, open_source(cfg, "train")) for name in REGIMES}
    assert cost["ours"] / 12 < cost["last"] < cost["independent"] < cost["ours"]
    assert cost["stack4"] < cost["ours"]


# ------------------------------------------------------------------------------------------------
# Step by step, and in one pass


@pytest.mark.parametrize("name", ["last", "independent", "stack1", "stack4"])
def test_a_rollouts_step_is_the_evaluations_pass(model_of, name):
    model, cache = model_of(name).eval(), Cache()
    model.past_sigma = max(model.told)
    x, sigma = noised_pass()
    expected = model(x, sigma)[0][:, 0]
    for t in range(6):
        denoised = model.step(x[:, 1, t:t + 1], sigma[:, 1, t:t + 1], cache)[:, 0]
        assert torch.allclose(denoised, expected[:, t], atol=1e-4)
        model.read(x[:, 0, t:t + 1], torch.zeros(2, 1), cache)


# ------------------------------------------------------------------------------------------------
# Figures


def test_identical_images_are_perfect_and_metrics_are_what_they_say():
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 3, 16, 20)), rng.random((2, 3, 16, 20))
    same, other = compare.frame_metrics(x, x), compare.frame_metrics(x, y)
    assert np.allclose(same["SSIM"], 1) and not same["MSE"].any() and not same["MAE"].any()
    assert np.allclose(other["MSE"][0], sum(((x[0, t] - y[0, t]) ** 2).sum() for t in range(3)) / 3)
    assert np.allclose(other["MAE"][1], sum(abs(x[1, t] - y[1, t]).sum() for t in range(3)) / 3)
    mse = [((x[0, t] - y[0, t]) ** 2).sum() / 320 for t in range(3)]
    assert np.allclose(other["PSNR"][0], np.mean(10 * np.log10(1 / np.array(mse))))


def test_similarity_in_one_window_is_its_formula():
    rng = np.random.default_rng(0)
    x, y = rng.random((7, 7)), rng.random((7, 7))
    mx, my = x.mean(), y.mean()
    (vx, cov), (_, vy) = np.cov(x.ravel(), y.ravel())
    luminance = (2 * mx * my + 0.01 ** 2) / (mx ** 2 + my ** 2 + 0.01 ** 2)
    assert np.isclose(compare.ssim(x, y), luminance * (2 * cov + 0.03 ** 2) / (vx + vy + 0.03 ** 2))


def test_the_best_of_the_samples_is_chosen_clip_by_clip():
    truth = np.zeros((2, 1, 16, 16))
    made = np.stack([np.stack([truth[0], truth[1] + 1]), np.stack([truth[0] + 0.5, truth[1] + 0.5])])
    rows = {row[0]: row[1:] for row in compare.protocol_rows(made, truth, truth[:, 0] + 2)}
    assert float(rows["one sample"][0]) == 96               # of 0, 256, 64 and 64
    assert float(rows["black"][0]) == 0 and float(rows["the last given frame"][0]) == 1024
    assert float(rows["mean of 2 samples"][0]) == 256 * (0.25 ** 2 + 0.75 ** 2) / 2
    assert float(rows["best of 2, by MSE"][0]) == 32


def test_the_future_is_open_from_the_first_wall_on(cfg):
    """Up to there a digit that is sent anywhere moves as one that is mirrored, and mostly not after it."""
    cfg = SimpleNamespace(**vars(cfg) | {"frames": 12, "speed": (1.0, 1.5)})             # walls are met exactly
    mirrored, sent = (open_source(SimpleNamespace(**vars(cfg) | {"bounce": to}), "val")
                      for to in ("reflect", "random"))
    same = np.stack([(mirrored.clip(i)[0] == sent.clip(i)[0]).all((1, 2, 3)) for i in range(60)])
    inside = [i for i in range(60) if same[i, 1]]           # others began at a wall, and were sent off from it
    met, same = np.stack([compare.walls_met(sent, i, 2) for i in inside]), same[inside, 2:]
    assert same[~met].all() and same[met].mean() < 0.5 and 0.2 < met.mean() < 0.95


def test_other_futures_are_the_same_until_a_wall_is_met_and_may_differ_from_then_on(cfg):
    cfg = SimpleNamespace(**vars(cfg) | {"frames": 12, "speed": (1.0, 1.5), "bounce": "random"})
    source = open_source(cfg, "val")
    clips, one, other = (np.stack([s.clip(i)[0] for i in range(40)]) for s in
                         (source, compare.OtherFutures(cfg, "val", 4, 0), compare.OtherFutures(cfg, "val", 4, 1)))
    met = np.stack([compare.walls_met(source, i, 4) for i in range(40)])
    for a, b in ((clips, one), (one, other)):
        same = (a == b).all((2, 3, 4))
        assert same[:, :4].all() and same[:, 4:][~met].all() and 0.1 < same[:, 4:][met].mean() < 0.7


def test_samples_are_told_apart_where_the_future_is_open():
    truth = np.zeros((2, 1, 16, 16))
    made = np.stack([truth + 1, np.stack([truth[0] + 1, truth[1] + 3])])
    header, row = compare.stochastic_rows(made, 2 * made, truth, np.array([[False], [True]]), 0.5)
    assert row == ["1", "1", "0.000", "0.000", "2.000", "2.000", "2.000",
                   "1", "8.000", "32.000", "10.000", "8.000", "2.000"]
    assert len(header) == len(row)


def test_gaps_count_frames_since_a_place_was_in_view(cfg):
    assert compare.gaps(np.array([[[0, 1]], [[1, 2]], [[1, 2]], [[0, 1]]])).tolist() == \
        [[[0, 0]], [[1, 0]], [[1, 1]], [[3, 1]]]
    cfg = SimpleNamespace(**vars(cfg) | {"speed": (4.0, 4.0)})
    frames, places = CanvasWorld(cfg, "val").clip(3)[0][:, 0], compare.Places(cfg, "val").clip(3)[0][:, 0]
    canvas = np.full(places.max() + 1, -1)
    canvas[places] = frames
    assert places.max() > 255 and np.array_equal(canvas[places], frames)  # a place looks the same whenever it is seen


def test_memory_is_the_error_of_what_was_last_seen_so_long_ago(cfg):
    world = {"dataset": "world", "speed": (4.0, 4.0), "digits": 9, "memory_frames": 12, "eval_clips": 12}
    cfg = SimpleNamespace(**vars(cfg) | world)
    stats = {"mean": [0.1], "std": [0.2]}

    def answers(shift):
        """Who gives back the clean frame `shift` frames ago."""
        return lambda x, sigma, actions: (x[:, :1].roll(shift, dims=2), None)
    right, late = (compare.memory(answers(shift), stats, cfg, torch.device("cpu"))["memory"] for shift in (0, 1))
    known = [i for i, error in enumerate(right["error"]) if not math.isnan(error)]
    assert known[:3] == [0, 1, 2] and known[-1] == len(compare.GAPS) - 1
    assert sum(right["frames' worth of pixels"]) == pytest.approx(12 * 11, abs=5)
    assert not any(right["error"][i] for i in known) and all(right["black"][i] > 0 for i in known)
    assert [late["error"][i] for i in known] == [right["copy of the last frame"][i] for i in known]


def test_the_picture_of_memory_shows_errors_alone():
    from matplotlib.figure import Figure
    errors = {"copy of the last frame": [1.5] * 10, "black": [1.1] * 10, "error": [0.2] * 10}
    figure = Figure()
    memory = {"frames' worth of pixels": [500] * 10} | errors
    compare.draw_memory(figure, [{"title": "ours", "memory": memory, "settings": {"window": 12}}])
    (axis,) = figure.axes
    assert [line.get_label() for line in axis.lines] == ["copy of the last frame", "black", "ours"]
    assert [max(line.get_ydata()) for line in axis.lines] == [1.5, 1.1, 0.2] and axis.get_ylim()[1] < 2


def test_cost_to_reach_an_error_lies_on_the_line_between_two_points():
    curve = [(1, 0.8), (4, 0.4), (16, 0.1)]
    assert compare.cost_to_reach(0.2, [curve]) == (pytest.approx(8), False)
    assert compare.cost_to_reach(0.9, [curve]) == (1, True)
    assert compare.cost_to_reach(0.05, [curve]) == (math.inf, False)
    assert compare.cost_to_reach(0.2, [curve, [(2, 0.1)]])[0] == 2


# ------------------------------------------------------------------------------------------------
# The command


def test_a_checkpoint_is_evaluated_by_the_protocol(cfg, tmp_path, capsys):
    run = train.Run(SimpleNamespace(**vars(cfg) | {"out_dir": str(tmp_path / "run")}))
    run.save()
    run.writer.wait(final=True)
    cfg.checkpoint, cfg.clips, cfg.samples = str(run.path), 3, 2
    compare.evaluate_protocol(cfg, torch.device("cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert "not to be put beside them" in lines[-9]
    table = [line.split(" | ") for line in lines[-8:-1]]
    assert [row[0] for row in table[2:]] == ["| one sample", "| mean of 2 samples", "| best of 2, by MSE",
                                             "| the last given frame", "| black"]
    assert 0 < float(table[4][1]) <= float(table[2][1]) < 256


def test_only_ours_with_context_noise_has_any(cfg):
    cfg.context_noise = 0.3
    noise = {name: (vars(cfg) | changes(cfg))["context_noise"] for name, (_, _, changes) in REGIMES.items()}
    assert noise.pop("ours_noise") == 0.3 and set(noise.values()) == {0}


def test_long_rollouts_are_judged_of_all_but_whole_clips(cfg, monkeypatch, capsys):
    """By a judge that sees the digit of the first clip alone; ink of the given frames is the truth's."""
    def judged(settings, count, seed):
        truth = load_batch(open_source(settings, "val"), range(count))[0]
        return truth, torch.arange(count), lambda frames: torch.eye(10)[:1].expand(len(frames), -1)
    monkeypatch.setattr(compare.drift, "judged", judged)
    monkeypatch.setattr(compare.drift, "read_labels", lambda *_: None)
    cfg.drift_frames = 9
    compare.main(cfg)
    entries = {name: json.loads(next(compare.Path(cfg.out).glob(f"*{name}*")).read_text()) for name in cfg.regimes}
    assert "drift" not in entries["whole"]
    found = entries["last"]["drift"]
    assert found["identity"] == [0.5] * 9 and found["ink"][0] == 1
    ink = judged(SimpleNamespace(**vars(cfg) | {"frames": 9}), 2, 0)[0].double().mean((2, 3, 4))
    expected = (ink / ink[:, :1]).mean(0)[:cfg.eval_context].tolist()
    assert np.allclose(found["ink"][:cfg.eval_context], expected) and len(found["ink"]) == 9
    assert "\nlast frame only\n" in capsys.readouterr().out


@pytest.mark.parametrize("changes,message", [({"digits": 2}, "2 digits"), ({"dataset": "world"}, "dataset world"),
                                             ({}, "labels")], ids=str)
def test_long_rollouts_that_cannot_be_judged_are_refused_before_training(cfg, monkeypatch, changes, message):
    monkeypatch.setattr(compare, "train_entry", lambda *_: pytest.fail("trained first"))
    monkeypatch.setattr(compare.drift, "download", lambda name, *_, **__: compare.require(False, f"{name} not there"))
    cfg = SimpleNamespace(**vars(cfg) | {"drift_frames": 9} | changes)
    with pytest.raises(UserError, match=message):
        compare.main(cfg)


@pytest.mark.parametrize("changes", [{"eval_clips": 3}, {"eval_context": 3}, {"memory_frames": 20}], ids=str)
def test_entries_that_were_evaluated_in_another_way_are_refused(cfg, monkeypatch, changes):
    monkeypatch.setattr(compare, "train_entry", lambda *_: {"title": "made before"})
    assert compare.finished_entry("ours", cfg, torch.device("cpu"))["title"] == "made before"
    with pytest.raises(UserError, match=f"{next(iter(changes))}.*--out"):
        compare.finished_entry("ours", SimpleNamespace(**vars(cfg) | changes), torch.device("cpu"))


def test_minutes_make_as_many_steps_as_their_first_ones_let_expect(cfg, monkeypatch, capsys):
    """On a clock that gains half a second each time somebody looks, which is twice a step."""
    ticks = itertools.count()
    monkeypatch.setattr(compare.time, "perf_counter", lambda: next(ticks) / 2)
    cfg.minutes, cfg.regimes, cfg.shorter = 4 / 60, ("ours", "last"), (0.5,)
    compare.main(cfg)
    entries = {path.stem: json.loads(path.read_text()) for path in compare.Path(cfg.out).iterdir()}
    steps = {name: entry["curve"][-1]["step"] for name, entry in entries.items()}
    assert steps == {"digits-ours-0.0666667min": 8, "digits-last-0.0666667min": 8, "digits-ours-0.0333333min": 4}
    assert "time of ours to be there" in capsys.readouterr().out
    assert {entry["curve"][-1]["seconds"] for entry in entries.values()} == {4, 2}


def test_finished_entries_are_kept_and_other_settings_refused(cfg, monkeypatch, capsys):
    compare.main(cfg)
    table = "| regime " + capsys.readouterr().out.partition("| regime ")[2]
    assert "| last frame only " in table and "| whole clip " in table
    entry = json.loads(next(compare.Path(cfg.out).glob("*whole*")).read_text())
    assert len(entry["curve"]) == 2 and len(entry["rollout"]) == 2 and entry["curve"][-1]["gflop"] > 2

    def not_again(*_):
        raise AssertionError("trained again")
    monkeypatch.setattr(compare, "train_entry", not_again)
    compare.main(cfg)
    assert capsys.readouterr().out == table                 # and nothing before it
    lr, cfg.lr = cfg.lr, 0.011
    with pytest.raises(UserError, match=r"lr.*--out"):
        compare.main(cfg)
    cfg.regimes, cfg.lr = ("last", "ours"), lr
    with pytest.raises(AssertionError, match="trained again"):
        compare.main(cfg)


def test_other_regimes_are_given_vectors_of_actions_in_the_same_scale(cfg, vectors_of_thousands):
    cfg.dataset, cfg.digits, cfg.speed, cfg.gflop, cfg.points = "world", 3, (4.0, 4.0), 1.0, 1
    for name in ("last", "whole"):
        del vectors_of_thousands[:]
        compare.train_entry(name, cfg, torch.device("cpu"))
        counted, *rest = vectors_of_thousands               # operations are counted first, whatever the numbers
        assert len(rest) > 3 and all(1 < actions.abs().max() < 2 for actions in rest)
