"""Clips for training and evaluation: digits that move, made on the fly.

A source has `clip(index)`, `frames`, `shape`, `action_dim` and `origin`. Clip `index` is a pure function of
(seed, split, index): it depends neither on what was drawn before nor on how many processes draw.
`python data.py --data_dir=data/mnist` fetches MNIST ahead of time and says what is there.
"""
import contextlib
import functools
import gzip
import hashlib
import importlib.util
import itertools
import os
import time
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from tqdm import tqdm

from config import UserError, run

data_dir = "data/mnist"     # folder of the two MNIST images files; missing ones are downloaded into it

# ---------------------------------------------------------------------------------------------------
# Small tools: errors the user can mend, and files that are whole.

def require(condition, message):
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def replacing(path, keep=None):
    """A temporary path beside `path`, moved there if the block ends well and removed if not: a file of that name
    is always whole, also after a power cut. The file that was there moves to `keep`. UserError if it cannot be done."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):                  # above all: that it is not there
            temporary.unlink()


# ---------------------------------------------------------------------------------------------------
# MNIST files: downloaded from the first mirror that has them, under their names only when whole and verified.

FILES = {"train": "train-images-idx3-ubyte.gz", "val": "t10k-images-idx3-ubyte.gz"}     # the official splits
STREAMS = {"train": 0, "val": 1}                            # of random numbers; 2 and 3 draw font digits
MD5 = {FILES["train"]: "f68b3c2dcbeaaa9fbdd348bbdeb94873", FILES["val"]: "9fb629c4189551a2d022fa330f9573f3"}
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")


def read_idx(path):
    """The uint8 (n, h, w) of an images file, gzipped or not: int32 (2051, n, h, w), big-endian, then the pixels."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        magic, n, h, w = np.frombuffer(raw, ">i4", count=4).tolist()    # a ValueError if there are not so many
        if magic != 2051 or min(n, h, w) < 1 or len(raw) != 16 + n * h * w:
            raise ValueError(f"no whole MNIST images file, with {len(raw)} bytes from {raw[:16]!r} on")
    except (OSError, EOFError, zlib.error, ValueError) as error:        # the first three are gzip's
        fix = f"delete it, and `python data.py --data_dir={path.parent}` downloads it again"
        raise UserError(f"{path} cannot be used: {error}; {fix}") from error
    return np.frombuffer(raw, np.uint8, offset=16).reshape(n, h, w)


def read_url(url, timeout):
    """The bytes at `url`. OSError after `timeout` seconds of silence, or if they take 30 times that in all."""
    content, deadline = bytearray(), time.monotonic() + 30 * timeout
    with urllib.request.urlopen(url, timeout=timeout) as response:
        with tqdm(total=response.length, desc=url.split("/")[-1], unit="B", unit_scale=True, disable=None) as bar:
            while part := response.read1(1 << 16):
                if time.monotonic() > deadline:             # bytes that trickle in never make a silence
                    raise TimeoutError(f"not complete after {30 * timeout:g} s")
                content += part
                bar.update(len(part))
    return content


def download(name, folder, mirrors=MIRRORS, md5=MD5, timeout=10.0):
    """Fetch `name` into `folder` from the first mirror that has it; UserError lists each mirror's reason."""
    reasons = []
    with replacing(Path(folder, name)) as temporary:
        temporary.touch()                                   # a folder that cannot be written is no mirror's fault
        for mirror in mirrors:
            try:
                content = read_url(mirror + name, timeout)
                digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
                if digest != md5[name]:
                    raise OSError(f"wrong checksum of {len(content)} bytes (md5 {digest}, not {md5[name]})")
                temporary.write_bytes(content)
                return
            except (OSError, HTTPException) as error:
                reasons.append(f"{mirror} {str(error) or repr(error)}")
        raise UserError(f"{name}: {', '.join(reasons)}")


# ---------------------------------------------------------------------------------------------------
# The digit bank: MNIST from disk, else downloaded, else drawn with a font, and said to be so.

def draw_digit(text, rng):
    """A digit of Pillow's font, uint8 (28, 28): scaled, sheared, turned and thickened at random."""
    image, font = Image.new("L", (84, 84)), ImageFont.load_default(75)      # shrinking it smooths its edges
    ImageDraw.Draw(image).text((42, 42), text, 255, font, anchor="mm", stroke_width=int(rng.integers(0, 4)))
    left, top, right, bottom = image.getbbox()
    angle, shear = rng.uniform(-0.3, 0.3), rng.uniform(-0.35, 0.35)         # radians; sideways per upwards
    turn = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    scale = np.diag(1 / rng.uniform((0.75, 0.8), (1.15, 1.05)))
    inverse = scale @ [[1, shear], [0, 1]] @ turn           # Pillow asks where each output pixel comes from
    offset = np.array([left + right, top + bottom]) / 2 - inverse @ [42, 42]
    affine = np.column_stack([inverse, offset]).ravel().tolist()
    return np.asarray(image.transform((84, 84), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR).reduce(3))


def font_digits(split, seed):
    """uint8 (n, 28, 28), as many of each of the ten; train and val come from different random streams."""
    rng, count = np.random.default_rng((seed, STREAMS[split] + 2, 0)), {"train": 3000, "val": 500}[split]
    return np.stack([draw_digit(str(i % 10), rng) for i in range(count)])


def present(data_dir):
    """{split: path} of the images files that are there, gzipped or unpacked."""
    paths = [(split, Path(data_dir, name)) for split, gz in FILES.items() for name in (gz[:-3], gz)]
    return {split: path for split, path in paths if os.path.exists(path)}


@functools.cache                                            # one attempt per process
def fetch(data_dir):
    """Download the images files that are missing. Returns the reason if it fails, else None."""
    try:
        for split in sorted(FILES.keys() - present(data_dir)):
            download(FILES[split], data_dir)
    except UserError as error:
        return str(error)


@functools.cache                                            # one message per process
def find_images(data_dir):
    """({split: path}, why MNIST is not there or None). Downloads if there is no file at all."""
    reason = None if present(data_dir) else fetch(data_dir)
    files = present(data_dir)
    if len(files) < 2:
        failed = f"MNIST could not be downloaded into {data_dir} ({reason}). " if reason else ""
        only, names = "".join(map(str, files.values())), " and ".join(FILES.values())
        part = f"Only {only} is there: 'val' is the last tenth of its digits"
        print(f"{failed}{part if files else 'Using digits drawn with a font instead'}. For all of MNIST, put {names} "
              f"there, or let `python data.py --data_dir={data_dir}` download what is missing.", flush=True)
    return files, reason


def load_digits(data_dir, split, seed):
    """(uint8 digits (n, h, w), origin in words) of 'train' or 'val', which share no digit; `seed` is the font's."""
    files, reason = find_images(str(data_dir))
    if not files:
        return font_digits(split, seed), f"digits drawn with Pillow's font (no MNIST: {reason})"
    if len(files) == 2:
        digits = read_idx(files[split])
        return digits, f"MNIST {split} split, {len(digits)} digits from {data_dir}"
    (path,) = files.values()
    digits = read_idx(path)
    require(len(digits) > 1, f"{path} holds one digit, which cannot be split; add the other MNIST file")
    cut = len(digits) - max(len(digits) // 10, 1)
    first, last = (0, cut) if split == "train" else (cut, len(digits))
    return digits[first:last], f"MNIST, digits {first} to {last - 1} of {path}"


# ---------------------------------------------------------------------------------------------------
# Moving digits: every clip has its own digits, starting places and velocities, in pixels and frames.

def reflect(places, free):
    """Fold a straight path onto [0, free]: a triangle wave, mirrored at the walls, exact at any speed."""
    return free - np.abs(places % (2 * free) - free) if free else np.zeros_like(places)


@functools.cache
def whole_velocities(low, high):
    """All whole-pixel velocities (n, yx) with low <= length <= high."""
    reach = range(-int(high), int(high) + 1)
    return np.array([yx for yx in itertools.product(reach, reach) if low <= np.hypot(*yx) <= high])


def draw_velocity(rng, low, high, whole_pixels, across=slice(0)):
    """A velocity (yx) with low <= length <= high, each direction as likely; whole-pixel ones move along the axes
    `across` (a mask), unless none does: in a corner with speed 1."""
    if whole_pixels:
        velocities = whole_velocities(low, high)
        moving = velocities[(velocities[:, across] != 0).all(1)]
        return rng.choice(moving if len(moving) else velocities)
    length, angle = rng.uniform(low, high), rng.uniform(0, 2 * np.pi)
    return length * np.array([np.sin(angle), np.cos(angle)])


def check_digits(cfg, split):
    """UserError for settings that digits cannot be drawn with."""
    require(split in FILES, f"split={split!r}: choose 'train' or 'val'")
    for name, least in (("frames", 1), ("digits", 1), ("digit_size", 1), ("seed", 0)):
        require(getattr(cfg, name) >= least, f"{name}={getattr(cfg, name)}: set {least} or more")
    require(cfg.digit_size <= cfg.frame_size, f"digit_size={cfg.digit_size}: at most frame_size={cfg.frame_size}")


def random_digit(bank, size, rng):
    digit = Image.fromarray(bank[rng.integers(len(bank))])
    return np.asarray(digit.resize((size, size), Image.Resampling.BILINEAR))             # smooths as it shrinks


def paint(picture, digit, y, x):
    """The digit, its top left corner at (y, x); where two overlap, the brighter shows."""
    window = picture[y:y + len(digit), x:x + len(digit)]
    np.maximum(window, digit, out=window)


class MovingDigits:
    """Digits that move over a black square and bounce off its walls.

    With cfg.whole_pixels, places and velocities are whole pixels, so that away from walls a frame is an exact shift
    of the last one; else real numbers, rounded to draw, as in Moving MNIST. At a wall cfg.bounce 'reflect' mirrors
    the velocity, and 'random' draws a new direction, with whole pixels also a new speed: too few are equally fast."""

    def __init__(self, cfg, split):
        check_digits(cfg, split)
        require(cfg.bounce in ("reflect", "random"), f"bounce={cfg.bounce!r}: choose 'reflect' or 'random'")
        is_range = len(cfg.speed) == 2 and 0 <= cfg.speed[0] <= cfg.speed[1] < np.inf
        require(is_range, f"speed={cfg.speed!r}: set (lo, hi), 0 <= lo <= hi, as in --speed=1,3")
        require(not cfg.whole_pixels or len(whole_velocities(*cfg.speed)),
                f"speed={cfg.speed!r} holds no whole-pixel velocity; widen it, or set whole_pixels=False")
        self.cfg, self.stream = cfg, (cfg.seed, STREAMS[split])
        self.frames, self.shape, self.action_dim = cfg.frames, (1, cfg.frame_size, cfg.frame_size), 0
        self.free = cfg.frame_size - cfg.digit_size         # a digit's top left corner stays in [0, free]
        self.bank, self.origin = load_digits(cfg.data_dir, split, cfg.seed)

    def _random_bounces(self, rng, place, velocity):
        """Yield the places (yx) of a digit that leaves each wall in a new direction."""
        for _ in range(self.frames):
            yield place
            at_wall, inward = (place == 0) | (place == self.free), np.where(place == 0, 1, -1)
            if (at_wall & (velocity * inward < 0)).any():
                low, high = self.cfg.speed if self.cfg.whole_pixels else 2 * [np.linalg.norm(velocity)]
                velocity = draw_velocity(rng, low, high, self.cfg.whole_pixels, at_wall)
                velocity = np.where(at_wall, inward * np.abs(velocity), velocity)
            place = (place + velocity).clip(0, self.free)

    def _path(self, rng):
        """The top left corners (t, yx) of one digit, whole pixels."""
        whole = self.cfg.whole_pixels
        place = rng.integers(0, self.free + 1, 2) if whole else rng.uniform(0, self.free, 2)
        velocity = draw_velocity(rng, *self.cfg.speed, whole)
        if self.cfg.bounce == "random":
            return np.rint(list(self._random_bounces(rng, place, velocity))).astype(int)
        return np.rint(reflect(place + velocity * np.arange(self.frames)[:, None], self.free)).astype(int)

    def clip(self, index):
        """Clip `index` as (uint8 (t, 1, h, w), None): digits have no actions."""
        rng = np.random.default_rng((*self.stream, index))
        frames = np.zeros((self.frames, *self.shape), np.uint8)
        for _ in range(self.cfg.digits):
            digit = random_digit(self.bank, self.cfg.digit_size, rng)
            for frame, (y, x) in zip(frames[:, 0], self._path(rng)):
                paint(frame, digit, y, x)
        return frames, None


# ---------------------------------------------------------------------------------------------------
# A world to walk in: what a place looks like is settled, so coming back tests memory against a known truth.

MOVES = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])            # (y, x) of stay, up, down, left, right


class CanvasWorld:
    """A canvas strewn with digits, seen through a window that the actions move by cfg.speed[0] pixels; at the
    canvas's edge it stays. Action t led to frame t; the first is to stay. Walks often turn back."""

    def __init__(self, cfg, split):
        check_digits(cfg, split)
        self.move, self.free = int(cfg.speed[0]), cfg.canvas_size - cfg.frame_size
        require(self.move >= 1 and self.move == cfg.speed[0],
                f"speed={cfg.speed!r}: the first is the pixels of a move, a whole number from 1")
        require(self.free >= self.move,
                f"canvas_size={cfg.canvas_size}: at least frame_size={cfg.frame_size} and a move of {self.move}")
        self.cfg, self.stream = cfg, (cfg.seed, STREAMS[split])
        self.frames, self.shape, self.action_dim = cfg.frames, (1, cfg.frame_size, cfg.frame_size), len(MOVES)
        self.bank, self.origin = load_digits(cfg.data_dir, split, cfg.seed)

    def canvas(self, rng):
        canvas = np.zeros((self.cfg.canvas_size, self.cfg.canvas_size), np.uint8)
        for y, x in rng.integers(0, self.cfg.canvas_size - self.cfg.digit_size + 1, (self.cfg.digits, 2)):
            paint(canvas, random_digit(self.bank, self.cfg.digit_size, rng), y, x)
        return canvas

    def walk(self, rng):
        """Actions t: seven times out of ten the last one again, else the way back or any."""
        back, actions = [0, 2, 1, 4, 3], [0]
        while len(actions) < self.frames:
            choices = (actions[-1], back[actions[-1]], int(rng.integers(len(MOVES))))
            actions.append(choices[rng.choice(3, p=(0.7, 0.1, 0.2))])
        return np.array(actions)

    def clip(self, index):
        """Clip `index` as (uint8 (t, 1, h, w), actions (t,))."""
        rng, size = np.random.default_rng((*self.stream, index)), self.cfg.frame_size
        canvas, actions = self.canvas(rng), self.walk(rng)
        place, frames = rng.integers(0, self.free // self.move + 1, 2) * self.move, []
        for action in actions:
            place = (place + self.move * MOVES[action]).clip(0, self.free // self.move * self.move)
            frames.append(canvas[None, place[0]:place[0] + size, place[1]:place[1] + size])
        return np.stack(frames), actions


# ---------------------------------------------------------------------------------------------------
# Videos from files.

def decode(path):
    """The frames of a film, GIF, picture or uint8 array (t h w [c]), one by one: uint8 h w c. UserError names the file
    and what is wrong with it."""
    path = Path(path)
    require(path.is_file(), f"there is no file {path}")
    is_film = path.suffix not in (".npy", ".gif", ".png", ".jpg", ".jpeg")
    require(not is_film or importlib.util.find_spec("av"),
            f"{path}: films are read by PyAV, which is not installed: pip install av (or give .gif, .png or .npy)")
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            require(array.dtype == np.uint8 and array.ndim in (3, 4) and array.size,
                    f"{path} holds {array.dtype} {array.shape}: expected uint8 frames t h w or t h w c")
            yield from array if array.ndim == 4 else array[..., None]
        elif not is_film:
            with Image.open(path) as pictures:
                for picture in ImageSequence.Iterator(pictures):
                    yield np.asarray(picture.convert("RGB"))
        else:
            import av
            with av.open(str(path)) as film:
                for frame in film.decode(video=0):
                    yield frame.to_ndarray(format="rgb24")
    except UserError:
        raise
    except (OSError, ValueError, EOFError, IndexError) as error:            # av's errors are OSErrors or ValueErrors
        raise UserError(f"{path} cannot be read as a video: {error}") from error


def fit(frame, shape):
    """A frame h w c, its centre cropped to the proportions of `shape` (c, h, w), resized to it: uint8 c h w."""
    channels, height, width = shape
    picture = Image.fromarray(frame if frame.shape[2] == 3 else frame[..., 0]).convert("L" if channels == 1 else "RGB")
    picture = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
    return rearrange(np.atleast_3d(np.asarray(picture)), "h w c -> c h w")


def open_source(cfg, split):
    """The source of 'train' or 'val' clips. One process should come first, alone: it may have to download them."""
    sources = {"digits": MovingDigits, "world": CanvasWorld}
    if cfg.dataset in sources:
        return sources[cfg.dataset](cfg, split)
    require(cfg.dataset != "video", f"data_dir={cfg.data_dir}: no prepared clips were found there")
    raise UserError(f"dataset={cfg.dataset!r} is unknown; choose 'digits', 'world' or 'video'")


# ---------------------------------------------------------------------------------------------------
# Pixels to network values and back: zero mean, standard deviation sigma_data over the training set.

def measure(source, clips=256):
    """dict(mean, std), each a list of c floats: the pixels of the first clips on a scale from 0 to 1.
    A channel that never changes gets std 1: the network sees zeros, and its pixels come back exactly."""
    counts = np.zeros((source.shape[0], 256), np.int64)
    for index in range(clips):
        for count, pixels in zip(counts, rearrange(source.clip(index)[0], "t c h w -> c (t h w)")):
            count += np.bincount(pixels, minlength=256)
    share, values = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(1))
    return dict(mean=mean.tolist(), std=np.where(share.max(1) == 1, 1.0, std).tolist())


def per_channel(stats, device):
    """Mean and standard deviation, (c, 1, 1) each. A blocking copy would wait for the GPU's queued work."""
    return torch.tensor([stats["mean"], stats["std"]]).to(device, non_blocking=True)[..., None, None]


def to_network(frames, stats, sigma_data):
    """uint8 (..., c, h, w) to float32 with zero mean and standard deviation sigma_data."""
    mean, std = per_channel(stats, frames.device)
    return (frames.float() / 255 - mean) * (sigma_data / std)


def to_pixels(x, stats, sigma_data):
    """The inverse of `to_network`: float (..., c, h, w) to uint8, rounded and clamped."""
    mean, std = per_channel(stats, x.device)
    return ((x.float() * (std / sigma_data) + mean) * 255).round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------
# Batches: the clips a process sees depend only on the step and its rank, so a run can stop and go on.

def load_batch(source, indices):
    """Clips `indices` as (uint8 (b, t, c, h, w), actions (b, t, ...) or None)."""
    frames, actions = zip(*map(source.clip, indices))
    return torch.from_numpy(np.stack(frames)), None if actions[0] is None else torch.from_numpy(np.stack(actions))


class Batches(Iterator, contextlib.AbstractContextManager):
    """An endless iterator over micro-batches (sample numbers, frames, actions), loaded ahead by a thread, whose
    errors `next` raises. The numbers are b ints; frames (uint8 (b, t, c, h, w)) and actions are on `device`.

    Step k trains on samples k * batch_size to (k + 1) * batch_size - 1; sample number i is clip i. They go in
    order to the step's `accumulate` micro-batches, and those of each in order to the `world_size` processes."""

    def __init__(self, source, batch_size, device, start=0, rank=0, world_size=1, accumulate=1, prefetch=4):
        parts = accumulate * world_size
        require(batch_size > 0 and batch_size % parts == 0,
                f"batch_size={batch_size} cannot be split evenly over accumulate={accumulate} x {world_size} "
                f"processes; set a multiple of {parts}")
        self.source, self.device, self.size = source, torch.device(device), batch_size // parts
        self.firsts = itertools.count(start * batch_size + rank * self.size, batch_size // accumulate)
        self.thread = ThreadPoolExecutor(1)
        self.ahead = [self.thread.submit(self._load) for _ in range(prefetch)]

    def _load(self):
        """In the thread: the next micro-batch."""
        if self.device.index:
            torch.cuda.set_device(self.device)              # a new thread starts on GPU 0 and would take memory there
        first = next(self.firsts)
        numbers = range(first, first + self.size)
        tensors = load_batch(self.source, numbers)
        if self.device.type == "cuda":                      # from pinned memory the copy overlaps with the GPU's work
            tensors = [None if tensor is None else tensor.pin_memory() for tensor in tensors]
        return list(numbers), *tensors

    def __next__(self):
        numbers, *tensors = self.ahead[0].result()          # an error stays there, for whoever asks again
        self.ahead = [*self.ahead[1:], self.thread.submit(self._load)]
        return numbers, *(None if tensor is None else tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def __exit__(self, *_):
        self.thread.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------
# The script: fetch MNIST ahead of time, and say what is there.

def main(cfg):
    if reason := fetch(cfg.data_dir):
        print(f"not downloaded: {reason}", flush=True)
    for split in FILES:
        digits, origin = load_digits(cfg.data_dir, split, seed=0)
        numbers = f"{len(digits)} digits, mean {digits.mean() / 255:.4f}, std {digits.std() / 255:.4f}"
        print(f"{split}: {numbers} ({origin})", flush=True)


if __name__ == "__main__":
    run(main, globals())
