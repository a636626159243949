"""Clips for training and evaluation: digits and worlds made on the fly, your own videos, recorded games.

    python data.py --src=clips/ --out=data/video --size=64 --fps=10     # prepares a folder of videos for training
    python data.py --env=LunarLander-v3 --out=data/lander               # records episodes under random actions
    python data.py --data_dir=data/mnist                                # fetches MNIST ahead of time

A source has `clip(index)`, `frames`, `shape`, `action_dim` and `origin`. Clip `index` is a pure function of
(seed, split, index): it depends neither on what was drawn before nor on how many processes draw.
"""
import collections
import contextlib
import functools
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import threading
import time
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from tqdm import tqdm

from config import UserError, all_finite, at_least, not_default, one_of, require, run

# -- preparing clips
src = ""                    # folder of films, GIFs, arrays and folders of pictures
env = ""                    # or a gymnasium environment to record
out = "data/video"          # the prepared folder; what was prepared before stays, and is not done again
size = 64                   # pixels, height and width
channels = 3                # 3: RGB, 1: grey
fps = 0.0                   # frames per second to convert to, by each film's clock; 0: every frame
min_frames = 2              # shorter clips are left out
letterbox = False           # black bars instead of a crop of the centre
val_share = 0.1             # of the sources, held out
episodes = 100              # of the environment
max_frames = 1000           # of an episode
seed = 0                    # of the environment and its actions
workers = 0                 # processes; 0: one per core
# -- fetching MNIST
data_dir = "data/mnist"     # folder of the two MNIST images files; missing ones are downloaded into it

class Unusable(UserError):
    """Something is wrong with one source of frames; it is left out, and the others are used."""


@contextlib.contextmanager
def reraise(message, *kinds, become=UserError):
    """A block whose errors of these kinds become a `become`, its text message(first line of the error's text)."""
    try:
        yield
    except UserError:                                       # it says already what is wrong
        raise
    except kinds as error:
        raise become(message((str(error) or type(error).__name__).splitlines()[0])) from error


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
    fix = f"delete it, and `python data.py --data_dir={path.parent}` downloads it again"
    with reraise(lambda error: f"{path} cannot be used: {error}; {fix}", OSError, EOFError, zlib.error, ValueError):
        raw = path.read_bytes()                             # of the errors above, the first three are gzip's
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        magic, n, h, w = np.frombuffer(raw, ">i4", count=4).tolist()    # a ValueError if there are not so many
        if magic != 2051 or min(n, h, w) < 1 or len(raw) != 16 + n * h * w:
            raise ValueError(f"no whole MNIST images file, with {len(raw)} bytes from {raw[:16]!r} on")
    return np.frombuffer(raw, np.uint8, offset=16).reshape(n, h, w)


def read_url(url, timeout):
    """The bytes at `url`. OSError after `timeout` seconds of silence, or if they take 30 times that in all."""
    content, deadline = bytearray(), time.monotonic() + 30 * timeout
    with (urllib.request.urlopen(url, timeout=timeout) as response,
          tqdm(total=response.length, desc=url.split("/")[-1], unit="B", unit_scale=True, disable=None) as bar):
        while part := response.read1(1 << 16):
            if time.monotonic() > deadline:                 # bytes that trickle in never make a silence
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
                if (digest := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5[name]:
                    raise OSError(f"wrong checksum of {len(content)} bytes (md5 {digest}, not {md5[name]})")
                temporary.write_bytes(content)
                return
            except (OSError, HTTPException) as error:
                reasons.append(f"{mirror} {str(error) or repr(error)}")
        raise UserError(f"{name}: {', '.join(reasons)}")


# ---------------------------------------------------------------------------------------------------
# The digit bank: MNIST from disk, else downloaded, else drawn with a font, and said to be so.

def draw_digit(text, rng):
    """A digit of Pillow's font, uint8 (28, 28): turned, scaled, sheared and thickened at random."""
    image, font = Image.new("L", (84, 84)), ImageFont.load_default(75)      # shrinking it smooths its edges
    ImageDraw.Draw(image).text((42, 42), text, 255, font, anchor="mm", stroke_width=int(rng.integers(0, 4)))
    image = image.rotate(rng.uniform(-17, 17), Image.Resampling.BILINEAR)   # degrees
    (x, y), shear = 1 / rng.uniform((0.75, 0.8), (1.15, 1.05)), rng.uniform(-0.35, 0.35)    # sideways per upwards
    affine = x, shear, 42 * (1 - x - shear), 0, y, 42 * (1 - y)             # where each output pixel comes from
    return np.asarray(image.transform((84, 84), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR).reduce(3))


def font_digits(split, seed):
    """uint8 (n, 28, 28), equally many of each digit; train and val come from different random streams."""
    rng, count = np.random.default_rng((seed, STREAMS[split] + 2, 0)), {"train": 3000, "val": 500}[split]
    return np.stack([draw_digit(str(i % 10), rng) for i in range(count)])


def mnist_files(data_dir):
    """{split: path} of the images files that are there, gzipped or unpacked; some archives have a dot for a dash."""
    paths = [(split, Path(data_dir, name)) for split, gz in FILES.items()
             for name in (gz[:-3].replace("-idx3", ".idx3"), gz[:-3], gz)]
    return {split: path for split, path in paths if os.path.exists(path)}


@functools.cache                                            # one attempt per process
def fetch(data_dir):
    """Download the images files that are missing. Returns the reason if it fails, else None."""
    try:
        for split in sorted(FILES.keys() - mnist_files(data_dir)):
            download(FILES[split], data_dir)
    except UserError as error:
        return str(error)


@functools.cache                                            # one message per process
def find_images(data_dir):
    """{split: path} of the images files. Downloads if there is no file at all."""
    reason = None if mnist_files(data_dir) else fetch(data_dir)
    files = mnist_files(data_dir)
    if len(files) < 2 and os.environ.get("RANK", "0") == "0":       # one of torchrun's processes says so
        failed = f"MNIST could not be downloaded into {data_dir} ({reason}). " if reason else ""
        only, names = "".join(map(str, files.values())), " and ".join(FILES.values())
        part = f"Only {only} is there: 'val' is the last tenth of its digits"
        print(f"{failed}{part if files else 'Using digits drawn with a font instead'}. For all of MNIST, put {names} "
              f"there, or let `python data.py --data_dir={data_dir}` download what is missing.", flush=True)
    return files


def load_digits(data_dir, split, seed):
    """(uint8 digits (n, h, w), origin in words) of 'train' or 'val', which share no digit; `seed` is the font's."""
    files = find_images(str(data_dir))
    if not files:
        return font_digits(split, seed), "digits drawn with Pillow's font, for want of MNIST"
    if len(files) == 2:
        digits = read_idx(files[split])
        return digits, f"MNIST {split} split, {len(digits)} digits from {Path(data_dir)}"
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


def draw_velocity(rng, low, high, whole_pixels, across=()):
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
    at_least(cfg, 0, "seed")
    at_least(cfg, 1, "frames", "digits", "digit_size")
    require(cfg.digit_size <= cfg.frame_size, f"digit_size={cfg.digit_size}: at most frame_size={cfg.frame_size}")
    is_range = len(cfg.speed) == 2 and 0 <= cfg.speed[0] <= cfg.speed[1] < np.inf
    require(is_range, f"speed={cfg.speed!r}: set (lo, hi), 0 <= lo <= hi, as in --speed=1,3")


def random_digit(bank, size, rng):
    digit = Image.fromarray(bank[rng.integers(len(bank))])
    return np.asarray(digit.resize((size, size), Image.Resampling.BILINEAR))             # smooths as it shrinks


def paint(picture, digit, y, x):
    """The digit, its top left corner at (y, x); where two overlap, the brighter shows."""
    window = picture[y:y + len(digit), x:x + len(digit)]
    np.maximum(window, digit, out=window)


class MovingDigits:
    """Digits that move over a black square and bounce off its walls. With cfg.whole_pixels, places and velocities are
    whole pixels, so that away from walls a frame is an exact shift of the last one; else real numbers, rounded to draw,
    as in Moving MNIST. At a wall cfg.bounce 'reflect' mirrors the velocity, and 'random' draws a new direction, with
    whole pixels also a new speed, as too few such velocities have the same."""

    def __init__(self, cfg, split):
        check_digits(cfg, split)
        one_of(cfg, bounce=("reflect", "random"))
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

    def path(self, rng):
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
            for frame, (y, x) in zip(frames[:, 0], self.path(rng)):
                paint(frame, digit, y, x)
        return frames, None


# ---------------------------------------------------------------------------------------------------
# A world to walk in: what a place looks like is settled, so coming back tests memory against a known truth.

MOVES = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])            # (y, x) of stay, up, down, left, right


class CanvasWorld:
    """A canvas strewn with digits, seen through a window that the actions move by cfg.speed[0] pixels, never beyond the
    canvas's edge. Action t led to frame t; the first is to stay. Walks often turn back."""

    def __init__(self, cfg, split):
        check_digits(cfg, split)
        self.move, self.free = int(cfg.speed[0]), cfg.canvas_size - cfg.frame_size
        require(1 <= self.move == cfg.speed[0], f"speed={cfg.speed!r}: the first, of moves, is a whole number from 1")
        least = cfg.frame_size + self.move
        require(cfg.canvas_size >= least, f"canvas_size={cfg.canvas_size}: at least {least}, a frame and a move")
        self.cfg, self.stream = cfg, (cfg.seed, STREAMS[split])
        self.frames, self.shape, self.action_dim = cfg.frames, (1, cfg.frame_size, cfg.frame_size), len(MOVES)
        self.bank, self.origin = load_digits(cfg.data_dir, split, cfg.seed)

    def canvas(self, rng):
        canvas = np.zeros((self.cfg.canvas_size, self.cfg.canvas_size), np.uint8)
        for y, x in rng.integers(0, self.cfg.canvas_size - self.cfg.digit_size + 1, (self.cfg.digits, 2)):
            paint(canvas, random_digit(self.bank, self.cfg.digit_size, rng), y, x)
        return canvas

    def walk(self, rng):
        """(y, x) of the window in every frame, in moves, and the actions that led there, t each: the last action again,
        the last move, the way back, or any; what would leave the canvas is drawn again."""
        back, edge, last = (0, 2, 1, 4, 3), self.free // self.move, rng.integers(1, len(MOVES))
        places, actions = [rng.integers(0, edge + 1, 2)], [0]
        while len(actions) < self.frames:
            choices = (actions[-1], last, back[last], rng.integers(len(MOVES)))
            action = rng.choice(choices, p=(0.3, 0.25, 0.2, 0.25))
            place = places[-1] + MOVES[action]
            if 0 <= place.min() and place.max() <= edge:
                places.append(place)
                actions.append(action)
                last = action or last
        return places, np.array(actions)

    def clip(self, index):
        """Clip `index` as (uint8 (t, 1, h, w), actions (t,))."""
        rng, size = np.random.default_rng((*self.stream, index)), self.cfg.frame_size
        canvas, (places, actions) = self.canvas(rng), self.walk(rng)
        return np.stack([canvas[None, y:y + size, x:x + size] for y, x in self.move * np.array(places)]), actions


# ---------------------------------------------------------------------------------------------------
# Videos from files: frames with their times. Latents are arrays of floats, and stay as they are.

PICTURES, ARRAYS = (".png", ".jpg", ".jpeg", ".webp", ".bmp"), (".npy", ".npz")
FILMS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".ts")


def reading(path):
    """Each decoder has its own ways to fail on a damaged file: all become Unusable, and name it."""
    return reraise(lambda error: f"{path} cannot be read: {error}", Exception, become=Unusable)


def read_array(path):
    """The frames of a .npy file, or of the one array in a .npz file: uint8 h w c, or float c h w."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(array, np.lib.npyio.NpzFile):
        require(len(array.files) == 1, f"{path} holds {len(array.files)} arrays, expected one", Unusable)
        array = array[array.files[0]]
    dims = 4 if array.shape[-1:] in ((1,), (3,), (4,)) else 3           # h w 3 is a picture, not frames 3 wide
    video = array.dtype == np.uint8 and array.ndim == dims and min(array.shape[1:]) > 0
    latents = array.dtype.kind == "f" and array.ndim == 4 and array.shape[3] != 3        # that would be colours
    require(video or latents, f"{path} holds {array.dtype} {array.shape}: expected uint8 frames t h w [c], or latents, "
            "floats t c h w", Unusable)
    return array[..., None] if array.ndim == 3 else array


def read_pictures(path):
    """(seconds, frame) of a GIF, by its clock; a single picture has no time."""
    with Image.open(path) as pictures:
        milliseconds = 0
        stored = [pictures] if pictures.format == "MPO" else ImageSequence.Iterator(pictures)    # MPO: photo, previews
        for picture in stored:
            require(not picture.mode.startswith(("I", "F")), f"{path} has more than 8 bits a channel", Unusable)
            upright = ImageOps.exif_transpose(picture)
            upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
            yield milliseconds / 1000 if path.suffix.lower() == ".gif" else None, np.asarray(upright)
            milliseconds += picture.info.get("duration") or 100         # what players make of none


def read_film(path):
    require(importlib.util.find_spec("av"), f"{path}: films are read by PyAV, which is not installed: pip install av "
                                            "(or give .gif, .png or .npy)", Unusable)
    import av
    too_old = f"{path}: films are read by PyAV 14.1 or newer, not {av.__version__}: pip install -U av"
    require(hasattr(av.VideoFrame, "rotation"), too_old, Unusable)
    with av.open(str(path)) as film:
        require(film.streams.video, f"{path} has no video", Unusable)
        stream, untimed = film.streams.video[0], film.format.name == "avi"      # which stores no display times
        stretch = stream.sample_aspect_ratio or 1           # frames are stretched and turned, as players show them
        for number, frame in enumerate(film.decode(video=0)):
            picture = frame.to_ndarray(format="rgb24", width=round(frame.width * stretch), height=frame.height)
            seconds = frame.time if frame.time is not None and not untimed else number / stream.average_rate
            yield float(seconds), np.rot90(picture, frame.rotation // 90)


def pictures_in(folder):
    """Its pictures, 2.png before 10.png."""
    def numbers(path):
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]
    return sorted((path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.name[0] != "."),
                  key=numbers)


def decode(path):
    """(seconds or None, frame) of a film, GIF, picture, folder of pictures or array, one by one; a frame is uint8
    h w c, a latent float c h w. Unusable names the file and what is wrong with it."""
    path, kind = Path(path), Path(path).suffix.lower()
    require(path.exists(), f"there is no file {path}", Unusable)
    with reading(path):
        if path.is_dir():
            require(pictures := pictures_in(path), f"{path} is a folder without pictures", Unusable)
            for file in pictures:
                with reading(file):                         # which of them is damaged
                    yield from read_pictures(file)
        elif kind in ARRAYS:
            yield from ((None, frame) for frame in read_array(path))
        else:
            yield from (read_pictures if kind in (".gif", *PICTURES) else read_film)(path)


def crop(frame, shape, letterbox=False):
    """A uint8 frame h w c in `shape` (c, h, w): its centre cropped to the proportions, or with black bars, then
    resized. A latent c h w stays in its own."""
    if frame.dtype != np.uint8:
        with np.errstate(over="ignore"):                    # what becomes infinite, `write_frames` refuses
            return frame.astype(np.float16)
    picture = Image.fromarray(frame[..., 0] if frame.shape[2] == 1 else frame)
    if picture.mode == "RGBA":                              # on black: what is transparent may have any colour
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    picture = picture.convert("L" if shape[0] == 1 else "RGB")
    picture = (ImageOps.pad if letterbox else ImageOps.fit)(picture, shape[:0:-1], Image.Resampling.BILINEAR)
    return rearrange(np.atleast_3d(np.asarray(picture)), "h w c -> c h w")


def at_rate(timed, fps):
    """From (seconds, item) pairs, the item shown at each tick of a clock of `fps` ticks a second, which starts with the
    first item. One that comes up to .15 ticks late counts as in time: files round times, GIFs to hundredths. Every item
    if fps is 0, or if they have no times."""
    shown, began, ticks = None, None, 0
    for seconds, item in timed:
        if not fps or seconds is None:
            yield item
            continue
        began = seconds if began is None else began
        now = (seconds - began) * fps
        due = math.ceil(now - 0.15)                         # ticks before this item comes on
        yield from itertools.repeat(shown, due - ticks)
        shown, ticks, late = item, max(due, ticks), now + 0.15
    if began is not None and ticks <= late:
        yield shown


def actions_beside(path):
    """clip.actions.npy beside clip.mp4 or beside the folder clip."""
    return path.with_name(f"{path.name if path.is_dir() else path.stem}.actions.npy")


def with_actions(timed, path):
    """(seconds, frame) -> (seconds, (frame, action)); the action is None if no file of actions lies beside `path`."""
    beside = actions_beside(path)
    if not beside.exists():
        yield from ((seconds, (frame, None)) for seconds, frame in timed)
        return
    with reading(beside):
        actions = np.load(beside, allow_pickle=False)
        given, count, kind = f"{beside} has {len(actions)} actions", 0, (actions.dtype.kind, actions.ndim)
    least, most = (-1e6, 1e6) if kind == ("f", 2) else (0, 65535)
    fits = kind in (("f", 2), ("i", 1), ("u", 1)) and not ((actions < least) | (actions > most)).any()   # NaN: unknown
    require(fits, f"{beside} holds {actions.dtype} {actions.shape}: expected a whole number from 0 to 65535, or floats "
                  "from -1e6 to 1e6, for each frame", Unusable)
    for count, (seconds, frame) in enumerate(timed, start=1):
        require(count <= len(actions), f"{given}, and {path.name} has more frames", Unusable)
        yield seconds, (frame, actions[count - 1])
    require(count == len(actions), f"{given} for {count} frames", Unusable)


# ---------------------------------------------------------------------------------------------------
# Preparing clips: of each source NAME.raw, its frames one after another, perhaps NAME.actions.npy, and NAME.json,
# which is written last: what has one is whole. meta.json, made of them at the end, is all that training looks up.

RECORD_VERSION = 2                                          # clips with other records are prepared again
TWO_FILES = "prepare two files or more, as one is held out; one long film can be cut in two"


def made_with(cfg):
    """The settings that clips are made with, the same for all of a set."""
    names = ("env", "size", "channels", "letterbox", "min_frames", *(("max_frames", "seed") if cfg.env else ("fps",)))
    return {name: getattr(cfg, name) for name in names}


def find_sources(folder):
    """Names of the videos and folders of pictures under `folder`; "." is itself a folder of pictures."""
    pictures, films, others = set(), set(), []
    for where, folders, files in os.walk(folder, onerror=lambda error: print(f"left out: {error}", flush=True)):
        where = Path(where).relative_to(folder)
        folders[:] = [name for name in folders if name[0] != "."]       # hidden ones are none of the user's
        for path in (where / name for name in (*folders, *files) if name[0] != "."):
            if path.suffix.lower() in PICTURES:
                pictures.add(where)
            elif path.name.endswith(".actions.npy"):
                continue
            elif path.suffix.lower() in (".gif", *ARRAYS, *FILMS):
                films.add(path)
            elif not Path(folder, path).is_dir():
                others.append(path)
            elif Path(folder, path).is_symlink():
                print(f"left out: {path} is a link to a folder: give the folder itself as --src", flush=True)
    if others:
        print(f"{len(others)} other files, such as {others[0]}, are of no kind that is read", flush=True)
    for where in pictures & {path.parent for path in films}:
        print(f"{Path(folder, where)} holds pictures beside films: they are taken for one more clip", flush=True)
    return sorted(map(str, pictures | films))


def play_episode(cfg, number):
    """(frame h w c, action) of an episode of a gymnasium environment under random actions, the first of them zeros;
    discrete ones count from 0."""
    import gymnasium
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")       # pictures without a window, or word that there is no screen
    seed = int(np.random.SeedSequence((cfg.seed, number)).generate_state(1)[0])
    with reraise(lambda error: f"--env={cfg.env}, episode {number}: {error}", Exception):
        with contextlib.closing(gymnasium.make(cfg.env, render_mode="rgb_array")) as env:
            space, spaces = env.action_space, gymnasium.spaces
            env.reset(seed=seed)
            space.seed(seed)
            require(isinstance(space, spaces.Discrete) or isinstance(space, spaces.Box) and len(space.shape) == 1,
                    f"--env={cfg.env}: actions {space}; only Discrete and flat Box ones can be recorded")
            first, action, over = getattr(space, "start", 0), np.zeros_like(space.sample()), False
            for _ in range(cfg.max_frames):
                frame = np.asarray(env.render())
                require(frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3,
                        f"--env={cfg.env}: its picture is {frame.dtype} {frame.shape}, expected uint8 h w 3")
                yield frame, action
                if over:
                    break
                action = space.sample()
                _, _, terminated, truncated, _ = env.step(action)
                action, over = action - first, terminated or truncated


def write_frames(path, name, pairs, cfg):
    """Writes the frames of the clip `name` one by one, as they will be trained on. Returns their actions, and a record
    of what they are."""
    actions, shape, total = [], None, 0
    with replacing(path) as temporary, open(temporary, "wb") as file:
        for frame, action in pairs:
            frame = crop(frame, (cfg.channels, cfg.size, cfg.size), cfg.letterbox)
            shape = shape or frame.shape
            require(frame.shape == shape and np.isfinite(frame).all(), f"{name}: frame {len(actions) + 1} is "
                    f"{frame.shape} after {shape}, or not finite in float16", Unusable)
            file.write(frame.tobytes())
            actions.append(action)
            total = total + np.array(moments(frame[None]))
        count, least = len(actions), cfg.min_frames
        require(count >= least, f"{name}: {count} frames, fewer than min_frames={least}", Unusable)
    mean, square = (total / count).tolist()
    return actions, dict(frames=count, shape=shape, dtype=frame.dtype.name, mean=mean, square=square)


def write_actions(path, actions):
    """Discrete ones (t,) as whole numbers, continuous ones (t, a) as floats; nothing where there are none."""
    if actions[0] is None:
        return dict(action_dim=0, discrete=False, reach=0.0)
    actions = np.stack(actions)
    discrete, (reach, square) = actions.ndim == 1, action_moments(actions)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, actions.astype(np.int64 if discrete else np.float32))
    return dict(action_dim=int(actions.max()) + 1 if discrete else actions.shape[1], discrete=discrete,
                reach=reach, action_square=square.tolist())


def clip_path(folder, name, suffix):
    """The path of a file of the clip `name`. Not by `with_suffix`, as a name may be "." or have dots in it."""
    return Path(folder, "clips", f"{name}{suffix}")


def damage(folder, kind, name, frames, acted):
    """What is wrong with the files of the clip `name`, frames of a kind (shape, dtype), or None if nothing is."""
    raw, actions = clip_path(folder, name, ".raw"), clip_path(folder, name, ".actions.npy")
    expected = frames * math.prod(kind["shape"]) * np.dtype(kind["dtype"]).itemsize
    found = raw.stat().st_size if raw.exists() else 0
    if found != expected:
        return f"{raw} has {found} bytes, and should have {expected}"
    if acted and not actions.exists():
        return f"{actions} is not there"


def prepare_source(cfg, name):
    """Stores the frames of one source, unless this was done. Returns why it is unusable, or None."""
    raw, record_file, actions_file = (clip_path(cfg.out, name, suffix) for suffix in (".raw", ".json", ".actions.npy"))
    path = Path(cfg.src, name).absolute()
    if len(os.fsencode(raw.name)) > 220:                    # of 255, as temporary files have longer ones
        return f"{name}: its name is too long: rename it"
    sources = [*(pictures_in(path) if path.is_dir() else [path]), actions_beside(path)] if cfg.src else []
    made_of = [RECORD_VERSION, made_with(cfg), *([str(file), file.stat().st_size, file.stat().st_mtime_ns]
                                                 for file in sources if file.exists())]
    if record_file.exists():
        record = read_json(record_file)
        same = isinstance(record, dict) and record.get("made_of") == made_of
        if same and not damage(cfg.out, record, name, record["frames"], record["action_dim"]):
            return None
    try:
        pairs = play_episode(cfg, int(name)) if cfg.env else at_rate(with_actions(decode(path), path), cfg.fps)
        actions, record = write_frames(raw, name, pairs, cfg)
    except Unusable as error:
        return str(error)
    record |= write_actions(actions_file, actions) | dict(name=name, made_of=made_of)
    with replacing(record_file) as temporary:
        temporary.write_text(json.dumps(record))


def read_json(path):
    fix = "delete it, and prepare the clips again"
    with reraise(lambda error: f"{path} cannot be read ({error}): {fix}", OSError, ValueError):
        return json.loads(path.read_text())


def read_meta(folder):
    meta = read_json(Path(folder, "meta.json"))
    ours = isinstance(meta, dict) and isinstance(meta.get("made_with"), dict)
    require(ours, f"{folder}/meta.json is not of this program: choose another folder")
    return meta


def held_out(names, share, before):
    """The names to hold out, at least one and never all: those whose hash is low. When a set grows, what was held out
    `before` stays so, and what was trained on too."""
    draw = {name: int(hashlib.md5(os.fsencode(name), usedforsecurity=False).hexdigest(), 16) / 2 ** 128
            for name in names}
    held, trained = ({clip[0] for clip in before[split]} for split in ("val", "train"))
    count = max(1, len(held & draw.keys()), sum(drawn < share for name, drawn in draw.items() if name not in trained))
    return sorted(names, key=lambda name: (name not in held, name in trained, draw[name]))[:min(count, len(names) - 1)]


def combine(records, share, left_out, before):
    """The contents of meta.json, from the records of all clips; those unlike most in dtype or shape are left out."""
    kinds = {record["name"]: (record["dtype"], *record["shape"]) for record in records}
    kind, count = collections.Counter(kinds.values()).most_common(1)[0]
    unlike = {name: f"{name}: {other}, unlike {kind} of {count} others"
              for name, other in kinds.items() if other != kind}
    for reason in unlike.values():
        print(f"left out: {reason}", flush=True)
    left_out, records = left_out | unlike, [record for record in records if record["name"] not in unlike]
    acted = [record for record in records if record["action_dim"]]
    actions = {"discrete actions" if record["discrete"] else f"vectors of {record['action_dim']}": record["name"]
               for record in acted}
    require(len(actions) < 2, "actions are of different kinds: "
                              f"{', '.join(f'{name} has {some}' for some, name in actions.items())}: take some out")
    frames = np.array([record["frames"] for record in records])
    mean, square = (frames @ np.array([record[key] for record in records]) / frames.sum() for key in ("mean", "square"))
    val = set(held_out([record["name"] for record in records], share, before))
    clips = [(record["name"], record["frames"], bool(record["action_dim"])) for record in records]
    squares, counts = ([record[key] for record in acted] for key in ("action_square", "frames"))
    return dict(statistics(mean, square), dtype=kind[0], shape=kind[1:], left_out=left_out,
                action_dim=max((record["action_dim"] for record in acted), default=0),
                discrete=any(record["discrete"] for record in acted),
                reach=max((record["reach"] for record in acted), default=0.0),
                action_rms=np.sqrt(np.average(squares, 0, counts)).tolist() if acted else 0.0,
                train=[clip for clip in clips if clip[0] not in val], val=[clip for clip in clips if clip[0] in val])


def check_prepare(cfg):
    """UserError for settings that cannot work, and for a folder prepared with others. Starts a new set's meta.json."""
    require(not (cfg.src and cfg.env), "give --src (files) or --env (a gymnasium environment), not both")
    all_finite(cfg)
    at_least(cfg, 2, "max_frames", "min_frames")
    at_least(cfg, 1, "size", "episodes")
    at_least(cfg, 0, "fps", "workers", "seed")
    require(cfg.channels in (1, 3), f"--channels={cfg.channels}: 1 (grey) or 3 (RGB)")
    require(0 < cfg.val_share < 1, f"--val_share={cfg.val_share}: between 0 and 1")
    require(not cfg.src or os.path.isdir(cfg.src), f"--src={cfg.src}: there is no such folder")
    require(not cfg.env or importlib.util.find_spec("gymnasium"),
            f"--env={cfg.env}: gymnasium, which runs it, is not installed: pip install gymnasium")
    meta, wanted = Path(cfg.out, "meta.json"), made_with(cfg)
    before = read_meta(cfg.out)["made_with"] if meta.exists() else {}
    changed = [f"{name} was {before[name]}, now {now}" for name, now in wanted.items() if before.get(name, now) != now]
    if before and any(Path(cfg.out).glob("clips/**/*.json")):
        require(not changed, f"{cfg.out} was prepared with other settings ({'; '.join(changed)}): choose another --out")
    else:                                                   # nothing was prepared with them
        with replacing(meta) as temporary:
            temporary.write_text(json.dumps(dict(made_with=wanted, train=[], val=[])))


def begin_worker():
    """In a worker process: ends it as soon as the process that started it has ended."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def in_processes(cfg, names):
    """{name: why it is unusable}, out of several processes."""
    left_out = {}
    pool = ProcessPoolExecutor(cfg.workers or os.cpu_count(), multiprocessing.get_context("spawn"), begin_worker)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it: Ctrl-C reaches this process alone
    jobs = {pool.submit(prepare_source, cfg, name): name for name in names}
    signal.signal(signal.SIGINT, handler)
    try:
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="clip", disable=None):
            if reason := job.result():
                left_out[jobs[job]] = reason
                tqdm.write(f"left out: {reason}")
    except BrokenProcessPool as error:
        raise UserError("a process that prepared clips was killed, perhaps for want of memory; what is finished is "
                        "kept: run the same again, with fewer --workers") from error
    except KeyboardInterrupt:
        print("\nfinishing the clips that have begun, and keeping them; once more to quit at once", flush=True)
        raise
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:
            os._exit(130)                                   # the workers notice
    return left_out


def prepare(cfg):
    """Prepares clips of all sources in cfg.out; what was done before is not done again. Clips whose source is gone stay
    on the disk but leave the set, as one that was only moved would be in it twice."""
    check_prepare(cfg)
    folder = Path(cfg.out)
    names = [f"{number:06d}" for number in range(cfg.episodes)] if cfg.env else find_sources(cfg.src)
    require(names, f"--src={cfg.src}: no file in there ends in {', '.join((*FILMS, '.gif', *ARRAYS, *PICTURES))}")
    for left_behind in folder.glob("clips/**/.*.raw.*"):    # by a process that was killed
        left_behind.unlink()
    if cfg.fps and (timeless := [name for name in names if not name.lower().endswith((".gif", *FILMS))]):
        print(f"{len(timeless)} sources have no clock: all their frames are kept, whatever fps", flush=True)
    left_out, before = in_processes(cfg, names), read_json(folder / "meta.json")
    if gone := [name for name, *_ in (*before["train"], *before["val"]) if name not in names]:
        print(f"{len(gone)} clips of before, such as {gone[0]}, are no longer there: left out", flush=True)
    records = [read_json(clip_path(folder, name, ".json")) for name in names if name not in left_out]
    require(records, f"nothing in {cfg.src or cfg.env} was usable")
    meta = before | combine(records, cfg.val_share, left_out, before)
    if cfg.env and meta["discrete"]:                        # some actions may never have been drawn
        import gymnasium
        with contextlib.closing(gymnasium.make(cfg.env)) as env:
            meta["action_dim"] = int(env.action_space.n)
    with replacing(folder / "meta.json") as temporary:
        temporary.write_text(json.dumps(meta, indent=1))
    for split in ("train", "val"):
        print(f"{folder}: {len(meta[split])} {split} clips, {sum(frames for _, frames, _ in meta[split])} frames of "
              f"{meta['shape']}, {meta['action_dim']} actions", flush=True)
    print(f"{len(meta['left_out'])} sources left out")
    if not meta["val"]:
        print(f"with one clip alone nothing can be trained: {TWO_FILES}")


# ---------------------------------------------------------------------------------------------------
# Prepared clips, mapped into memory: a batch reads the pages it needs.

class VideoClips:
    """Random windows of prepared clips: cfg.frames frames, cfg.stride apart, with cfg.flip half of those for training
    mirrored. Where a set has actions, a clip without them has unknown ones: -1, or NaN."""

    def __init__(self, cfg, split):
        folder = Path(cfg.data_dir)
        require((folder / "meta.json").is_file(), f"data_dir={folder}: no prepared clips are there; prepare some with "
                                                  f"`python data.py --src=FOLDER_OF_VIDEOS --out={folder}`")
        self.meta, self.folder, self.cfg, self.frames = read_meta(folder), folder, cfg, cfg.frames
        self.span, self.flip = (cfg.frames - 1) * cfg.stride + 1, cfg.flip and split == "train"
        at_least(cfg, 1, "frames", "stride")
        require("shape" in self.meta, f"data_dir={folder} was not prepared to the end: run `python data.py` again")
        require(self.meta[split], f"data_dir={folder} has no {split} clips: {TWO_FILES}")
        self.clips = [clip for clip in self.meta[split] if clip[1] >= self.span]
        require(self.clips, f"data_dir={folder}: none of its {len(self.meta[split])} {split} clips has the {self.span} "
                            "frames that `frames` and `stride` ask for: set them lower, or prepare more videos")
        self.shape, self.action_dim = tuple(self.meta["shape"]), self.meta["action_dim"]
        require(cfg.frame_size == self.shape[1], f"frame_size={cfg.frame_size}: the clips in {folder} are of "
                                                 f"{self.shape[1]}: train with --frame_size={self.shape[1]}")
        require(not (cfg.flip and self.action_dim), "flip=True would mirror frames, and not their actions: set False")
        self.stats = {key: self.meta.get(key) for key in ("mean", "std", "discrete", "reach", "action_rms")}
        made = {key: self.meta["made_with"].get(key) for key in ("fps", "letterbox")}        # of films, for prompts
        self.stats |= {"latent": self.meta["dtype"] != "uint8", "made": made}
        for clip in self.clips:
            wrong = damage(folder, self.meta, *clip)
            require(not wrong, f"{wrong}: prepare the clips again, which mends it")
        self.ends = np.cumsum([length - self.span + 1 for _, length, _ in self.clips])   # of each clip's windows
        self.stream = (cfg.seed, STREAMS[split])
        total = sum(length for _, length, _ in self.clips)
        digest = zlib.crc32(json.dumps([self.meta["mean"], self.meta["std"], self.meta["made_with"]]).encode())
        self.origin = f"{len(self.clips)} {split} clips, {total} frames, of {folder}, set {digest:08x}"

    def clip(self, index):
        """Clip `index` as (uint8 or float16 (t, c, h, w), actions (t,) or (t, a) or None)."""
        rng = np.random.default_rng((*self.stream, index))
        window = rng.integers(self.ends[-1])
        number = np.searchsorted(self.ends, window, side="right")       # each clip's windows count from its last back
        name, length, acted = self.clips[number]
        path, start = clip_path(self.folder, name, ".raw"), self.ends[number] - 1 - window
        taken = slice(start, start + self.span, self.cfg.stride)
        frames = np.array(np.memmap(path, self.meta["dtype"], "r", shape=(length, *self.shape))[taken])
        if self.flip and rng.random() < 0.5:
            frames = frames[..., ::-1].copy()
        if not self.action_dim:
            return frames, None
        if acted:
            return frames, np.load(clip_path(self.folder, name, ".actions.npy"))[taken]
        return frames, np.full(self.frames, -1) if self.meta["discrete"] else \
            np.full((self.frames, self.action_dim), np.nan, np.float32)


def open_source(cfg, split):
    """The source of 'train' or 'val' clips. One process should come first, alone: it may have to download them."""
    sources = {"digits": MovingDigits, "world": CanvasWorld, "video": VideoClips}
    require(cfg.dataset in sources, f"dataset={cfg.dataset!r} is unknown; choose {', '.join(sources)}")
    return sources[cfg.dataset](cfg, split)


# ---------------------------------------------------------------------------------------------------
# Pixels to network values and back: zero mean, standard deviation sigma_data over the training set.

def moments(frames):
    """Mean and mean square of each channel of frames (t, c, h, w), on a scale from 0 to 1."""
    values = np.divide(frames, 255, dtype=np.float64)       # numpy 1 would keep float16, and sum up in it
    return values.mean((0, 2, 3)), (values ** 2).mean((0, 2, 3))


def action_moments(actions):
    """The largest magnitude of actions (t,) or (t, a), and each number's mean square; unknown ones count as 0."""
    known = np.nan_to_num(actions).astype(np.float64)
    return float(np.abs(known).max()), np.square(known).mean(0)


def statistics(mean, square):
    """dict(mean, std), each a list of c floats. A channel that never changes gets a small std, so that the network's
    errors in it, which `to_pixels` multiplies by std, stay small."""
    variance = square - mean ** 2
    std = np.where(variance > 1e-9 * square, variance, 0) ** 0.5        # what is less is rounding
    return dict(mean=mean.tolist(), std=std.clip(std.max() / 100 or 1).tolist())


def measure(source, clips=256):
    """The stats of a source: `statistics` of its first clips, whether they are latents, and of their actions the kind,
    the largest magnitude and the root mean square. Prepared clips have all of them in `source.stats`."""
    if hasattr(source, "stats"):
        return source.stats
    measured, acted = [], []
    for index in range(clips):
        frames, actions = source.clip(index)
        require(frames.shape == (source.frames, *source.shape) and frames.dtype in (np.uint8, np.float16), f"clip "
                f"{index} is {frames.dtype} {frames.shape}: expected uint8, or float16 latents, of frames and shape "
                f"{(source.frames, *source.shape)}")
        measured.append(moments(frames))
        acted.append(action_moments(np.zeros(1) if actions is None else actions))
    reach, squares = zip(*acted)
    return statistics(*np.mean(measured, axis=0)) | {
        "latent": frames.dtype != np.uint8, "discrete": actions is None or actions.dtype.kind != "f",
        "reach": max(reach), "action_rms": np.sqrt(np.mean(squares, axis=0)).tolist()}


def per_channel(stats, device):
    """Mean and standard deviation, (c, 1, 1) each. A blocking copy would wait for the GPU's queued work."""
    return torch.tensor([stats["mean"], stats["std"]]).to(device, non_blocking=True)[..., None, None]


def to_network(frames, stats, sigma_data):
    """uint8 or float16 (..., c, h, w) to float32 with zero mean and standard deviation sigma_data."""
    mean, std = per_channel(stats, frames.device)
    return (frames.float() / 255 - mean) * (sigma_data / std)


def unit_actions(actions, stats):
    """Vectors, each of their numbers scaled to a root mean square of 1 over the training set; others as they are."""
    if actions is None or not actions.is_floating_point():
        return actions
    rms = torch.tensor(stats.get("action_rms") or 1.0).to(actions.device, non_blocking=True)
    return actions / torch.where(rms > 0, rms, 1)


def to_pixels(x, stats, sigma_data):
    """The inverse of `to_network`: float (..., c, h, w) to uint8, rounded and clamped, or to float16 latents."""
    mean, std = per_channel(stats, x.device)
    values = (x.float() * (std / sigma_data) + mean) * 255
    return values.half() if stats.get("latent") else values.round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------
# Batches: the clips a process sees depend only on the step and its rank, so a run can stop and go on.

def load_batch(source, indices, device="cpu"):
    """Clips `indices` as [uint8 or float16 (b, t, c, h, w), actions (b, t, ...) or None]."""
    frames, actions = zip(*map(source.clip, indices))
    return [None if part[0] is None else torch.from_numpy(np.stack(part)).to(device) for part in (frames, actions)]


class Batches(Iterator, contextlib.AbstractContextManager):
    """An endless iterator over micro-batches (sample numbers, frames, actions), loaded ahead by threads, whose
    errors `next` raises. The numbers are b ints; frames (b, t, c, h, w), as stored, and actions are on `device`. Step k
    trains on samples k * batch_size to (k + 1) * batch_size - 1; sample number i is clip i. They go in order to the
    step's `accumulate` micro-batches, and those of each in order to the `world_size` processes."""

    def __init__(self, source, batch_size, device, start=0, rank=0, world_size=1, accumulate=1, prefetch=4):
        parts = accumulate * world_size
        require(batch_size > 0 and batch_size % parts == 0, f"batch_size={batch_size} cannot be split evenly over "
                f"accumulate={accumulate} x {world_size} processes; set a multiple of {parts}")
        self.source, self.device, self.size = source, torch.device(device), batch_size // parts
        self.firsts = itertools.count(start * batch_size + rank * self.size, batch_size // accumulate)
        self.threads = ThreadPoolExecutor(prefetch)
        self.pending = [self.threads.submit(self._load, next(self.firsts)) for _ in range(prefetch)]

    def _load(self, first):
        """In a thread: the micro-batch from sample number `first` on."""
        if self.device.index:
            torch.cuda.set_device(self.device)              # a new thread starts on GPU 0 and would take memory there
        numbers = range(first, first + self.size)
        tensors = load_batch(self.source, numbers)
        if self.device.type == "cuda":                      # from pinned memory the copy overlaps with the GPU's work
            tensors = [None if tensor is None else tensor.pin_memory() for tensor in tensors]
        return list(numbers), *tensors

    def __next__(self):
        numbers, *tensors = self.pending[0].result()          # an error stays there, for whoever asks again
        self.pending = [*self.pending[1:], self.threads.submit(self._load, next(self.firsts))]
        return numbers, *(None if tensor is None else tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def __exit__(self, *_):
        self.threads.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------
# The script.

def main(cfg):
    """Prepares clips, or fetches MNIST ahead of time and says what is there."""
    given = not_default(cfg, globals())
    where, idle = ("with --src", given & {"episodes", "max_frames", "seed", "data_dir"}) if cfg.src else \
        ("with --env", given & {"fps", "data_dir"}) if cfg.env else ("without --src or --env", given - {"data_dir"})
    require(not idle, f"--{', --'.join(sorted(idle))} does nothing {where}: leave it out")
    if cfg.src or cfg.env:
        return prepare(cfg)
    if reason := fetch(cfg.data_dir):
        print(f"not downloaded: {reason}", flush=True)
    for split in FILES:
        digits, origin = load_digits(cfg.data_dir, split, seed=0)
        numbers = f"{len(digits)} digits, mean {digits.mean() / 255:.4f}, std {digits.std() / 255:.4f}"
        print(f"{split}: {numbers} ({origin})", flush=True)


if __name__ == "__main__":
    run(main, globals())
