"""Measures how long a rollout of one digit keeps its shape, its ink and its place.

    python tests/drift.py --frames=200                       # the newest checkpoint under out/, four given frames
    python tests/drift.py --frames=1000 --clips=16 --context_noise=0,0.05,0.1 --out=drift.json --plot=drift.png
"""
import gzip
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import UserError, run
from data import download, load_batch, mnist_files, open_source, replacing, require
from sample import compute_dtype, find_checkpoint, load_model, noise_levels, pick_device, roll_out

# -- what to measure
checkpoint = ""                 # file to sample from, or a folder with its newest checkpoint.pt; empty: out/
data_dir = ""                   # folder of MNIST, whose labels are downloaded if missing; empty: the run's
frames = 200                    # frames per rollout, the given ones included
clips = 32                      # held-out clips, rolled out side by side
given = 4                       # given frames of each
every = 20                      # frames between rows of the printed table
# -- how to sample: a rollout for each combination
solver = ("euler",)             # euler, heun
steps = (6,)                    # steps per frame
sigma_min = (0.2,)              # last noise level before 0
sigma_max = (40.0,)             # first noise level
context_noise = (-1.0,)         # noise levels at which the past is read; -1: half the largest of the training
guidance = (1.0,)               # history guidance; 1 is none
churn = (0.0,)                  # fresh noise per frame, at noise levels from 0.05 to 50
ema = 0.05                      # width of the averaged weights
# -- output
out = ""                        # file of all figures, JSON; empty: none
plot = ""                       # picture of them, by matplotlib; empty: none
seed = 0                        # of the rollouts' noise and of the classifier
device = "auto"                 # auto, cpu, cuda, ..

VARIED = ("solver", "steps", "sigma_min", "sigma_max", "context_noise", "guidance", "churn")


# ---------------------------------------------------------------------------------------------------
# A small classifier of frames, trained here on the training digits, wherever they stand in the frame.

LABELS = {"train": ("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
          "val": ("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c")}


def read_labels(data_dir, split):
    """The label of each digit of the bank of `split`, as data.py divides the images there are; fetched if missing."""
    images = mnist_files(data_dir)
    require(images, f"{data_dir}: no MNIST images are there, and digits drawn with a font have no labels: give MNIST's "
                    "folder as --data_dir")
    name, md5 = LABELS[split if len(images) == 2 else next(iter(images))]
    files = [Path(data_dir, file) for file in (name, name.removesuffix(".gz"))]
    if not any(file.exists() for file in files):
        download(name, data_dir, md5={name: md5})
    path = next(file for file in files if file.exists())
    raw = path.read_bytes()
    labels = np.frombuffer(gzip.decompress(raw) if path.suffix == ".gz" else raw, np.uint8, offset=8)
    if len(images) == 2:
        return labels
    cut = len(labels) - max(len(labels) // 10, 1)
    return labels[:cut] if split == "train" else labels[cut:]


def labelled_frames(source, labels, indices):
    """(frame 0 of each clip as float n c h w, its digit's label n): a clip first draws its digit."""
    drawn = [np.random.default_rng((*source.stream, i)).integers(len(source.bank)) for i in indices]
    frames = np.stack([source.clip(i)[0][0] for i in indices])
    return torch.from_numpy(frames).float() / 255, torch.from_numpy(labels[drawn]).long()


def classifier():
    def layer(c_in, c_out, stride):
        return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.BatchNorm2d(c_out), nn.ReLU())
    return nn.Sequential(layer(1, 16, 1), layer(16, 32, 2), layer(32, 64, 2), layer(64, 128, 1), layer(128, 128, 1),
                         nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(128, 10))


def train_classifier(source, labels, steps=1000, batch=64):
    net = classifier()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.006, steps)
    for step in tqdm(range(steps), desc="classifier"):
        x, y = labelled_frames(source, labels, range(step * batch, (step + 1) * batch))
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------
# The measurement.

def check_judged(settings, whose):
    """UserError if rollouts of the run with `settings` cannot be judged: before any time is spent on them."""
    require(settings.dataset == "digits" and settings.digits == 1, f"{whose} {settings.digits} digits of dataset "
            f"{settings.dataset}: long rollouts are judged of dataset digits, with digits=1")
    for split in ("train", "val"):
        read_labels(settings.data_dir, split)


def judged(settings, count, seed):
    """True clips b t c h w of the run with `settings`, their digits b, and a classifier trained to tell digits."""
    torch.manual_seed(seed)
    first_frames = SimpleNamespace(**vars(settings) | {"frames": 1})
    labels = {split: read_labels(settings.data_dir, split) for split in ("train", "val")}
    net, held_out = train_classifier(open_source(first_frames, "train"), labels["train"]), open_source(settings, "val")
    x, y = labelled_frames(open_source(first_frames, "val"), labels["val"], range(1000))
    print(f"the classifier is right on {(net(x).argmax(1) == y).float().mean():.1%} of 1000 held-out frames")
    return load_batch(held_out, range(count))[0], labelled_frames(held_out, labels["val"], range(count))[1], net


def measure(videos, truth, labels, net):
    """Per frame, over the clips: how often the given digit is seen (and for each clip whether), ink over true ink and
    its spread, and the squared error over that of a guess at the mean."""
    seen = torch.stack([net(frame.float() / 255).argmax(1) == labels for frame in videos.unbind(1)]).float()
    ink, true_ink = (rearrange(x.double(), "b t c h w -> b t (c h w)").mean(2) for x in (videos, truth))
    ratio = ink / true_ink[:, :1]
    error = (videos.double() - truth).square().mean((0, 2, 3, 4)) / truth.double().var()
    return {"identity": seen.mean(1).tolist(), "seen": seen.tolist(), "ink": ratio.mean(0).tolist(),
            "ink_spread": ratio.std(0).tolist(), "error": error.tolist()}


def print_table(name, figures, cfg):
    rows = range(cfg.given, cfg.frames, cfg.every)
    print(f"\n{name}\n  frame       " + "".join(f"{t + 1:7d}" for t in rows))
    for key, values in figures.items():
        spans = [np.array(values[t:t + cfg.every], float) for t in rows]                 # a file has null for NaN
        if key == "seen":                                   # per clip: what other clips might have given
            key, spans = "+-", [span.mean(0).std(ddof=1) / span.shape[1] ** 0.5 for span in spans]
        print(f"  {key:12s}" + "".join(f"{np.mean(span):7.2f}" for span in spans))
    print(flush=True)


def draw(path, results, cfg):
    """One curve per way of sampling, told apart by line style as well as colour."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    width = max(1, cfg.frames // 50)                        # of the running mean, drawn at its middle
    middles = np.arange(cfg.frames - width + 1) + (width + 1) / 2
    for (name, figures), style in zip(results.items(), ["-", "--", ":", "-."] * len(results), strict=False):
        for axis, key in zip(axes, ("identity", "ink", "ink_spread"), strict=True):
            means = np.convolve(figures[key], np.ones(width) / width, "valid")
            axis.plot(middles, means, style, label=name)
    for axis, label in zip(axes, ("digits recognised (share)", "ink / given ink, mean over clips",
                                  "ink / given ink, deviation over clips"), strict=True):
        axis.set(xlabel="frame", ylabel=label, ylim=(0, None))
    figure.suptitle(f"running means over {width} frames")
    axes[0].legend()
    with replacing(path) as temporary:
        plt.savefig(temporary, format="png", dpi=110)


def main(cfg):
    device = pick_device(cfg.device)
    path = find_checkpoint(cfg.checkpoint)
    model, state = load_model(path, cfg.ema, device)
    model.dtype = compute_dtype(device)
    settings = SimpleNamespace(**state["settings"] | {"frames": cfg.frames})
    settings.data_dir = cfg.data_dir or settings.data_dir
    check_judged(settings, f"{path} was trained on")
    truth, labels, net = judged(settings, cfg.clips, cfg.seed)
    cfg.context_noise = tuple(settings.context_noise / 2 if level == -1 else level for level in cfg.context_noise)
    results = {"truth": measure(truth, truth, labels, net)}
    print_table("truth", results["truth"], cfg)
    for values in itertools.product(*(getattr(cfg, name) for name in VARIED)):
        told = [f"{key} {value}" for key, value in zip(VARIED, values) if len(getattr(cfg, key)) > 1]
        name = ", ".join(told) or "rollout"
        solver, steps, low, high, *how = values
        settings = {"levels": noise_levels(steps, low, high, 7), "seed": cfg.seed, "solver": solver,
                    **dict(zip(VARIED[4:], how, strict=True))}
        frames = roll_out(model, truth.to(device), cfg.given, cfg.frames, state["stats"], settings, progress=True)
        results[name] = measure(torch.from_numpy(np.stack(list(frames), axis=1)), truth, labels, net)
        print_table(name, results[name], cfg)
    if cfg.out:
        with replacing(cfg.out) as temporary:
            temporary.write_text(json.dumps(results))
    if cfg.plot:
        draw(cfg.plot, results, cfg)


if __name__ == "__main__":
    run(main, globals())
