"""Compares ways to train: the same network, data, optimizer and compute under older regimes (tests/regimes.py).

    python tests/compare.py --plot=compare.png                                      # sample efficiency, on digits
    python tests/compare.py --gflop=43200 --drift_frames=1000 --plot=drift.png      # ... and long rollouts
    python tests/compare.py --minutes=10 --out=out/ten                              # ... for as long each
    python tests/compare.py config/memory.py --regimes=ours,stack4 --gflop=40000    # memory, in a world
    python tests/compare.py --protocol --checkpoint=out/two/checkpoint.pt           # Moving MNIST, 10 frames given 10

The yardstick is `gflop`, the counted operations of a training run, or with --minutes=10 its time. Every regime is then
asked for the same: frames denoised given their clean past, and the continuation of given frames. Context noise is 0 for
all but "ours_noise": stacking could not be told of it.
An entry that is finished is a file in `out`, and is not done again.
"""
import importlib.util
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import drift
import numpy as np
import torch
from bench import count_flops
from regimes import REGIMES, WholeClip
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sample
import train
from config import UserError, plain_settings, read_file, run
from data import (
    Batches,
    CanvasWorld,
    MovingDigits,
    load_batch,
    measure,
    open_source,
    random_digit,
    replacing,
    require,
    to_network,
    to_pixels,
    unit_actions,
)
from model import ModelConfig

# -- what to compare
data_dir = ""                   # folder of the MNIST files; empty: data/mnist, or of the checkpoint's run
regimes = ("ours", "ours_noise", "ours4", "last", "stack1", "stack4", "whole", "independent")      # any of these
gflop = 10800.0                 # counted operations of each training run, 1e9; about 600 steps of ours
minutes = 0.0                   # instead: time of each training run, by the speed of its first steps; 0: by gflop
shorter = (0.5, 0.25, 0.125)    # shares of it that ours is trained for too, its learning rate decaying in time
points = 6                      # evaluations per run, each at twice the compute of the one before
drift_frames = 0                # of digits: frames of a long rollout of each held-out clip; 0: none
memory_frames = 24              # of a world: frames per held-out clip, more than `window`
out = "out/compare"             # folder of the results, one JSON file per entry
plot = ""                       # picture of error against compute, or of memory, by matplotlib; empty: none
# -- the standard evaluation of a checkpoint
protocol = False                # Moving MNIST's, instead of training: 10 frames given, 10 predicted
checkpoint = ""                 # file to evaluate, or a folder with its newest checkpoint.pt; empty: out/
clips = 256                     # held-out clips
samples = 10                    # samples per clip, for their mean and the best of them

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = dict(vars(train)) | read_file(str(ROOT / "config/mnist.py"))
SAMPLER = {"levels": sample.noise_levels(6), "seed": 0}


# ---------------------------------------------------------------------------------------------------
# An entry: a regime trained for the budget, evaluated on the way.

def build(name, cfg, source):
    _, network, _ = REGIMES[name]
    fields = {field: getattr(cfg, field) for field in ModelConfig.__dataclass_fields__ if hasattr(cfg, field)}
    return network(ModelConfig(**fields, frame_shape=tuple(source.shape), action_dim=source.action_dim))


def clip_flops(name, cfg, source):
    """Operations of the loss and its gradients for one clip, counted on a CPU."""
    model, (frames, actions) = build(name, cfg, source), load_batch(source, range(1))
    noise = train.draw_noise([0], cfg.noised_copies, frames.shape[1:], cfg, torch.device("cpu"))
    return count_flops(lambda: model.loss(frames.float() / 255, actions, noise, cfg).backward())


def train_step(model, optimizer, batch, step, stats, cfg):
    numbers, frames, actions = batch
    frames = to_network(frames, stats, cfg.sigma_data)
    noise = train.draw_noise(numbers, cfg.noised_copies, frames.shape[1:], cfg, frames.device)
    model.loss(frames, unit_actions(actions, stats), noise, cfg).backward()
    train.optimizer_step(model, optimizer, step - 1, cfg)   # its gradient norm waits for the GPU


def start(name, cfg, source, device):
    """A network of the regime, its weights a function of the seed, and its optimizer."""
    torch.manual_seed(cfg.seed)
    model = build(name, cfg, source).to(device)
    model.dtype = sample.compute_dtype(device)
    return model, train.make_optimizer(model, cfg)


def seconds_of_a_step(name, cfg, source, stats, device, steps=12):
    """The median of a network's first steps, which is not trained on."""
    model, optimizer = start(name, cfg, source, device)
    cfg, times = SimpleNamespace(**vars(cfg) | {"max_steps": steps}), []
    with Batches(source, cfg.batch_size, device) as batches:
        for step in range(1, steps + 1):
            began = time.perf_counter()
            train_step(model, optimizer, next(batches), step, stats, cfg)
            times.append(time.perf_counter() - began)
    return float(np.median(times))


def train_entry(name, cfg, device):
    """{curve: [an evaluation each], ..}, trained for cfg.gflop or cfg.minutes."""
    title, _, changes = REGIMES[name]
    cfg = SimpleNamespace(**vars(cfg) | changes(cfg))
    source, held_out = open_source(cfg, "train"), open_source(cfg, "val")
    stats, step_gflop = measure(source), clip_flops(name, cfg, source) * cfg.batch_size / 1e9
    cfg.max_steps = max(1, round(60 * cfg.minutes / seconds_of_a_step(name, cfg, source, stats, device)
                                 if cfg.minutes else cfg.gflop / step_gflop))
    model, optimizer = start(name, cfg, source, device)
    ema, seconds, curve = train.PowerEMA(model, cfg.ema_widths[:1]), 0.0, []
    (average,) = ema.averages.values()
    supervised = cfg.batch_size * cfg.noised_copies * (1 if name == "last" else source.frames)
    due = {max(1, cfg.max_steps >> i) for i in range(cfg.points)}
    with Batches(source, cfg.batch_size, device) as batches:
        for step in tqdm(range(1, cfg.max_steps + 1), desc=title, disable=None):
            began = time.perf_counter()
            train_step(model, optimizer, next(batches), step, stats, cfg)
            ema.update(step)
            seconds += time.perf_counter() - began
            if step in due:
                averaged = train.averaged_model(build(name, cfg, source), model, average, device)
                errors = evaluate(averaged, held_out, stats, cfg, device)
                curve.append({"step": step, "gflop": step * step_gflop, "seconds": seconds,
                              "supervised_frames": step * supervised, **errors})
                tqdm.write(f"{title}: {json.dumps(curve[-1])}")
    averaged.eval().past_sigma = curve[-1]["past_sigma"]
    final = memory(averaged, stats, cfg, device) if cfg.dataset == "world" else \
        {"rollout": rollout_error(averaged, held_out, stats, cfg, device)}
    if cfg.drift_frames and name != "whole":                # a whole clip cannot become longer
        final["drift"] = long_rollouts(averaged, stats, cfg, device)
    return {"regime": name, "title": title, "batch_size": cfg.batch_size, "lr": cfg.lr,
            "sigmas": list(cfg.eval_sigmas), "origin": source.origin, "curve": curve, **final}


# ---------------------------------------------------------------------------------------------------
# Experiment 1, sample efficiency: denoising error given the clean past, and error of the continuation.

def mean_error(errors):
    """Geometric: each noise level counts alike. inf if the run diverged."""
    errors = np.array(errors, float)                        # a file has null for what is not finite
    return float(np.exp(np.mean(np.log(errors)))) if np.isfinite(errors).all() else math.inf


@torch.no_grad()
def evaluate(model, held_out, stats, cfg, device):
    """Errors over the data variance per noise level, of frames with `eval_context` or more before them; for regimes
    that never saw a clean past also in their own way, all frames at one level."""
    def errors(training=False, told=0.0):
        model.train(training).past_sigma = told
        return [later for _, later in train.error_table(model, held_out, stats, cfg, device)]
    own_way = {"own_way": errors(training=True)} if len(model.told) > 1 else {}
    by_told = {told: errors(told=told) for told in model.told}
    best = min(by_told, key=lambda told: mean_error(by_told[told]))
    return {"error": by_told[best], "past_sigma": best, **own_way}


def rolled_out(model, clips, frames, stats, cfg, actions=None):
    """uint8 b t c h w: the first `eval_context` frames of the clips on `model`'s device, then its own."""
    settings = SAMPLER | {"context_noise": cfg.context_noise / 2}
    made = sample.roll_out(model, clips, cfg.eval_context, frames, stats, settings, actions)
    return torch.from_numpy(np.stack(list(made), axis=1))


def rollout_error(model, held_out, stats, cfg, device):
    """Squared error over the data variance of each frame after the first `eval_context`, against the true one."""
    clips, actions = load_batch(held_out, range(cfg.eval_clips))
    clips, actions = clips.to(device), None if actions is None else actions.to(device)
    given, truth = cfg.eval_context, to_network(clips, stats, cfg.sigma_data)
    if isinstance(model, WholeClip):
        made = model.go_on(truth[:, :given], clips.shape[1], unit_actions(actions, stats), **SAMPLER)
        made = to_pixels(made, stats, cfg.sigma_data)
    else:
        made = rolled_out(model, clips, clips.shape[1], stats, cfg, actions).to(device)[:, given:]
    error = (to_network(made, stats, cfg.sigma_data) - truth[:, given:]).square().mean(dim=(0, 2, 3, 4))
    return (error / cfg.sigma_data ** 2).tolist()


def long_rollouts(model, stats, cfg, device):
    """{figure: a number per frame}, as tests/drift.py measures how shapes and ink hold."""
    settings = SimpleNamespace(**vars(cfg) | {"frames": cfg.drift_frames})
    truth, labels, net = drift.judged(settings, cfg.eval_clips, seed=0)
    return drift.measure(rolled_out(model, truth.to(device), cfg.drift_frames, stats, cfg), truth, labels, net)


def cost_to_reach(error, curves):
    """The cost at which the first of the curves, of (cost, error) each, comes down to the error, between points by a
    straight line in logarithms; inf: none does. The second value: it was there at its first point already."""
    reached = [(math.inf, False)]
    for curve in curves:
        i = next((i for i, (_, value) in enumerate(curve) if value <= error), None)
        if i == 0:
            reached.append((curve[0][0], True))
        elif i:
            (before, above), (after, below) = curve[i - 1:i + 1]
            share = math.log(above / error) / math.log(above / below)
            reached.append((before * (after / before) ** share, False))
    return min(reached)


def efficiency_tables(entries):
    """What each regime ended at, and how much of its compute, or time if that was the budget, ours needed to be there;
    rows, headers first."""
    cost, named = ("seconds", "time") if entries[0]["settings"]["minutes"] else ("gflop", "compute")
    sigmas, ours = entries[0]["sigmas"], [entry["curve"] for entry in entries if entry["regime"] == "ours"]
    ends = [["regime", "clips/step", "steps", "frames supervised", "GFLOP", "minutes",
             *(f"{sigma:g}" for sigma in sigmas), "mean", "rollout"]]
    needs = [[f"{named} of ours to be there", *ends[0][6:-1]]]
    for entry in entries:
        title, end = entry["title"], entry["curve"][-1]
        ends.append([title, entry["batch_size"], end["step"], end["supervised_frames"], f"{end['gflop']:.0f}",
                     f"{end['seconds'] / 60:.1f}", *figures(with_mean(end["error"])),
                     *figures([np.mean(np.array(entry["rollout"], float))])])
        if "own_way" in end:
            ends.append([f"{title}, all frames at one level", *[""] * 5, *figures(with_mean(end["own_way"])), ""])
        if entry["regime"] != "ours":
            needs.append([title, *(share_needed(end, ours, column, cost) for column in range(len(sigmas) + 1))])
    return [ends, needs] if ours else [ends]


def with_mean(errors):
    return [*errors, mean_error(errors)]


def share_needed(end, ours, column, cost):
    """The share of a run's cost at which ours came down to the error, in `column`, that the run ended at."""
    curves = [[(point[cost], with_mean(point["error"])[column]) for point in curve] for curve in ours]
    spent, at_first = cost_to_reach(with_mean(end["error"])[column], curves)
    return "not reached" if spent == math.inf else f"{'< ' if at_first else ''}{spent / end[cost]:.2f}"


# ---------------------------------------------------------------------------------------------------
# Experiment 2, memory: what was last in view g frames ago, denoised at a level of noise that leaves only the past.

GAPS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (9, 11), (12, 15), (16, 23), (0, 0))


class Places(CanvasWorld):
    """The same walks over a canvas that shows each pixel's number."""

    def canvas(self, rng):
        return np.arange(super().canvas(rng).size).reshape(2 * [self.cfg.canvas_size])


def gaps(places):
    """Frames since each pixel of the canvas was last in view, 0: never. places: t h w -> t h w."""
    last, result = np.full(places.max() + 1, -1), []
    for t, seen in enumerate(places):
        result.append(np.where(last[seen] < 0, 0, t - last[seen]))
        last[seen] = t
    return np.stack(result)


def memory(model, stats, cfg, device, sigma=10.0):
    """{who: errors over the data variance for each of `GAPS`}: the model's, of a copy of the last frame, of black; and
    how many frames' worth of pixels that is."""
    cfg = SimpleNamespace(**vars(cfg) | {"frames": cfg.memory_frames})
    frames, actions = load_batch(open_source(cfg, "val"), range(cfg.eval_clips))
    gap = np.stack([gaps(Places(cfg, "val").clip(i)[0][:, 0]) for i in range(cfg.eval_clips)])[:, 1:]
    clips = to_network(frames.to(device), stats, cfg.sigma_data)
    noise = [torch.randn(clip.shape, generator=sample.seeded(device, cfg.seed, i, 1), device=device)
             for i, clip in enumerate(clips)]
    levels = torch.full((len(clips), 1, clips.shape[1]), sigma, device=device)
    answers = {"copy of the last frame": clips[:, :-1], "black": clips.amin().expand_as(clips)[:, 1:],
               "error": model(*train.clean_and_noised(clips, levels, torch.stack(noise)[:, None]),
                              unit_actions(actions.to(device), stats))[0][:, 0, 1:]}
    errors = {who: ((answer - clips[:, 1:]) ** 2 / cfg.sigma_data ** 2)[:, :, 0].cpu().numpy()
              for who, answer in answers.items()}
    groups = [(gap >= low) & (gap <= high) for low, high in GAPS]
    return {"memory": {"frames' worth of pixels": [round(group.sum() / cfg.frame_size ** 2) for group in groups]} |
            {who: [float(error[group].mean()) if group.any() else math.nan for group in groups]
             for who, error in errors.items()}}


def memory_tables(entries):
    """One table, as rows."""
    names = [f"{low}" if low == high else f"{low} to {high}" for low, high in GAPS[:-1]]
    lines = {who: line for who, line in entries[0]["memory"].items() if who != "error"}
    lines |= {entry["title"]: entry["memory"]["error"] for entry in entries}
    return [[["last seen, frames ago", *names, "never"], *([who, *figures(line)] for who, line in lines.items())]]


# ---------------------------------------------------------------------------------------------------
# Experiment 4, the protocol of Moving MNIST. Frames in [0, 1], n t h w; each frame is measured, then frames averaged.

def window_means(x, size=7):
    """Of every window of size x size that lies within x .. h w."""
    for axis in (-1, -2):
        x = np.lib.stride_tricks.sliding_window_view(x, size, axis).mean(-1)
    return x


def ssim(x, y):
    """Structural similarity as the published figures have it (scikit-image's): flat windows of 7 x 7, the covariance of
    a sample, K 0.01 and 0.03, range 1. .. h w -> .."""
    mean_x, mean_y, unbiased = window_means(x), window_means(y), 49 / 48
    var_x, var_y = window_means(x * x) - mean_x ** 2, window_means(y * y) - mean_y ** 2
    covariance = window_means(x * y) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + 1e-4) * (2 * unbiased * covariance + 9e-4) / \
        ((mean_x ** 2 + mean_y ** 2 + 1e-4) * (unbiased * (var_x + var_y) + 9e-4))
    return similarity.mean((-1, -2))


def frame_metrics(x, y):
    """{metric: n}, averaged over frames. MSE and MAE are sums over pixels; PSNR in dB, at most 100."""
    square = ((x - y) ** 2).mean((-1, -2))
    per_frame = {"MSE": square * x[0, 0].size, "MAE": np.abs(x - y).sum((-1, -2)), "SSIM": ssim(x, y),
                 "PSNR": -10 * np.log10(square.clip(1e-10))}
    return {name: value.mean(1) for name, value in per_frame.items()}


def protocol_rows(made, truth, last):
    """Table rows for made s n t h w and the last given frames n h w. 'One sample' is averaged over all."""
    each = [frame_metrics(sample_s, truth) for sample_s in made]
    each = {name: np.stack([metrics[name] for metrics in each]) for name in each[0]}     # s n
    best = each["MSE"].argmin(0)[None]
    ways = {"one sample": each, f"mean of {len(made)} samples": frame_metrics(made.mean(0), truth),
            f"best of {len(made)}, by MSE": {name: np.take_along_axis(m, best, 0) for name, m in each.items()},
            "the last given frame": frame_metrics(np.broadcast_to(last[:, None], truth.shape), truth),
            "black": frame_metrics(np.zeros_like(truth), truth)}
    return [["", *each], *([way, *(f"{value.mean():.4g}" for value in figures.values())]
                              for way, figures in ways.items())]


def walls_met(source, index, given):
    """Of each frame after the given ones, whether the one digit has met a wall since: where directions are drawn at
    walls, its place cannot be known from then on. bools t"""
    rng = np.random.default_rng((*source.stream, index))
    random_digit(source.bank, source.cfg.digit_size, rng)   # a clip draws its digit first
    path = source.path(rng)
    arrived = (path[1:] != path[:-1]) & ((path[1:] == 0) | (path[1:] == source.free))    # t yx, of frames 1 to t
    return np.maximum.accumulate(arrived.any(1)[given - 2:-1])


class OtherFutures(MovingDigits):
    """Clips of one digit that leaves walls in new directions: as they are for `given` frames, and then as they might
    have gone on as well."""

    def __init__(self, cfg, split, given, number):
        super().__init__(cfg, split)
        self.given, self.number = given, number

    def _random_bounces(self, rng, place, velocity):
        for t, here in enumerate(super()._random_bounces(rng, place, velocity), start=1):
            if t == self.given:
                fresh = np.random.default_rng((self.number, rng.integers(2 ** 62)))
                rng.bit_generator.state = fresh.bit_generator.state
            yield here


def stochastic_rows(made, possible, truth, met, variance):
    """Table rows for made s n t h w, possible futures s n t h w and met n t: per frame, over the data variance, how far
    samples differ from each other (twice their variance), possible futures do, and samples from the truth, apart for
    clips whose future is settled and open."""
    def distance(x, y):
        return ((x - y) ** 2).mean((-1, -2)) / variance
    errors = np.stack([distance(sample_s, truth) for sample_s in made])
    best = np.take_along_axis(errors, errors.sum(-1).argmin(0)[None, :, None], 0)[0]
    columns = {name: 2 * those.var(0, ddof=1).mean((-1, -2)) / variance for name, those in
               (("samples from each other", made), ("possible futures from each other", possible))}
    columns |= {"one sample": errors.mean(0),
               f"mean of {len(made)}": distance(made.mean(0), truth), f"best of {len(made)}": best}
    rows = [["frame", "clips whose future is settled", *columns, "clips whose future is open", *columns]]
    for t in range(met.shape[1]):
        rows.append([str(t + 1)])
        for group in (~met[:, t], met[:, t]):
            rows[-1] += [str(group.sum()), *figures([value[group, t].mean() if group.any() else math.nan
                                                     for value in columns.values()])]
    return rows


def evaluate_protocol(cfg, device, given=10, predicted=10):
    path = sample.find_checkpoint(cfg.checkpoint)
    model, state = sample.load_model(path, DEFAULTS["ema_widths"][0], device)
    model.dtype = sample.compute_dtype(device)
    settings = SimpleNamespace(**state["settings"] | {"frames": given + predicted})
    require(settings.dataset == "digits", f"{path} was trained on {settings.dataset}: the protocol is for digits")
    settings.data_dir = cfg.data_dir or settings.data_dir
    source = open_source(settings, "val")
    clips, made = load_batch(source, range(cfg.clips))[0], []
    for seed in tqdm(range(cfg.samples), desc="samples", disable=None):
        how = SAMPLER | {"seed": seed, "context_noise": settings.context_noise / 2}
        frames = sample.roll_out(model, clips.to(device), given, given + predicted, state["stats"], how)
        made.append(np.stack(list(frames)[given:], axis=1)[:, :, 0] / 255)
    print(f"{path}, step {state['step']}: {cfg.clips} held-out clips, {given} frames given and {predicted} predicted, "
          f"{settings.digits} digits in {settings.frame_size} x {settings.frame_size} pixels; {source.origin}")
    if (settings.digits, settings.frame_size) != (2, 64):
        print("published figures are for two digits in 64 x 64 pixels: these are not to be put beside them")
    made, truth = np.stack(made), clips[:, given:, 0].numpy() / 255
    print_markdown(protocol_rows(made, truth, clips[:, given - 1, 0].numpy() / 255))
    if settings.bounce == "random" and settings.digits == 1:
        met = np.stack([walls_met(source, index, given) for index in range(cfg.clips)])
        possible = np.stack([load_batch(OtherFutures(settings, "val", given, number), range(cfg.clips))[0][:, given:, 0]
                             for number in range(cfg.samples)]) / 255
        print_markdown(stochastic_rows(made, possible, truth, met, state["stats"]["std"][0] ** 2))


# ---------------------------------------------------------------------------------------------------
# Tables and pictures, from the files.

def figures(values):
    return [str(value) if isinstance(value, int) else f"{np.float64(value):.3f}" for value in values]


def print_markdown(rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    print("\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:], ""]), flush=True)


def look(i):
    """Of the i-th curve: told apart without colour too."""
    return {"marker": "osD^v*XP<>h"[i % 11], "linestyle": ["-", "--", ":", "-."][i % 4]}


def draw_efficiency(figure, entries):
    """Error against compute and against supervised frames."""
    axes = figure.subplots(1, 2, sharey=True)
    for i, entry in enumerate(entries):
        errors = [mean_error(point["error"]) for point in entry["curve"]]
        for axis, key in zip(axes, ("gflop", "supervised_frames")):
            axis.plot([point[key] for point in entry["curve"]], errors, label=entry["title"], **look(i))
    for axis, label in zip(axes, ("training compute (GFLOP, counted)", "frames supervised")):
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("held-out denoising error given the clean past\n(share of data variance, geometric mean)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def draw_memory(figure, entries):
    """Error against how long ago a place was in view."""
    axis, ((names, _, *lines),) = figure.subplots(), memory_tables(entries)             # the first tells how many
    for i, (who, *errors) in enumerate(lines):
        axis.plot(names[1:], [float(error) for error in errors], label=who, **look(i))
    axis.set(xlabel=f"{names[0]} (window: {entries[0]['settings']['window']})", ylim=(0, None),
             ylabel="denoising error (share of data variance)")
    axis.grid(alpha=0.3)
    axis.legend()


def draw(path, entries):
    if not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib: pip install matplotlib")
    from matplotlib.figure import Figure
    figure = Figure((11, 5), layout="constrained")
    (draw_memory if "memory" in entries[0] else draw_efficiency)(figure, entries)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def finished_entry(name, cfg, device):
    """From its file, or trained now."""
    budget = f"{cfg.minutes:g}min" if cfg.minutes else f"{cfg.gflop:g}"
    path = Path(cfg.out, f"{cfg.dataset}-{name}-{budget}.json")
    free = train.FREE_TO_CHANGE - {"eval_clips", "eval_sigmas", "eval_context"} | {"max_steps"}     # by `gflop`
    names = {*plain_settings(DEFAULTS), "minutes", "points", "drift_frames", "memory_frames"} - free
    asked = {name: getattr(cfg, name) for name in sorted(names)}
    if not path.exists():
        result = train.json_safe(train_entry(name, cfg, device) | {"settings": asked})
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(result, indent=1))
    entry = json.loads(path.read_text())
    changed = [key for key, value in json.loads(json.dumps(asked)).items() if entry["settings"].get(key) != value]
    require(not changed, f"{path} was made with other settings ({', '.join(changed)}): choose another --out")
    return entry


def main(cfg):
    device = sample.pick_device(cfg.device)
    if cfg.protocol:
        return evaluate_protocol(cfg, device)
    cfg.data_dir = cfg.data_dir or train.data_dir
    require(cfg.minutes >= 0 and cfg.gflop > 0, f"--minutes={cfg.minutes} --gflop={cfg.gflop}: above 0, or minutes 0")
    require(set(cfg.regimes) <= set(REGIMES), f"--regimes={','.join(cfg.regimes)}: choose from {', '.join(REGIMES)}")
    if cfg.drift_frames:
        drift.check_judged(cfg, "this run trains on")
    entries = [finished_entry(name, cfg, device) for name in cfg.regimes]
    if "ours" in cfg.regimes and cfg.dataset == "digits":
        for share in cfg.shorter:
            budget = {"gflop": share * cfg.gflop, "minutes": share * cfg.minutes}
            entry = finished_entry("ours", SimpleNamespace(**vars(cfg) | budget), device)
            entries.append(entry | {"title": f"{entry['title']}, {share:g} of the compute"})
    for rows in (memory_tables if cfg.dataset == "world" else efficiency_tables)(entries):
        print_markdown(rows)
    long = {entry["title"]: entry["drift"] for entry in entries if "drift" in entry}
    every = max(1, (cfg.drift_frames - cfg.eval_context) // 4)
    rows = SimpleNamespace(given=cfg.eval_context, frames=cfg.drift_frames, every=every)
    for title, values in long.items():
        drift.print_table(title, values, rows)
    if cfg.plot and long:
        drift.draw(cfg.plot, long, rows)
    elif cfg.plot:
        draw(cfg.plot, entries[:len(cfg.regimes)])          # without the shorter ones


if __name__ == "__main__":
    run(main, DEFAULTS | globals())
