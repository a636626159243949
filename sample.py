"""Rolls a trained model out, frame by frame.

    python sample.py --out rollout.gif                       # the newest checkpoint under out/
    python sample.py --checkpoint=out/mnist/checkpoint.pt --frames=200 --samples=8 --out=long.gif
    python sample.py --play                                  # steer it from a web page
"""
import collections.abc
import contextlib
import functools
import glob
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import secrets
import shutil
import signal
import stat
import threading
import time
import weakref
import webbrowser
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from einops import rearrange
from PIL import GifImagePlugin, Image
from tqdm import tqdm

from config import UserError, all_finite, at_least, not_default, one_of, require, run
from data import at_rate, crop, decode, load_batch, open_source, replacing, reraise, to_network, to_pixels, unit_actions
from model import Cache, Denoiser, ModelConfig

# -- what to make
out = "rollout.gif"         # .gif, .mp4, .webm, .png (a row per sample), .npy (an array); .pt: weights, to share
precision = "bfloat16"      # of the weights in a .pt file: bfloat16 or float32
checkpoint = ""             # file to sample from, or a folder with its newest checkpoint.pt; empty: out/
frames = 24                 # frames per sample, the given ones included
samples = 4                 # samples side by side, each from its own clip
context = 4                 # given frames at the start of each sample; 0 starts from nothing
prompt = ""                 # film, GIF, picture or .npy whose first frames are given; empty: clips of the data
actions = ""                # 0,2,1,.. or a .npy file, one per frame, given ones too; none: hide them; empty: the data's
split = "val"               # data split that the given frames come from: val or train
first_clip = 0              # index of the first sample's clip in that split
data_dir = ""               # folder of the data; empty: the one used in training
# -- how to sample
solver = "euler"            # euler: n steps cost n evaluations; heun: 2 n - 1; reading the frame in takes most of one
steps = 6                   # steps per frame
sigma_min = 0.2             # last noise level before 0; with few steps, a small one leaves a haze that grows
sigma_max = 40.0            # first noise level
rho = 7.0                   # spacing of the noise levels: larger puts more of them near sigma_min
churn = 0.0                 # fresh noise per frame (S_churn), at levels .05 to 50; 0 is the deterministic sampler
context_noise = -1.0        # noise level at which the past is read; -1: half the largest of the training
guidance = 1.0              # above 1: away from what a frame without a past would be; twice the evaluations
ema = 0.05                  # width of the averaged weights; 0: the raw weights of the last step
seed = 0                    # same seed, same file
# -- output
fps = 10                    # frames per second of GIFs, films and play
scale = 4                   # pixels per pixel
truth = False               # show the data's own continuation before each sample, in a contact sheet above it
play = False                # instead of a file: steer the model from a web page, from frames of the data on
port = 8000                 # of that page, on this machine; 0: any that is free
device = "auto"             # auto, cpu, cuda, cuda:1, ..
compile = False             # torch.compile: a minute or two to start, then faster frames; on a GPU as CUDA graphs


# ---------------------------------------------------------------------------------------------------
# Randomness: every generator is made from numbers, so that nothing depends on what ran before.

def seeded(device, *key):
    """A generator that is a function of the whole numbers in `key`."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)     # numpy 1 cannot shift it


# ---------------------------------------------------------------------------------------------------
# The sampler (EDM Algorithm 2): reverse diffusion of one frame, with any denoiser D(x, sigma).

def noise_levels(steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho):
    """sigma_0 > .. > sigma_{steps-1}, then 0 (EDM Eq. 5)."""
    ramp = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho
    return [*ramp.tolist(), 0.0]


def reverse_diffusion(denoise, x, levels, solver="euler", generator=None, churn=0.0, churn_min=0.05, churn_max=50.0):
    """From noise x at levels[0] down to levels[-1]; the last step, to 0, is an Euler step with either solver. Heun
    is more accurate, but divides the denoiser's error by the next noise level: with few steps Euler does better."""
    require(solver in ("euler", "heun"), f"solver {solver!r}: choose 'euler' or 'heun'", ValueError)
    for sigma, sigma_next in zip(levels[:-1], levels[1:], strict=True):
        if churn and churn_min <= sigma <= churn_max:
            raised = sigma * (1 + min(churn / (len(levels) - 1), math.sqrt(2) - 1))
            fresh = torch.randn(x.shape, generator=generator, device=x.device)
            x, sigma = x + fresh * math.sqrt(raised ** 2 - sigma ** 2), raised
        slope = (x - denoise(x, sigma)) / sigma
        euler = x + slope * (sigma_next - sigma)
        if solver == "heun" and sigma_next > 0:
            slope = (slope + (euler - denoise(euler, sigma_next)) / sigma_next) / 2
        x = x + slope * (sigma_next - sigma)
    return x


# ---------------------------------------------------------------------------------------------------
# The rollout: denoise a frame, read it in as the newest of the past, and so on.

class Rollout(collections.abc.Iterator):
    """An endless iterator of frames b c h w in network units, after the given `clip` b t c h w (t may be 0).

    actions: None, or b n (..) with one entry per frame, the given ones included; the iterator ends with them.
    limits: None, or the least and the largest value that a pixel can have, c 1 1 each: a frame is clamped to them
    before it becomes the past, as it is when shown. Frame t's noise is a function of (seed, t) alone."""

    def __init__(self, model, clip, levels, seed=0, actions=None, limits=None, context_noise=0.0, guidance=1.0,
                 solver="euler", churn=0.0):
        self.model, self.levels, self.seed, self.how = model, levels, seed, {"solver": solver, "churn": churn}
        self.actions, self.limits, self.context_noise, self.guidance = actions, limits, context_noise, guidance
        self.shape, self.device = (clip.shape[0], *clip.shape[2:]), clip.device
        self.cache, self.empty_cache = Cache(clip.device), Cache(clip.device)
        if clip.shape[1]:
            self.read(clip, None if actions is None else actions[:, :clip.shape[1]])

    def __next__(self):
        t = self.cache.position
        if self.actions is not None and t >= self.actions.shape[1]:
            raise StopIteration
        return self.advance(None if self.actions is None else self.actions[:, t:t + 1])

    def advance(self, action=None):
        """The next frame, b c h w, which `action`, b 1 (..), leads to."""
        t = self.cache.position
        generator = seeded(self.device, self.seed, t)
        x = torch.randn(self.shape, generator=generator, device=self.device) * self.levels[0]
        denoise = functools.partial(self.denoise, action, t > 0)
        x = reverse_diffusion(denoise, x, self.levels, generator=generator, **self.how)
        require(x.isfinite().all(), f"frame {t + 1} has values that are not finite: the weights are off, or sigma_max")
        x = x.clamp(*self.limits) if self.limits else x
        self.read(x[:, None], action)
        return x

    def denoise(self, action, has_past, x, sigma):
        """D(x, sigma) given the past; with history guidance, extrapolated from the D of a frame that has none."""
        x, sigma = x[:, None], x.new_full((len(x), 1), sigma)
        given_past = self.model.step(x, sigma, self.cache, action)[:, 0]
        if self.guidance == 1 or not has_past:
            return given_past
        return torch.lerp(self.model.step(x, sigma, self.empty_cache, action)[:, 0], given_past, self.guidance)

    def read(self, x, actions):
        """Writes finished frames b t c h w into the cache, under noise of level `context_noise`."""
        if self.context_noise:
            first = self.cache.position
            noise = [torch.randn(self.shape, generator=seeded(self.device, self.seed, t, 1), device=self.device)
                     for t in range(first, first + x.shape[1])]
            x = x + self.context_noise * torch.stack(noise, dim=1)
        self.model.read(x, x.new_full(x.shape[:2], self.context_noise), self.cache, actions)


def compile_errors():
    """A block in which a failure of torch.compile becomes a UserError."""
    return reraise(lambda error: "compiling failed (--compile needs a C++ compiler; any work on a GPU Triton, a C "
                   f"compiler and Python's headers): {error}", torch._dynamo.exc.BackendCompilerFailed)


def compiled(method):
    """A model's `step` or `read`, compiled for one frame at a time, which it is given over and over; on a GPU as one
    CUDA graph. One thread alone may call it. A cache's first pass, in which layers allocate their part and weights are
    frozen, and passes of several frames run as they are."""
    graph, seen = torch.compile(method, mode="reduce-overhead", dynamic=False, fullgraph=True), weakref.WeakSet()

    def call(x, sigma, cache, actions=None):
        if cache in seen and x.shape[1] == 1:
            with compile_errors():
                result = graph(x, sigma, cache, actions)
            return result if result is None else result.clone()      # the graph's next run overwrites its own
        result = method(x, sigma, cache, actions)
        seen.add(cache)
        for tensor in (cache.clock, *cache.tensors.values(), *cache.tables.values()):
            torch._dynamo.mark_static_address(tensor, guard=False)   # or a CUDA graph would not write to it
        return result
    return call


# ---------------------------------------------------------------------------------------------------
# Averaged weights of any width, after training (EDM2 section 3 and Algorithm 3).

def ema_exponent(width):
    """gamma of the power-function average whose standard deviation is `width` of the run (EDM2 section 3.1)."""
    roots = np.roots([1, 7, 16 - width ** -2, 12 - width ** -2])
    return float(roots.real.max())


def profile_overlap(t_a, gamma_a, t_b, gamma_b):
    """Integral of p_a p_b, p(t) = (gamma + 1) t^gamma / T^(gamma + 1) on 0..T the weight that a snapshot taken
    at T gave to the weights of time t. In logarithms: t^gamma overflows."""
    n_a, n_b, n = gamma_a + 1, gamma_b + 1, gamma_a + gamma_b + 1
    return np.exp(np.log(n_a * n_b / n) + n * np.log(np.minimum(t_a, t_b)) - n_a * np.log(t_a) - n_b * np.log(t_b))


def reconstruction(steps, widths, step, width):
    """How much of each snapshot, of steps[i] and widths[i], gives the average of `width` at `step`: least squares;
    and the share of its profile, squared, that they cannot give."""
    t, gamma = np.asarray(steps, float), np.array([ema_exponent(w) for w in widths])
    wanted = float(step), ema_exponent(width)
    gram = profile_overlap(t[:, None], gamma[:, None], t[None], gamma[None])
    target = profile_overlap(t, gamma, *wanted)
    amounts = np.linalg.lstsq(gram, target, rcond=None)[0]
    return amounts, max(0.0, 1 - amounts @ target / profile_overlap(*wanted, *wanted))


def reconstruct_ema(folder, state, width):
    """Weights averaged with any `width`, from the checkpoint's averages and the snapshots that training left in
    `folder`."""
    snapshots = [load_file(path, ("step", "ema")) for path in sorted(Path(folder).glob("ema-*.pt"))]
    snapshots = [state, *(snapshot for snapshot in snapshots if snapshot["step"] < state["step"])]
    parts = [(s["step"], w, tensors) for s in snapshots for w, tensors in s["ema"].items()]
    require(len(snapshots) > 1, f"--ema={width} is rebuilt from the snapshots ema-*.pt beside the checkpoint; {folder} "
                                "has none of before it: use a width that the run tracked, or 0 for raw weights")
    amounts, missed = reconstruction([p[0] for p in parts], [p[1] for p in parts], state["step"], width)
    require(missed < 0.05, f"--ema={width:g}: {missed:.0%} of it are out of reach of the snapshots beside the "
            f"checkpoint: give one about as wide as {' or '.join(map(str, state['ema']))}, or 0 for raw weights")
    print(f"width {width:g} is rebuilt from {len(snapshots)} snapshots; {missed:.1%} of it is out of their reach")
    return {name: sum(float(a) * tensors[name].float() for a, (_, _, tensors) in zip(amounts, parts, strict=True))
            for name in parts[0][2]}


# ---------------------------------------------------------------------------------------------------
# Checkpoints.

VERSION = 6                                                 # of checkpoints; a new one when old ones cannot be read
WEIGHT_KEYS = ("version", "step", "settings", "model_config", "stats", "model")          # all that sampling needs
CHECKPOINT_KEYS = (*WEIGHT_KEYS, "origin", "optimizer", "ema", "recent")


def load_file(path, keys):
    """A dict of tensors and plain values that has `keys`; whatever is wrong with the file is one line naming it."""
    require(os.path.exists(path), f"there is no checkpoint {path}")
    with reraise(lambda error: f"{path} cannot be read ({error}): it is damaged, or no checkpoint of this program",
                 Exception):
        with zipfile.ZipFile(path) as file:                 # torch writes checksums, and does not look at them
            if damaged := file.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    state = state if isinstance(state, dict) else {}
    version, missing = state.get("version", VERSION), set(keys) - set(state)
    require(version == VERSION, f"{path} is of version {version} of checkpoints; this program reads {VERSION}")
    require(not missing, f"{path} is no checkpoint of this program: it has no {', '.join(sorted(missing))}")
    return state


def find_checkpoint(path):
    """`path`, or, if it is a folder, the newest checkpoint.pt anywhere below it; of an empty `path`, below out/."""
    if path and not os.path.isdir(path):
        return path
    found = glob.glob(f"{glob.escape(path or 'out')}/**/checkpoint.pt", recursive=True)
    require(found, f"no checkpoint under {path or 'out'}/: train one first, python train.py config/mnist.py")
    return max(found, key=os.path.getmtime)


def load_model(path, width, device):
    """(model in eval mode, checkpoint); weights averaged over `width`, 0: raw. A file to share has one width alone."""
    state = load_file(path, WEIGHT_KEYS)
    weights = state["model"]
    require("ema" in state or width in (ema, state["ema_width"]),
            f"--ema={width:g}: {path} holds one set of weights alone, averaged over {state.get('ema_width')}")
    if width and "ema" in state:
        weights = weights | (state["ema"].get(width) or reconstruct_ema(Path(path).parent, state, width))
    with reraise(lambda error: f"{path} holds another network than this program's: {error}", TypeError, RuntimeError):
        model = Denoiser(ModelConfig(**state["model_config"]))
        model.load_state_dict(weights)
    model.normalize_weights()                               # an average of vectors on the sphere lies inside it
    return model.eval().requires_grad_(False).to(device), state


def save_weights(path, model, state, width, dtype):
    """Weights for sharing: all that sampling needs, learnt numbers in `dtype`."""
    weights = model.state_dict() | {name: weight.to(dtype) for name, weight in model.named_parameters()}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save({key: state[key] for key in WEIGHT_KEYS} | {"model": weights, "ema_width": width}, file)
    print(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB")


def pick_device(name):
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with reraise(lambda error: f"device {name!r} cannot be used: {error}", RuntimeError, AssertionError):
        probe = torch.zeros(1, device=name)
        probe.item()                                        # the device "meta" holds no numbers
        return probe.device


def compute_dtype(device):
    """bfloat16 on a GPU that has it; on CPUs float32: few of them gain by less."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32


# ---------------------------------------------------------------------------------------------------
# Writers. They take an iterator of frames, n c h w each, n samples side by side; the first `given` ones get a
# bright border. GIFs and films grow while frames are made; the others are written once all are there.

GIVEN_COLOUR, MADE_COLOUR = (255, 160, 0), (48, 48, 48)


def bordered(frames, given, scale):
    """Every frame as pictures: n h w 3."""
    edge = max(1, scale // 2)
    for t, frame in enumerate(frames):
        n, channels, h, w = frame.shape
        require(channels in (1, 3) and frame.dtype == np.uint8,
                f"{frame.dtype} frames of {channels} channels are no pictures: use --out=NAME.npy")
        colour = GIVEN_COLOUR if t < given else MADE_COLOUR
        pictures = np.full((n, h * scale + 2 * edge, w * scale + 2 * edge, 3), colour, np.uint8)
        pixels = rearrange(frame, "n c h w -> n h w c").repeat(scale, axis=1).repeat(scale, axis=2)
        pictures[:, edge:-edge, edge:-edge] = pixels        # one channel fills all three
        yield pictures


def tiled(frames, given, scale):
    """Every frame as one picture h w 3, the samples in rows of at most eight."""
    for pictures in bordered(frames, given, scale):
        columns = min(len(pictures), 8)
        blank = np.zeros((-len(pictures) % columns, *pictures.shape[1:]), np.uint8)
        picture = rearrange(np.concatenate([pictures, blank]), "(r n) h w c -> (r h) (n w) c", n=columns)
        require(max(picture.shape) <= 16384, f"{picture.shape[1]} x {picture.shape[0]} pixels are too many for a GIF "
                                             "or a film: lower --scale, or --samples")
        yield picture


def write_array(file, frames, given, scale, fps):
    """Pixels as n t h w c, latents as n t c h w: each sample in the layout that data.py reads."""
    frames = np.stack(list(frames), axis=1)
    np.save(file, np.moveaxis(frames, 2, -1) if frames.dtype == np.uint8 else frames)


def write_sheet(file, frames, given, scale, fps):
    """A contact sheet: a row per sample, a column per frame."""
    sheet = rearrange(list(bordered(frames, given, scale)), "t n h w c -> (n h) (t w) c")
    Image.fromarray(sheet).save(file, format="png")


def write_gif(file, frames, given, scale, fps):
    """An endless GIF. Its clock counts hundredths of a second: each frame ends at the nearest one."""
    for t, picture in enumerate(tiled(frames, given, scale)):
        picture = Image.fromarray(picture).convert("P", palette=Image.Palette.ADAPTIVE)
        if t == 0:
            file.writelines(GifImagePlugin.getheader(picture, info={"loop": 0})[0])
        duration = 10 * (round(100 * (t + 1) / fps) - round(100 * t / fps))             # milliseconds
        file.writelines(GifImagePlugin.getdata(picture, duration=duration, include_color_table=True))
    file.write(b";")


def write_film(file, frames, given, scale, fps, kind, codec):
    """An mp4 or webm file; yuv420p, which every player shows, needs even sizes."""
    import av  # optional: `check_extension` asked for it
    with av.open(file, "w", format=kind, options={"fflags": "bitexact"}) as container:   # same frames, same bytes
        stream = container.add_stream(codec, rate=fps)
        for t, picture in enumerate(tiled(frames, given, scale)):
            picture = np.pad(picture, [(0, picture.shape[0] % 2), (0, picture.shape[1] % 2), (0, 0)])
            if t == 0:
                stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


WRITERS = {".gif": write_gif, ".png": write_sheet, ".npy": write_array,
           ".mp4": functools.partial(write_film, kind="mp4", codec="libx264"),
           ".webm": functools.partial(write_film, kind="webm", codec="libvpx-vp9")}


def check_extension(path):
    kind = Path(path).suffix.lower()
    require(kind in WRITERS, f"--out={path}: the extension must be one of {', '.join(WRITERS)}, or .pt")
    require(kind not in (".mp4", ".webm") or importlib.util.find_spec("av"),
            f"--out={path}: films are written by PyAV, which is not installed: pip install av")
    if kind in (".mp4", ".webm"):
        import av
        with reraise(lambda error: f"--out={path}: this PyAV cannot encode it: choose .gif ({error})", Exception):
            av.Codec(WRITERS[kind].keywords["codec"], "w")


def write(path, frames, given=0, scale=4, fps=10):
    """Frames to `path`, as its extension says. A GIF or film grows there once a frame is made that is not given. After
    that it ends well whatever ends the making of frames: an error, which is raised then, or a second Ctrl-C."""
    check_extension(path)
    kind, frames, errors = Path(path).suffix.lower(), iter(frames), []
    if kind in (".npy", ".png"):
        with replacing(path) as temporary, open(temporary, "wb") as file:
            return WRITERS[kind](file, frames, given, scale, fps)
    first = [*itertools.islice(frames, given + 1)]
    next(tiled(first, given, scale))                        # what cannot be shown leaves the file as it was

    def until_an_error():
        try:
            yield from first
            yield from frames
        except BaseException as error:
            errors.append(error)
    with reraise(lambda error: f"{path} cannot be written: {error}", OSError):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            WRITERS[kind](file, until_an_error(), given, scale, fps)
    for error in errors:
        with contextlib.suppress(OSError):
            print(f"{path} keeps the frames made until then", flush=True)
        raise error


def start_rollout(model, clips, stats, settings, actions=None):
    """The `Rollout` that goes on from the stored clips b t c h w: pixels, which stay black to white, or latents."""
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8, device=clips.device)[:, None, None, None]
    limits = None if stats.get("latent") else to_network(black_and_white, stats, model.cfg.sigma_data).unbind()
    clip = to_network(clips, stats, model.cfg.sigma_data)
    return Rollout(model, clip, actions=unit_actions(actions, stats), limits=limits, **settings)


def roll_out(model, clips, given, frames, stats, settings, actions=None, progress=False, stop=()):
    """Yields `frames` frames b c h w: the first `given` ones of the stored clips b t c h w, then the model's own.
    Ends early once the list `stop` is no longer empty."""
    rollout = start_rollout(model, clips[:, :given], stats, settings, actions)
    yield from clips[:, :given].cpu().numpy().swapaxes(0, 1)
    for _ in tqdm(range(frames - given), unit="frame", disable=not progress):
        if stop:
            break
        yield to_pixels(next(rollout), stats, model.cfg.sigma_data).cpu().numpy()


def with_truth(clips, frames):
    """Each clip's own frame beside the one made for it: yields (b two) c h w, stored pixels or latents."""
    for true, made in zip(clips.cpu().numpy().swapaxes(0, 1), frames):
        yield rearrange([true, made], "two b c h w -> (b two) c h w")


# ---------------------------------------------------------------------------------------------------
# Play: a page on this machine asks for one frame after another, each with the action of the keys that are down.

PAGE = """<!doctype html><meta charset="utf-8"><title>play</title>
<style>body { background: #111; color: #ddd; font: 16px sans-serif; text-align: center }
img { image-rendering: pixelated; height: 65vh } a { color: #fa0 }</style>
<p><img id="frame" alt="the newest frame"><p id="status" role="status">starting<p id="sliders">
<p><button id="pause">pause</button> <button id="restart">restart</button>
<a id="gif" href="/gif" download="play.gif">save the last frames as a GIF</a><p id="help">
<script>
const game = GAME, $ = id => document.getElementById(id), held = [], times = []
const keys = Object.assign([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], {ArrowUp: 1, ArrowDown: 2, ArrowLeft: 3, ArrowRight: 4})
let paused = false, tapped = null
$("help").textContent = game.sliders ? "the sliders are the actions; arrow keys move the chosen one" : game.actions
  ? `arrow keys and 0 to ${Math.min(9, game.actions - 1)} are the actions, space pauses`
  : "this model was trained without actions: it dreams on; space pauses"
for (let i = 0; i < game.sliders; i++)
  $("sliders").innerHTML += `<input type="range" min="-1" max="1" step="0.05" value="0" aria-label="action ${i}"> `
document.querySelector("input")?.focus()
onkeydown = event => {
  const known = keys[event.key] < game.actions
  if (event.ctrlKey || event.altKey || event.metaKey || event.key != " " && !known) return   // the browser's own
  event.preventDefault()
  if (event.key == " " && !event.repeat) $("pause").click()
  if (known && !event.repeat) { held.unshift({code: event.code, action: keys[event.key]}); tapped = held[0].action }
}
onkeyup = event => {                                // its name may be another one by now: of 3 with shift, #
  const i = held.findIndex(key => key.code == event.code)
  if (i >= 0) held.splice(i, 1)
}
onblur = () => { held.length = 0 }
onbeforeunload = () => { navigator.sendBeacon("/", JSON.stringify({player: game.player, do: "leave"})) }
$("pause").onclick = event => {
  event.target.blur(); paused = !paused; event.target.textContent = paused ? "go on" : "pause"
}
$("restart").onclick = event => { event.target.blur(); ask({do: "restart"}) }
function action() {
  if (game.sliders) return [...document.querySelectorAll("input")].map(slider => game.reach * slider.value)
  const chosen = held[0]?.action ?? tapped ?? 0
  tapped = null
  return chosen
}
async function ask(request) {
  const answer = await fetch("/", {method: "POST", body: JSON.stringify({player: game.player, ...request})})
  if (!answer.ok) throw await answer.text()
  URL.revokeObjectURL($("frame").src)
  $("frame").src = URL.createObjectURL(await answer.blob())
  return answer.headers.get("X-Frame")
}
async function loop() {
  const began = performance.now()
  try {
    if (!paused) {
      const frame = await ask({do: "frame", action: action()})
      times.push(performance.now()); if (times.length > 20) times.shift()
      const rate = 1000 * (times.length - 1) / (times.at(-1) - times[0])
      $("status").textContent = `${frame}, ${(rate || 0).toFixed(1)} frames per second`
    } else { times.length = 0; $("status").textContent = "paused" }
  } catch (reason) { $("status").textContent = `stopped: ${reason}`; return }
  setTimeout(loop, Math.max(0, 1000 / game.fps - (performance.now() - began)))
}
loop()
</script>"""
BUSY = """<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="3"><title>taken</title>
<p>Another page is playing. This one takes over when that one is closed or pauses."""


class Refused(Exception):
    """A request is refused: raised with (HTTP status, why)."""


class Game:
    """A rollout that one page steers. Its methods run in one thread, the `worker`'s, which `threads` of a CPU work for:
    torch keeps these, what it has found out about convolutions, and CUDA graphs, for each thread. Only `encoded` may
    run in others."""

    def __init__(self, model, source, stats, cfg, settings, device, threads=1):
        self.model, self.source, self.stats, self.cfg, self.settings = model, source, stats, cfg, settings
        require(not stats.get("latent"), "--play shows pictures, and this model makes latents")
        self.continuous = not stats.get("discrete")         # or there are none
        self.device, self.worker = device, ThreadPoolExecutor(1, "play", torch.set_num_threads, [threads])
        self.player, self.seen, self.number = None, -math.inf, cfg.first_clip
        self.worker.submit(self.restart).result()

    def restart(self):
        """Begins anew from the next clip's first frames, or from nothing."""
        clips = torch.zeros(1, 0, *self.model.cfg.frame_shape, dtype=torch.uint8, device=self.device)
        clips, actions = load_batch(self.source, [self.number], self.device) if self.source else (clips, None)
        clips, given = clips[:, :self.cfg.context], None if actions is None else actions[:, :self.cfg.context]
        settings = self.settings | {"seed": self.cfg.seed + self.number - self.cfg.first_clip}   # or dreams come again
        self.rollout, self.number = start_rollout(self.model, clips, self.stats, settings, given), self.number + 1
        self.last = collections.deque(clips.cpu().numpy().swapaxes(0, 1), maxlen=300)    # frames that a GIF shows

    def page(self):
        """(HTTP status, the page for a new player)."""
        if time.monotonic() - self.seen < 5:
            return 409, BUSY.encode()
        self.player, self.seen = secrets.token_urlsafe(), time.monotonic()
        keys, sliders = (0, self.model.cfg.action_dim) if self.continuous else (self.model.cfg.action_dim, 0)
        reach = self.stats.get("reach") or 1                # the largest action in training
        game = {"player": self.player, "fps": self.cfg.fps, "actions": keys, "sliders": sliders, "reach": reach}
        return 200, PAGE.replace("GAME", json.dumps(game)).encode()

    def read_action(self, action):
        """The tensor b 1 (..) of what a page sent."""
        count = self.model.cfg.action_dim
        if not count:
            return None
        if self.continuous:
            expected = f"{count} numbers from -1e6 to 1e6"
            fits = isinstance(action, list) and len(action) == count and \
                all(type(x) in (int, float) and abs(x) <= 1e6 for x in action)
        else:
            expected = f"a whole number from 0 to {count - 1}"
            fits = type(action) is int and 0 <= action < count
        require(fits, (400, f"action {action!r}: expected {expected}"), Refused)
        action = torch.tensor([[action]], dtype=torch.float32 if self.continuous else torch.long, device=self.device)
        return unit_actions(action, self.stats)

    def play(self, request):
        """(the newest frame as a PNG, its number in words)."""
        do, known = request.get("do"), self.player and request.get("player") == self.player
        require(do in ("frame", "restart", "leave"), (400, "expected {player, do: frame or restart, action}"), Refused)
        require(known, (409, "another page has taken over"), Refused)
        if do == "leave":                                   # reloaded, say: the next page need not wait
            self.player, self.seen = None, -math.inf        # what it has asked for meanwhile comes too late
            return b"", ""
        if do == "restart":
            self.restart()
        else:
            frame = self.rollout.advance(self.read_action(request.get("action")))
            self.last.append(to_pixels(frame, self.stats, self.model.cfg.sigma_data).cpu().numpy())
        self.seen = time.monotonic()                        # now, as a first frame may take a minute to compile
        return self.encoded(write_sheet, [*self.last][-1:]), f"frame {self.rollout.cache.position}"

    def encoded(self, write, frames):
        """The bytes of a file of those frames, by one of the writers; a black one if there are none yet."""
        file, black = io.BytesIO(), np.zeros((1, *self.model.cfg.frame_shape), np.uint8)
        write(file, frames or [black], 0, self.cfg.scale, self.cfg.fps)
        return file.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers pages of its own only: those of other sites can neither read the game nor steer it."""
    timeout = 5                                             # seconds of silence after which a connection is closed

    def handle(self):
        with contextlib.suppress(ConnectionError):          # a page that was closed meanwhile
            super().handle()

    def do_GET(self):
        game, frame, status, kind = self.server.game, "", 200, "text/plain"
        try:
            request = self.read_request()
            if request is not None:
                kind, (body, frame) = "image/png", game.worker.submit(game.play, request).result()
            elif self.path == "/gif":                       # the game goes on while it is encoded
                kind, body = "image/gif", game.encoded(write_gif, game.worker.submit(list, game.last).result())
            else:
                kind, (status, body) = "text/html", game.worker.submit(game.page).result()
        except (Refused, UserError) as error:
            status, reason = error.args[0] if isinstance(error, Refused) else (500, str(error))
            body = reason.encode()
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", len(body)), ("Cache-Control", "no-store"),
                            ("X-Content-Type-Options", "nosniff"), ("X-Frame", frame)):
            self.send_header(name, str(value))
        self.end_headers()
        shutil.copyfileobj(io.BytesIO(body), self.wfile)    # in pieces: a slow reader has the timeout for each

    do_POST = do_GET

    def read_request(self):
        """What a page has posted, a dict; of GET None."""
        hosts = [f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")]
        hosts += ["127.0.0.1", "localhost"] * (self.server.server_port == 80)            # where browsers leave it out
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        own = host in hosts and origin in (None, f"http://{host}")
        require(own, (403, f"only pages of http://{hosts[0]} are answered"), Refused)
        require(self.path in ("/", "/gif"), (404, "there is / and /gif"), Refused)
        if self.command == "GET":
            return None
        size = self.headers.get("Content-Length", "")
        short = size.isascii() and size.isdecimal() and len(size) < 5 and int(size) <= 4096
        require(short, (413, "expected up to 4096 bytes of JSON"), Refused)
        with reraise(lambda error: (400, f"no JSON object: {error}"), ValueError, TypeError, RecursionError,
                     become=Refused):
            return dict(json.loads(self.rfile.read(int(size))))

    def log_message(self, *_):
        pass


def serve(game, port):
    """Serves the game to this machine's browser until Ctrl-C."""
    with reraise(lambda error: f"--port={port} cannot be used ({error}): give another one, or 0 for any", OSError,
                 OverflowError):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.game, server.daemon_threads = game, False        # what was asked is answered, not cut off in torch
    url = f"http://127.0.0.1:{server.server_port}"
    serving = threading.Thread(target=server.serve_forever, daemon=True)        # where Ctrl-C interrupts no request
    serving.start()
    with server:
        with contextlib.suppress(KeyboardInterrupt):
            print(f"play at {url}; Ctrl-C ends", flush=True)
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()   # some run until they are left
            while serving.is_alive():
                serving.join(1)                             # without a limit, Windows would not hear of Ctrl-C
        server.shutdown()
    print("\nended")


# ---------------------------------------------------------------------------------------------------
# The script.

def read_prompt(path, count, samples, shape, latent, fps=0.0, letterbox=False, stride=1):
    """The first `count` frames of a file, as the model's training clips were made of theirs, for every sample:
    b t c h w, uint8 or latents."""
    frames = [*itertools.islice(at_rate(decode(path), fps), 0, (count - 1) * stride + 1, stride)]
    require(frames, f"{path} has no frames")
    timing = " of those that training would take" if fps or stride > 1 else ""
    require(len(frames) == count, f"{path} has {len(frames)} frames{timing}: give --context={len(frames)} or less")
    require((frames[0].dtype != np.uint8) == latent, f"{path} holds {frames[0].dtype}, and this model was trained on "
                                                     f"{'latents, floats' if latent else 'pixels, uint8'}")
    require(not latent or frames[0].shape == shape, f"{path}: a latent of {frames[0].shape}, expected {shape}")
    _, height, width = shape
    if not latent and frames[0].shape[:2] != (height, width):
        print(f"{path}: {frames[0].shape[1]} x {frames[0].shape[0]} pixels, {'padded' if letterbox else 'cropped'} and "
              f"resized to {width} x {height}")
    clip = torch.from_numpy(np.stack([crop(frame, shape, letterbox) for frame in frames]))
    require(clip.isfinite().all(), f"{path} holds latents that are not finite in float16")
    return clip.expand(samples, *clip.shape)


def read_actions(text, frames, samples, action_dim, discrete=None):
    """The action of every frame, from a .npy file or as in 0,2,1, for every sample: b t whole numbers or b t a;
    discrete: which of them the model was trained on, if that is known."""
    require(action_dim, f"--actions={text}: this model was trained without actions")
    with reraise(lambda error: f"--actions={text}: expected whole numbers, as in 0,2,1, or a .npy file ({error})",
                 OSError, ValueError, EOFError, OverflowError, AttributeError, KeyError):
        array = np.load(text, allow_pickle=False) if text.endswith(".npy") else np.array(text.split(","), int)
        whole = {"i": True, "u": True, "f": False}[array.dtype.kind]
    require(discrete in (None, whole), f"--actions={text}: {array.dtype}; this model was trained on "
                                       f"{'vectors of floats' if whole else 'whole numbers'}")
    expected = (frames,) if whole else (frames, action_dim)
    require(array.shape == expected, f"--actions={text}: {array.shape} for --frames={frames}, expected {expected}")
    require(whole or np.isfinite(array).all(), f"--actions={text}: not all of its numbers are finite")
    require(not whole or 0 <= array.min() and array.max() < action_dim,
            f"--actions={text}: {array.min()} to {array.max()}; this model knows 0 to {action_dim - 1}")
    array = torch.from_numpy(array.astype(np.int64 if whole else np.float32))
    return array.expand(samples, *array.shape)


def stop_on_signals(stop, finishing):
    """Ctrl-C, SIGTERM and SIGHUP, the end of the terminal, append (number, time) to `stop`: the program is to end soon,
    and says that it is `finishing` something. A second Ctrl-C or SIGTERM ends it at once, but for a SIGTERM within a
    second: torchrun, which got the first one as well, passes it on. A second SIGHUP does not: shells send two."""
    hangup = getattr(signal, "SIGHUP", None)

    def handler(number, frame):
        if number == hangup:                                # what is said then fails, unless it goes to a file
            for stream in (1, 2):
                with contextlib.suppress(OSError):          # it is closed already
                    if not stat.S_ISREG(os.fstat(stream).st_mode):
                        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        elif stop and (number == signal.SIGINT or time.monotonic() - stop[0][1] > 1):
            raise SystemExit(128 + number)
        if not stop:
            stop.append((number, time.monotonic()))
            with contextlib.suppress(OSError):              # Ctrl-C has ended a `tee` as well
                print(f"\nfinishing {finishing}; once more to quit at once", flush=True)
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:           # as nohup has it
        numbers.append(hangup)
    for number in numbers:
        signal.signal(number, handler)


def rollout_settings(cfg):
    """What `Rollout` takes beyond the model and the clip."""
    settings = {name: getattr(cfg, name) for name in ("seed", "context_noise", "guidance", "solver", "churn")}
    return settings | {"levels": noise_levels(cfg.steps, cfg.sigma_min, cfg.sigma_max, cfg.rho)}


def check_settings(cfg):
    """UserError before any work is done."""
    at_least(cfg, 1, "frames", "samples", "steps", "fps", "scale")
    at_least(cfg, 0, "context", "first_clip", "seed", "churn")
    all_finite(cfg)
    one_of(cfg, solver=("euler", "heun"), precision=("bfloat16", "float32"), split=("train", "val"))
    require(0 < cfg.sigma_min < cfg.sigma_max <= 1e6, f"--sigma_min={cfg.sigma_min} --sigma_max={cfg.sigma_max}: the "
                                                      "first above 0, the second above it and at most 1e6")
    require(0.1 <= cfg.rho <= 100, f"--rho={cfg.rho}: from 0.1 to 100")
    require(cfg.context_noise == -1 or cfg.context_noise >= 0, f"--context_noise={cfg.context_noise}: 0 or more, or -1")
    require(cfg.scale <= 64, f"--scale={cfg.scale}: at most 64")
    gif = cfg.play or cfg.out.lower().endswith(".gif")
    require(cfg.fps <= (50 if gif else 1000), f"--fps={cfg.fps}: at most 50 in play and GIFs, 1000 in films")
    require(0 <= cfg.ema <= 0.25, f"--ema={cfg.ema}: a width is above 0 and at most 0.25; 0 takes the raw weights")
    require(not (cfg.prompt and (cfg.truth or cfg.play)),
            f"--truth and --play need clips of the data: they cannot be used with --prompt={cfg.prompt}")
    require(not cfg.truth or cfg.actions in ("", "none"),
            f"--truth is under the data's actions, not --actions={cfg.actions}: leave one of them out")
    require(not cfg.prompt or cfg.context, f"--prompt={cfg.prompt} --context=0: how many of its frames are given?")
    require(cfg.play or cfg.context <= cfg.frames,
            f"--context={cfg.context} is more than --frames={cfg.frames}, which counts given frames too")
    what, unused = ("play", {"out", "frames", "samples", "truth", "actions"}) if cfg.play else \
        ("prompt", {"first_clip", "split", "data_dir"} if cfg.prompt else set())
    idle = not_default(cfg, globals()) & unused
    require(not idle, f"--{', --'.join(sorted(idle))} does nothing with --{what}: leave it out")
    require(not os.path.isdir(cfg.out), f"--out={cfg.out} is a folder")
    if not cfg.out.endswith(".pt"):
        check_extension(cfg.out)


def open_data(cfg, state, frames):
    """The source that the model was trained on, with clips of `frames` frames, or of as many as in training if that is
    more (a clip's first frames may depend on its length); or one like it in --data_dir, with clips of `frames`."""
    settings = SimpleNamespace(**state["settings"])
    settings.frames = frames if cfg.data_dir else max(frames, settings.frames)
    settings.data_dir = cfg.data_dir or settings.data_dir
    try:
        source, wanted = open_source(settings, cfg.split), SimpleNamespace(**state["model_config"])
    except UserError as error:
        raise UserError(f"{error} (or go on from a --prompt, or from nothing: --context=0; a model with actions then "
                        "needs --actions, too)") from error
    acts = source.action_dim == wanted.action_dim or not (source.action_dim or cfg.play)       # or --actions has them
    fits = tuple(source.shape) == tuple(wanted.frame_shape) and acts
    require(fits, f"{settings.data_dir}: frames of {tuple(source.shape)} and {source.action_dim} actions; this model "
                  f"knows {tuple(wanted.frame_shape)} and {wanted.action_dim}")
    print(f"given frames: {source.origin}", flush=True)
    return source


def given_clips(cfg, model, state):
    """(the clips that the samples begin with, the actions of all their frames or None)."""
    clips, actions = torch.zeros(cfg.samples, 0, *model.cfg.frame_shape, dtype=torch.uint8), None
    whole = cfg.truth or model.cfg.action_dim and not cfg.actions       # more of the data's clips than what is given
    if cfg.prompt:
        latent = bool(state["stats"].get("latent"))
        how = {"stride": state["settings"]["stride"]} | state["stats"].get("made", {})
        clips = read_prompt(cfg.prompt, cfg.context, cfg.samples, model.cfg.frame_shape, latent, **how)
        print(f"given frames: the first {cfg.context} of {cfg.prompt}, at the frame rate and stride of training")
    elif cfg.context or whole:
        source = open_data(cfg, state, cfg.frames if whole else cfg.context)
        clips, actions = load_batch(source, range(cfg.first_clip, cfg.first_clip + cfg.samples))
    if cfg.actions not in ("", "none"):
        return clips, read_actions(cfg.actions, cfg.frames, cfg.samples, model.cfg.action_dim,
                                   state["stats"].get("discrete"))
    if model.cfg.action_dim and (cfg.actions == "none" or actions is None):
        require(state["settings"]["action_dropout"], "this model needs --actions (trained with action_dropout, it "
                                                     "would not)")
        print("the model is told no actions")
        actions = torch.full((cfg.samples, cfg.frames), -1)
    return clips, actions


def main(cfg):
    check_settings(cfg)
    path = find_checkpoint(cfg.checkpoint)
    device = pick_device(cfg.device)
    threads = torch.get_num_threads()
    if cfg.play:                                            # a CPU's threads are the game's: where two threads have
        torch.set_num_threads(1)                            # others work for them, all work at a third of the speed
    model, state = load_model(path, cfg.ema, device)
    model.dtype = compute_dtype(device)
    width = state.get("ema_width", cfg.ema)
    weights = f"weights averaged over {width:g} of the run" if width else "raw weights"
    print(f"{path}, step {state['step']}, {weights}", flush=True)
    if cfg.out.endswith(".pt"):
        require(Path(cfg.out).resolve() != Path(path).resolve(), f"--out={cfg.out} is the checkpoint itself")
        return save_weights(cfg.out, model, state, width, getattr(torch, cfg.precision))
    if cfg.compile:
        model.step, model.read = map(compiled, (model.step, model.read))
    else:                                                   # a tenth faster; torch.compile does not take it
        model.step, model.read = map(torch.inference_mode(), (model.step, model.read))
    if cfg.context_noise < 0:
        cfg.context_noise = state["settings"]["context_noise"] / 2
        print(f"the past is read with noise of level {cfg.context_noise:g}, half of the largest in training")
    if cfg.play:
        source = open_data(cfg, state, cfg.context) if cfg.context else None
        return serve(Game(model, source, state["stats"], cfg, rollout_settings(cfg), device, threads), cfg.port)
    if model.cfg.video_attn_resolutions and cfg.context >= model.cfg.window:
        print(f"--context={cfg.context}: the model sees the {model.cfg.window - 1} frames before one; older ones count "
              "for little")
    clips, actions = (None if part is None else part.to(device) for part in given_clips(cfg, model, state))
    frames = roll_out(model, clips, cfg.context, cfg.frames, state["stats"], rollout_settings(cfg), actions,
                      progress=True, stop=(stop := []))
    stop_on_signals(stop, "the frame, then the file")
    frames = with_truth(clips, frames) if cfg.truth else frames
    first, count = next(frames, None), itertools.count()    # of frames that are written
    if first is not None:                                   # else it was stopped before any, and no file is written
        frames = (frame for frame, _ in zip(itertools.chain([first], frames), count))
        write(cfg.out, frames, cfg.context, cfg.scale, cfg.fps)
        print(f"{cfg.out}: {cfg.samples} x {next(count)} frames, the first {cfg.context} given"
              f"{', stopped there' if stop else ''}")
    if stop:
        raise SystemExit(128 + stop[0][0])


if __name__ == "__main__":
    run(main, globals())
