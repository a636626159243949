"""Clips for training and evaluation: digits that move, made on the fly.

A source has `clip(index)`, `frames`, `shape`, `action_dim` and `origin`. Clip `index` is a pure function of
(seed, split, index): it depends neither on what was drawn before nor on how many processes draw.
`python data.py --data_dir=data/mnist` fetches MNIST ahead of time and says what is there.
"""

import contextlib
import functools
import gzip
import hashlib
import itertools
import os
import queue
import threading
import time
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from config import UserError, run

data_dir = "data/mnist"  # folder of the two MNIST images files; missing ones are downloaded into it

# --------------------------------------------------------------------------------------------------
# Small tools: errors the user can mend, and randomness that is a function of integers.

STREAMS = {"train": 0, "val": 1, "train font": 2, "val font": 3}  # what the numbers are for; never renumber


def require(condition, message):
    """UserError(message) unless `condition`; the message names the setting, what is wrong and the fix."""
    if not condition:
        raise UserError(message)


def as_range(name, value, least):
    """(lo, hi) of a setting that is a number, alone or in a tuple, or a pair."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    possible = 1 <= len(values) <= 2 and least <= values[0] <= values[-1] < np.inf
    require(possible, f"{name}={value!r}: set a number from {least} up, or (lo, hi) with {least} <= lo <= hi")
    return values[0], values[-1]


@contextlib.contextmanager
def replacing(path):
    """A temporary path to write to, in the folder of `path`: moved there when the block ends well, so that a file
    of that name is always whole, and removed when it does not. UserError if it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # above all: that it is not there
            temporary.unlink()


def generator(seed, stream, index):
    return np.random.default_rng((seed, STREAMS[stream], index))


# --------------------------------------------------------------------------------------------------
# MNIST files: the IDX format is four big-endian int32 (2051, count, height, width), then the pixels.

FILES = {"train": "train-images-idx3-ubyte.gz", "val": "t10k-images-idx3-ubyte.gz"}  # the official splits
MD5 = {FILES["train"]: "f68b3c2dcbeaaa9fbdd348bbdeb94873", FILES["val"]: "9fb629c4189551a2d022fa330f9573f3"}


def read_idx(path):
    """The uint8 (n, h, w) of an images file, gzipped or not. UserError if it is damaged or cannot be read."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        magic, n, h, w = np.frombuffer(raw, ">i4", count=4).tolist()  # a ValueError if there are not so many
        if magic != 2051:
            raise ValueError(f"not an MNIST images file, it starts with {raw[:4]!r}")
        if min(n, h, w) < 1 or len(raw) != 16 + n * h * w:
            raise ValueError(f"announces {n} images of {h} x {w}, holds {len(raw) - 16} bytes of pixels")
    except (OSError, EOFError, zlib.error, ValueError) as error:  # the first three are gzip's
        fix = f"delete it, and `python data.py --data_dir={path.parent}` downloads it again"
        raise UserError(f"{path} cannot be used: {error}; {fix}") from error
    return np.frombuffer(raw, np.uint8, offset=16).reshape(n, h, w)


# --------------------------------------------------------------------------------------------------
# Download: mirrors in order, each in bounded time; a file gets its name only when whole and verified.

_MIRRORS = (  # tried in this order
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


def read_url(url, timeout):
    """The bytes at `url`. OSError after `timeout` seconds of silence or 30 times that in all.

    The latter is kept by leaving a thread behind: a socket's own limit starts anew with every byte that
    trickles in, and looking up a host name has none.
    """
    outcome = queue.Queue()

    def attempt():
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                progress = dict(total=response.length, desc=url.split("/")[-1], disable=None)
                with tqdm.wrapattr(response, "read", **progress) as body:
                    outcome.put(b"".join(iter(lambda: body.read(1 << 16), b"")))
        except Exception as error:
            outcome.put(error)

    threading.Thread(target=attempt, daemon=True).start()
    try:
        result = outcome.get(timeout=30 * timeout)
    except queue.Empty:
        raise TimeoutError(f"not complete after {30 * timeout:g} s") from None
    if isinstance(result, Exception):
        raise result
    return result


def download(name, folder, mirrors=_MIRRORS, md5=MD5, timeout=10.0):
    """Fetch `name` into `folder` from the first mirror that has it; UserError lists each mirror's reason."""
    reasons = []
    with replacing(Path(folder, name)) as temporary:
        temporary.touch()  # a folder that cannot be written is no mirror's fault
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


# --------------------------------------------------------------------------------------------------
# The digit bank: MNIST from disk, else downloaded, else drawn with a font, and said to be so.

FONT_DIGITS = {"train": 3000, "val": 500}  # how many are drawn


@functools.cache
def font_digit(text, thickness):
    """A white digit on black, three times too large: shrinking the distorted one smooths its edges."""
    image = Image.new("L", (84, 84))
    font = ImageFont.load_default(75)
    ImageDraw.Draw(image).text((42, 42), text, 255, font, anchor="mm", stroke_width=thickness)
    return image


def draw_digit(text, rng):
    """A digit of Pillow's font, uint8 (28, 28): scaled, sheared, turned and thickened at random."""
    image = font_digit(text, int(rng.integers(0, 4)))
    left, top, right, bottom = image.getbbox()
    angle, shear = rng.uniform(-0.3, 0.3), rng.uniform(-0.35, 0.35)  # radians; sideways per upwards
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    distortion = turn @ np.array([[1, -shear], [0, 1]]) @ np.diag(rng.uniform((0.75, 0.8), (1.15, 1.05)))
    inverse = np.linalg.inv(distortion)  # Pillow asks where each output pixel comes from
    offset = np.array([left + right, top + bottom]) / 2 - inverse @ [42, 42]  # centre to centre
    affine = np.column_stack([inverse, offset]).ravel().tolist()
    image = image.transform(image.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    return np.asarray(image.reduce(3))


def font_digits(split, seed):
    """uint8 (n, 28, 28), as many of each of the ten; train and val come from different random streams."""
    rng = generator(seed, f"{split} font", 0)
    return np.stack([draw_digit(str(i % 10), rng) for i in range(FONT_DIGITS[split])])


def present(data_dir):
    """{split: path} of the images files that are there, gzipped or unpacked."""
    paths = [(split, Path(data_dir, name)) for split, gz in FILES.items() for name in (gz[:-3], gz)]
    return {split: path for split, path in paths if os.path.exists(path)}


@functools.cache  # one attempt per process
def fetch(data_dir):
    """Download the images files that are missing. Returns the reason if it fails, else None."""
    try:
        for split in FILES:
            if split not in present(data_dir):
                download(FILES[split], data_dir)
    except UserError as error:
        return str(error)


@functools.cache  # one message per process
def find_images(data_dir):
    """({split: path}, why MNIST is not there or None). Downloads if there is no file at all."""
    reason = None if present(data_dir) else fetch(data_dir)
    failed = f"MNIST could not be downloaded into {data_dir} ({reason}). " if reason else ""
    files = present(data_dir)
    if not files:
        fix = f"For MNIST, put {' and '.join(FILES.values())} into that folder."
        print(f"{failed}Using digits drawn with Pillow's font instead. {fix}", flush=True)
    if len(files) == 1:
        (only,) = files.values()
        fix = f"`python data.py --data_dir={data_dir}` downloads the other file."
        print(f"{failed}Only {only} is there: 'val' is the last tenth of its digits. {fix}", flush=True)
    return files, reason


def load_digits(data_dir, split, seed):
    """(uint8 digits (n, h, w), origin in words) of 'train' or 'val', which share no digit.

    `seed` matters only for digits drawn with the font. UserError for a damaged file.
    """
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


# --------------------------------------------------------------------------------------------------
# Moving digits: every clip has its own digits, starting places and velocities.


def reflect(places, free):
    """Fold a straight path onto [0, free]: a triangle wave, mirrored at the walls, exact at any speed."""
    return free - np.abs(places % (2 * free) - free) if free else np.zeros_like(places)


@functools.cache
def whole_velocities(low, high):
    """All whole-pixel velocities (n, yx) with low <= length <= high."""
    reach = int(high)
    velocities = rearrange(np.mgrid[-reach : reach + 1, -reach : reach + 1], "yx a b -> (a b) yx")
    lengths = np.linalg.norm(velocities, axis=1)
    return velocities[(low <= lengths) & (lengths <= high)]


def draw_velocity(rng, low, high, whole_pixels):
    """A velocity (yx) in pixels per frame with low <= length <= high."""
    if whole_pixels:
        return rng.choice(whole_velocities(low, high))
    length, angle = rng.uniform(low, high), rng.uniform(0, 2 * np.pi)
    return length * np.array([np.sin(angle), np.cos(angle)])


class MovingDigits:
    """Digits that move over a black square and bounce off its walls; where two overlap, the brighter shows.

    digits        how many in a clip: a number, or (lo, hi) to draw the number from
    speed         pixels per frame: a number, or (lo, hi) to draw it from; the direction is uniform
    whole_pixels  True: places and velocities are whole pixels, so away from walls a frame is an exact shift
                  of the last one. False: both are real numbers, rounded to draw, as in Moving MNIST
    bounce        at a wall 'reflect' mirrors the velocity, 'random' draws a new direction (and with whole
                  pixels a new speed: too few whole-pixel velocities are equally fast)
    """

    action_dim = 0

    def __init__(
        self, split, *, data_dir, frames, frame_size, digits, digit_size, speed, whole_pixels, bounce, seed
    ):
        self.fewest, self.most = as_range("digits", digits, least=1)
        self.low, self.high = as_range("speed", speed, least=0)
        require(split in FILES, f"split={split!r} is unknown; choose 'train' or 'val'")
        known = bounce in ("reflect", "random")
        require(known, f"bounce={bounce!r} is unknown; choose 'reflect' or 'random'")
        require(frames >= 1, f"frames={frames} makes no clip; set 1 or more")
        fits = 1 <= digit_size <= frame_size
        require(fits, f"digit_size={digit_size}: set 1 or more, and at most frame_size={frame_size}")
        fix = "widen it, for example to (1, 2), or set whole_pixels=False"
        possible = not whole_pixels or len(whole_velocities(self.low, self.high))
        require(possible, f"speed={speed!r} holds no whole-pixel velocity; {fix}")
        require(seed >= 0, f"seed={seed} is negative; set 0 or more")
        self.split, self.frames, self.digit_size, self.seed = split, frames, digit_size, seed
        self.whole_pixels, self.bounce = whole_pixels, bounce
        self.shape = (1, frame_size, frame_size)
        self.free = frame_size - digit_size  # a digit's top left corner stays in [0, free], down and across
        self.bank, self.origin = load_digits(data_dir, split, seed)

    def _leave_wall(self, rng, velocity, at_wall):
        """A new velocity with a part across each wall touched (at_wall, yx); the caller turns it inwards."""
        if not self.whole_pixels:
            length = np.linalg.norm(velocity)
            return draw_velocity(rng, length, length, whole_pixels=False)
        choices = whole_velocities(self.low, self.high)
        leaving = choices[(choices != 0)[:, at_wall].all(1)]
        return rng.choice(leaving if len(leaving) else choices)  # none: in a corner with speed 1

    def _random_bounces(self, rng, place, velocity):
        """Yield the places (yx) of a digit that leaves each wall in a new direction."""
        half = self.free / 2
        for _ in range(self.frames):
            yield place
            side = place - half  # at a wall it is half or -half
            if (side * np.sign(velocity) >= half).any():
                at_wall = np.abs(side) >= half
                velocity = self._leave_wall(rng, velocity, at_wall)
                velocity = np.where(at_wall, -np.sign(side) * np.abs(velocity), velocity)
            place = np.minimum(np.maximum(place + velocity, 0), self.free)

    def _path(self, rng):
        """The top left corners (t, yx) of one digit, whole pixels."""
        place = rng.integers(0, self.free + 1, 2) if self.whole_pixels else rng.uniform(0, self.free, 2)
        velocity = draw_velocity(rng, self.low, self.high, self.whole_pixels)
        if self.bounce == "random":
            places = list(self._random_bounces(rng, place, velocity))
        else:
            places = reflect(place + velocity * np.arange(self.frames)[:, None], self.free)
        return np.rint(places).astype(int)

    def clip(self, index):
        """Clip `index` as (uint8 (t, 1, h, w), None): digits have no actions."""
        rng, size = generator(self.seed, self.split, index), self.digit_size
        frames = np.zeros((self.frames, *self.shape), np.uint8)
        for _ in range(rng.integers(self.fewest, self.most + 1)):
            digit = Image.fromarray(self.bank[rng.integers(len(self.bank))])
            digit = np.asarray(digit.resize((size, size), Image.Resampling.BILINEAR))  # smooths as it shrinks
            for frame, (y, x) in zip(frames[:, 0], self._path(rng)):
                window = frame[y : y + size, x : x + size]
                np.maximum(window, digit, out=window)
        return frames, None


def open_source(cfg, split):
    """The source of 'train' or 'val' clips that the settings `cfg` describe. UserError if it cannot be had.

    Of several processes one should come first, alone: it may have to download the digits.
    """
    if cfg.dataset == "digits":
        names = "data_dir frames frame_size digits digit_size speed whole_pixels bounce seed"
        return MovingDigits(split, **{name: getattr(cfg, name) for name in names.split()})
    require(cfg.dataset != "video", f"data_dir={cfg.data_dir}: no prepared clips were found there")
    raise UserError(f"dataset={cfg.dataset!r} is unknown; choose 'digits' or 'video'")


# --------------------------------------------------------------------------------------------------
# Pixels to network values and back: zero mean, standard deviation sigma_data over the training set.


def measure(source, clips=256):
    """dict(mean, std), each a list of c floats: the pixels of the first clips on a scale from 0 to 1.

    A channel that never changes gets std 1: the network sees zeros, and its pixels come back exactly.
    """
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
    values = torch.tensor([stats["mean"], stats["std"]])
    return values.to(device, non_blocking=device.type == "cuda")[..., None, None]


def to_network(frames, stats, sigma_data):
    """uint8 (..., c, h, w) to float32 with zero mean and standard deviation sigma_data."""
    mean, std = per_channel(stats, frames.device)
    return (frames.float() / 255 - mean) * (sigma_data / std)


def to_pixels(x, stats, sigma_data):
    """The inverse of `to_network`: float (..., c, h, w) to uint8, rounded and clamped."""
    mean, std = per_channel(stats, x.device)
    return ((x.float() * (std / sigma_data) + mean) * 255).round().clamp(0, 255).to(torch.uint8)


# --------------------------------------------------------------------------------------------------
# Batches: the clips a process sees depend only on the step and its rank, so a run can stop and go on.


def load_batch(source, indices):
    """Clips `indices` as (uint8 (b, t, c, h, w), actions (b, t, ...) or None)."""
    frames, actions = zip(*map(source.clip, indices))
    actions = None if actions[0] is None else torch.from_numpy(np.stack(actions))
    return torch.from_numpy(np.stack(frames)), actions


class Batches:
    """An endless iterator over micro-batches (sample numbers, frames, actions), loaded ahead by a thread.

    Step k trains on samples k * batch_size to (k + 1) * batch_size - 1; sample number i is clip i. They go in
    order to the step's `accumulate` micro-batches, and those of each in order to the `world_size` processes.
    The numbers are b ints; frames (uint8 (b, t, c, h, w)) and actions are on `device`. `waited` is the time
    spent waiting for the thread, in seconds. Errors in the thread are raised by `next`. UserError if
    batch_size cannot be split evenly.
    """

    def __init__(self, source, batch_size, device, start=0, rank=0, world_size=1, accumulate=1, prefetch=4):
        parts = accumulate * world_size
        shares = f"accumulate={accumulate} x {world_size} processes = {parts} equal parts"
        even = batch_size > 0 and batch_size % parts == 0
        require(even, f"batch_size={batch_size} does not divide into {shares}; set a multiple of {parts}")
        require(prefetch >= 1, f"prefetch={prefetch} loads nothing ahead; set 1 or more")
        self.source, self.device, self.waited = source, torch.device(device), 0.0
        self.on_gpu = self.device.type == "cuda"
        if self.on_gpu and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.size = batch_size // parts  # samples in a micro-batch of this process
        self.stride = batch_size // accumulate  # and in one of all processes
        self.first = start * batch_size + rank * self.size
        self.queue, self.stopped = queue.Queue(prefetch), threading.Event()
        self.thread = threading.Thread(target=self._fill, daemon=True)
        self.thread.start()

    def _fill(self):
        """The thread: load micro-batches until told to stop. An error takes the place of a batch."""
        try:
            if self.on_gpu:
                torch.cuda.set_device(self.device)  # a new thread starts on GPU 0 and would take memory there
            for first in itertools.count(self.first, self.stride):
                if self.stopped.is_set():
                    return
                numbers = list(range(first, first + self.size))
                tensors = load_batch(self.source, numbers)
                if self.on_gpu:  # from pinned memory the copy overlaps with the GPU's work
                    tensors = [None if tensor is None else tensor.pin_memory() for tensor in tensors]
                self.queue.put((numbers, *tensors))
        except BaseException as error:
            self.queue.put(error)

    def __iter__(self):
        return self

    def __next__(self):
        if self.stopped.is_set():
            raise StopIteration
        began = time.perf_counter()
        item = self.queue.get()
        self.waited += time.perf_counter() - began
        if isinstance(item, BaseException):
            self.queue.put(item)  # for whoever asks again, as nothing else will come
            raise item
        numbers, frames, actions = item
        frames = frames.to(self.device, non_blocking=self.on_gpu)
        return numbers, frames, None if actions is None else actions.to(self.device, non_blocking=self.on_gpu)

    def close(self):
        """End the thread. Emptying the queue makes room for the one `put` it may be waiting in."""
        self.stopped.set()
        while not self.queue.empty():
            self.queue.get_nowait()
        self.thread.join(timeout=5)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# --------------------------------------------------------------------------------------------------
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
