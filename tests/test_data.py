"""data.py: the same clips whoever asks and whenever, motion that obeys its rules, and no silent fallback."""

import contextlib
import gzip
import hashlib
import itertools
import math
import socket
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from config import UserError, plain_settings

REAL = Path(__file__).resolve().parents[2] / "shared" / "mnist"
TRAIN, TEST = data.FILES["train"], data.FILES["val"]
SETTINGS = dict(
    frames=12, frame_size=24, digits=2, digit_size=10, speed=(1, 3), whole_pixels=True, bounce="reflect"
)


def idx_bytes(images, magic=2051):
    return np.array([magic, *images.shape], ">i4").tobytes() + images.tobytes()


def random_images(n, seed=0, side=28):
    return np.random.default_rng(seed).integers(1, 256, (n, side, side), np.uint8)


def folder_with(tmp_path, **images):
    """A data_dir that holds the given images as its train and / or val file."""
    for split, array in images.items():
        (tmp_path / data.FILES[split]).write_bytes(gzip.compress(idx_bytes(array)))
    return tmp_path


@pytest.fixture
def bank(tmp_path):
    return folder_with(tmp_path, train=random_images(40, 1), val=random_images(20, 2))


def source(data_dir, split="train", seed=0, **changes):
    return data.MovingDigits(SimpleNamespace(data_dir=data_dir, seed=seed, **{**SETTINGS, **changes}), split)


# ---- determinism


@pytest.mark.parametrize("bounce, whole", list(itertools.product(["reflect", "random"], [True, False])))
def test_clip_is_a_function_of_seed_split_and_index(bank, bounce, whole):
    make = partial(source, bank, bounce=bounce, whole_pixels=whole, digits=3)
    first, again = make(), make()
    expected = [first.clip(i)[0] for i in range(4)]
    np.random.seed(7)
    for i in (3, 1, 2, 0):  # in another order, from another object
        assert np.array_equal(again.clip(i)[0], expected[i])
    assert expected[0].shape == (12, 1, 24, 24) and expected[0].dtype == np.uint8
    assert first.clip(0)[1] is None
    assert first.shape == (1, 24, 24) and first.action_dim == 0 and first.frames == 12
    others = expected[1:] + [make(seed=1).clip(0)[0], make(split="val").clip(0)[0]]
    assert not any(np.array_equal(expected[0], other) for other in others)


def test_train_and_val_have_distinct_streams_over_the_same_digits(tmp_path):
    same = random_images(5)
    folder = folder_with(tmp_path, train=same, val=same)
    assert not np.array_equal(source(folder).clip(0)[0], source(folder, "val").clip(0)[0])


@pytest.mark.parametrize("digits", [1, 3])
def test_a_clip_holds_as_many_digits_as_set(tmp_path, digits):
    blocks = np.broadcast_to(np.arange(1, 101, dtype=np.uint8)[:, None, None], (100, 28, 28))
    folder = folder_with(tmp_path, train=blocks, val=blocks)
    clips = source(folder, frame_size=96, frames=60, digits=digits)
    counts = [len(np.unique(clips.clip(i)[0])) - 1 for i in range(20)]
    assert max(counts) == digits and sum(counts) >= 20 * digits - 5  # few clips draw the same digit twice


# ---- the digit bank


def test_both_files_are_the_official_splits(bank, capsys):
    train, origin = data.load_digits(bank, "train", seed=0)
    val, _ = data.load_digits(bank, "val", seed=0)
    assert np.array_equal(train, random_images(40, 1)) and np.array_equal(val, random_images(20, 2))
    assert "MNIST train split, 40 digits" in origin and str(bank) in origin
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("there", ["train", "val"])
def test_one_file_is_split_into_disjoint_parts_and_that_is_said_once(tmp_path, capsys, there):
    images = random_images(50)
    folder = folder_with(tmp_path, **{there: images})
    train, val = (data.load_digits(folder, split, seed=0)[0] for split in ("train", "val"))
    as_sets = [{digit.tobytes() for digit in digits} for digits in (train, val)]
    assert not as_sets[0] & as_sets[1]
    assert as_sets[0] | as_sets[1] == {digit.tobytes() for digit in images}
    assert len(val) == 5
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and data.FILES[there] in lines[0]


def test_a_file_of_one_digit_cannot_be_split(tmp_path):
    with pytest.raises(UserError, match=TRAIN):
        data.load_digits(folder_with(tmp_path, train=random_images(1)), "val", seed=0)


@pytest.mark.parametrize("dash", ["-", "."])
def test_unpacked_files_of_other_sizes_are_read(tmp_path, dash):
    """Some archives name them train-images.idx3-ubyte."""
    images = random_images(3, side=9)
    for name in (TRAIN, TEST):
        (tmp_path / name.removesuffix(".gz").replace("-idx3", f"{dash}idx3")).write_bytes(idx_bytes(images))
    assert np.array_equal(data.load_digits(tmp_path, "train", seed=0)[0], images)


GOOD = idx_bytes(random_images(3))
DAMAGED = {
    "gzip cut short": gzip.compress(GOOD)[:-300],
    "gzip damaged inside": gzip.compress(GOOD)[:100] + bytes(50) + gzip.compress(GOOD)[150:],
    "plain cut short": GOOD[:-1],
    "plain too long": GOOD + b"\0",
    "header cut short": GOOD[:10],
    "labels": idx_bytes(random_images(3), magic=2049),
    "no images": idx_bytes(np.zeros((0, 28, 28), np.uint8)),
    "empty": b"",
    "web page": b"<!DOCTYPE html><html><body>Sign in to the hotel's network</body></html>",
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_with_the_fix(bank, split, content):
    path = bank / data.FILES[split]
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        source(bank, split)
    assert str(path) in str(error.value) and "delete it" in str(error.value) and "\n" not in str(error.value)


def test_real_digits(capsys):
    if not (REAL / TEST).exists():
        pytest.skip("no ../shared/mnist")
    train, origin = data.load_digits(REAL, "train", seed=0)
    val, _ = data.load_digits(REAL, "val", seed=0)
    assert train.shape == (9000, 28, 28) and val.shape == (1000, 28, 28) and TEST in origin
    assert train.mean() / 255 == pytest.approx(0.1325, abs=0.002)
    assert hashlib.md5((REAL / TEST).read_bytes()).hexdigest() == data.MD5[TEST]


# ---- motion


def simulate(start, velocity, free, frames):
    """One coordinate, moved wall by wall: the slow and obvious way."""
    places = [start]
    for _ in range(frames - 1):
        left, direction, place = abs(velocity), np.sign(velocity), places[-1]
        while left > 0:
            room = free - place if direction > 0 else place
            step = min(room, left)
            place, left = place + direction * step, left - step
            if step == room:
                direction = -direction
        velocity = direction * abs(velocity)
        places.append(place)
    return np.array(places)


@pytest.mark.parametrize("free", [1, 7, 14])
def test_reflection_is_a_triangle_wave(free):
    rng = np.random.default_rng(0)
    for velocity in [0, 1, -3, 14, -29, *rng.uniform(-40, 40, 5)]:
        start = rng.uniform(0, free)
        expected = simulate(start, velocity, free, 50)
        assert np.allclose(data.reflect(start + velocity * np.arange(50), free), expected, atol=1e-9)


def solid_digit(tmp_path):
    """Every digit is a solid square, so its place can be read off a frame."""
    solid = np.full((2, 28, 28), 255, np.uint8)
    return folder_with(tmp_path, train=solid, val=solid)


def places_of(clip, size):
    """Top left corners (t, 2) of the one solid square; fails if it is cut off or not there."""
    for frame in clip[:, 0]:
        assert (frame > 0).sum() == size * size
    return np.array([np.argwhere(frame)[0] for frame in clip[:, 0]])


@pytest.mark.parametrize("bounce, whole", list(itertools.product(["reflect", "random"], [True, False])))
@pytest.mark.parametrize("size, speed", [(10, (1, 3)), (20, (9, 30)), (24, (1, 2))])
def test_digits_never_leave_the_frame(tmp_path, bounce, whole, size, speed):
    """Also with a speed larger than the free range, and with no free range at all."""
    folder = solid_digit(tmp_path)
    clips = source(folder, frames=200, digits=1, digit_size=size, speed=speed, bounce=bounce, whole_pixels=whole)
    places = np.array([places_of(clips.clip(i)[0], size) for i in range(4)])
    assert places.min() == 0 and places.max() == 24 - size  # and they do reach every wall
    assert size == 24 or (places[:, 1:] != places[:, :-1]).any()


def mirrored_path_exists(places, free, high):
    """Is there a whole-pixel velocity that explains the whole path by reflections?"""
    reach = range(-high, high + 1)
    axes = [[simulate(places[0, axis], v, free, len(places)) for v in reach] for axis in (0, 1)]
    return all(any(np.array_equal(places[:, axis], path) for path in axes[axis]) for axis in (0, 1))


def test_whole_pixel_reflection_in_clips(tmp_path):
    clips = source(solid_digit(tmp_path), frames=60, digits=1, speed=(2, 4))
    for i in range(8):
        assert mirrored_path_exists(places_of(clips.clip(i)[0], 10), 14, 4)


def test_random_bounces_leave_the_wall_in_new_directions(tmp_path):
    clips = source(solid_digit(tmp_path), frames=100, digits=1, speed=(1, 3), bounce="random")
    surprising, departures = 0, set()
    for i in range(12):
        places = places_of(clips.clip(i)[0], 10)
        surprising += not mirrored_path_exists(places, 14, 3)
        moves = np.diff(places, axis=0)
        at_wall = (places == 0) | (places == 14)
        for t in range(1, 99):
            assert (moves[t] ** 2).sum() <= 9 and (moves[t] != 0).any()
            if not at_wall[t : t + 2].any():  # a move that ends at a wall may be cut short
                assert np.array_equal(moves[t], moves[t - 1])
            hit = at_wall[t] & ~at_wall[t - 1]
            assert not at_wall[t + 1][hit].any()  # it does not stick
            if hit[0]:
                departures.add(tuple(np.abs(moves[t])))
    assert surprising >= 10 and len(departures) >= 5


def test_random_bounces_at_real_speeds_keep_the_speed(tmp_path):
    clips = source(solid_digit(tmp_path), bounce="random", whole_pixels=False, frames=400)
    rng = np.random.default_rng(0)
    velocity = data.draw_velocity(rng, 2, 2, False)
    places = np.array(list(clips._random_bounces(rng, np.array([3.0, 9.0]), velocity)))
    inside = ((places > 0) & (places < 14)).all(1)
    assert np.allclose(np.linalg.norm(np.diff(places, axis=0), axis=1)[inside[1:]], 2)
    assert 20 < (~inside).sum() < 200


def test_whole_pixel_frames_are_exact_shifts_away_from_walls(bank):
    clips, compared = source(bank, frames=40, frame_size=32, digits=1, speed=(1, 2)), 0
    for i in range(6):
        frames = clips.clip(i)[0][:, 0]
        places = places_of(clips.clip(i)[0], 10)
        for t in range(1, 39):
            nearby = places[t - 1 : t + 2]
            if nearby.min() >= 2 and nearby.max() <= 20:  # no wall within a step
                shifts = [shift for shift in itertools.product(range(-3, 4), repeat=2)
                          if np.array_equal(np.roll(frames[t - 1], shift, (0, 1)), frames[t])]
                assert len(shifts) == 1 and 1 <= np.hypot(*shifts[0]) <= 2
                assert np.array_equal(np.roll(frames[t], shifts[0], (0, 1)), frames[t + 1])
                compared += 1
    assert compared > 30


def test_whole_velocities_are_all_and_equally_likely():
    rng = np.random.default_rng(0)
    drawn = [tuple(data.draw_velocity(rng, 1, 1.5, True)) for _ in range(4000)]
    expected = set(itertools.product((-1, 0, 1), repeat=2)) - {(0, 0)}
    assert set(drawn) == expected
    assert all(400 < drawn.count(velocity) < 600 for velocity in expected)


def test_real_velocities_have_a_uniform_direction_and_length():
    rng = np.random.default_rng(0)
    drawn = np.array([data.draw_velocity(rng, 2, 4, False) for _ in range(4000)])
    lengths, angles = np.hypot(*drawn.T), np.arctan2(*drawn.T)
    assert 2 <= lengths.min() < 2.01 and 3.99 < lengths.max() <= 4
    assert np.histogram(angles, 8, (-np.pi, np.pi))[0].min() > 400
    assert np.histogram(lengths, 4, (2, 4))[0].min() > 850


def test_overlap_shows_the_brighter_pixel(tmp_path):
    """Every frame of two known textures is the elementwise maximum of some placement of each."""
    images = random_images(3, side=6)
    folder = folder_with(tmp_path, train=images, val=images)
    clips = source(folder, frames=10, frame_size=10, digit_size=6, speed=(1, 2))
    placed = []
    for image, y, x in itertools.product(images, range(5), range(5)):
        canvas = np.zeros((10, 10), np.uint8)
        canvas[y : y + 6, x : x + 6] = image
        placed.append(canvas)
    placed = np.array(placed)
    pairs = {np.maximum(a, b).tobytes() for a, b in itertools.combinations_with_replacement(placed, 2)}
    frames = [frame for i in range(5) for frame in clips.clip(i)[0][:, 0]]
    assert all(frame.tobytes() in pairs for frame in frames)
    alone = {canvas.tobytes() for canvas in placed}
    assert sum(frame.tobytes() not in alone for frame in frames) > 20


IMPOSSIBLE = [
    (dict(split="test"), "split", "'val'"),
    (dict(frames=0), "frames", "1"),
    (dict(digits=0), "digits", "1"),
    (dict(digit_size=25), "digit_size", "frame_size=24"),
    (dict(digit_size=0), "digit_size", "1"),
    (dict(speed=(3, 1)), "speed", "lo <= hi"),
    (dict(speed=(-1, 1)), "speed", "lo <= hi"),
    (dict(speed=(2,)), "speed", "(lo, hi)"),
    (dict(speed=(1, 2, 3)), "speed", "(lo, hi)"),
    (dict(speed=(0.2, 0.8)), "speed", "whole_pixels=False"),
    (dict(bounce="wrap"), "bounce", "reflect"),
    (dict(seed=-1), "seed", "0"),
]


# ---- the world


def world(data_dir, split="train", **changes):
    settings = SETTINGS | {"frame_size": 16, "canvas_size": 40, "digits": 9, "speed": (4, 4), "frames": 60} | changes
    return data.CanvasWorld(SimpleNamespace(data_dir=data_dir, **{"seed": 0} | settings), split)


def test_a_world_is_a_function_of_seed_split_and_index(bank):
    first, again = world(bank), world(bank)
    frames, actions = first.clip(3)
    assert frames.shape == (60, 1, 16, 16) and frames.dtype == np.uint8 and actions.shape == (60,)
    assert first.action_dim == 5 and actions[0] == 0 and set(actions) == {0, 1, 2, 3, 4}
    again.clip(2)
    assert all(np.array_equal(one, other) for one, other in zip(first.clip(3), again.clip(3)))
    for other in (first.clip(4), world(bank, seed=1).clip(3), world(bank, "val").clip(3)):
        assert not np.array_equal(frames, other[0])


@pytest.mark.parametrize("canvas_size", [40, 42])                               # 42: the last two pixels are never seen
def test_a_worlds_frames_are_windows_of_one_canvas_that_the_actions_move(bank, canvas_size):
    """The walk is followed on a canvas put together from the frames: where they overlap, now or on coming back,
    they must agree."""
    steps = {0: (0, 0), 1: (-4, 0), 2: (4, 0), 3: (0, -4), 4: (0, 4)}
    returns = 0
    for index in range(8):
        frames, actions = world(bank, canvas_size=canvas_size).clip(index)
        found = []
        for y, x in itertools.product(range(0, 25, 4), repeat=2):               # where might it have begun?
            canvas, seen, place, fits = np.full((40, 40), -1), {}, np.array([y, x]), True
            for t, (frame, action) in enumerate(zip(frames[:, 0], actions)):
                place = place + steps[action]                                   # and never leaves the canvas
                window = canvas[place[0]:place[0] + 16, place[1]:place[1] + 16]
                fits = place.min() >= 0 and place.max() <= 24 and ((window == -1) | (window == frame)).all()
                if not fits:
                    break
                window[:] = frame
                seen.setdefault(tuple(place), []).append(t)
            found += [seen] if fits else []
        assert found
        returns += sum(b - a > 4 for times in found[0].values() for a, b in zip(times, times[1:]))
    assert returns > 20                                                         # walks come back


@pytest.mark.parametrize("changes, named", [
    ({"speed": (1.5, 2)}, "speed=.*whole number"), ({"speed": (0, 2)}, "speed="),
    ({"speed": ()}, "speed="), ({"speed": (math.inf, math.inf)}, "speed="), ({"speed": (math.nan, 1)}, "speed="),
    ({"digits": 0}, "digits=0"),
    ({"canvas_size": 18}, "canvas_size=18"),
])
def test_worlds_that_cannot_be_are_named(bank, changes, named):
    with pytest.raises(UserError, match=named):
        world(bank, **changes)


@pytest.mark.parametrize("changes, name, fix", IMPOSSIBLE)
def test_settings_that_cannot_work_are_named_with_a_fix(bank, changes, name, fix):
    with pytest.raises(UserError) as error:
        source(bank, **changes)
    assert str(error.value).startswith(f"{name}=") and fix in str(error.value)


def test_open_source(bank):
    cfg = SimpleNamespace(dataset="digits", data_dir=str(bank), seed=0, lr=1, **SETTINGS)
    assert np.array_equal(data.open_source(cfg, "val").clip(5)[0], source(bank, "val").clip(5)[0])
    cfg.dataset = "video"
    with pytest.raises(UserError, match=f"data_dir={bank}"):
        data.open_source(cfg, "train")
    cfg.dataset = "vidoe"
    with pytest.raises(UserError, match="choose digits, world, video"):
        data.open_source(cfg, "train")


# ---- network values


class Colours:
    """A source of three channels: random, darker and constant. Its clips carry actions."""

    frames, shape, action_dim, origin = 4, (3, 6, 6), 1, "test"

    def clip(self, index):
        frames = np.random.default_rng(index).integers(0, 256, (4, 3, 6, 6), np.uint8)
        frames[:, 1] //= 5
        frames[:, 2] = 77
        return frames, np.full((4, 1), index, np.float32)


def test_measure_agrees_with_all_pixels_at_once():
    stats = data.measure(Colours(), clips=20)
    pixels = np.stack([Colours().clip(i)[0] for i in range(20)]) / 255
    assert np.allclose(stats["mean"], pixels.mean((0, 1, 3, 4)), atol=1e-12)
    assert np.allclose(stats["std"][:2], pixels.std((0, 1, 3, 4))[:2], atol=1e-12)
    assert stats["std"][2] == max(stats["std"]) / 100
    assert all(type(value) is float for value in stats["mean"] + stats["std"])


def test_measure_says_what_kind_of_frames_and_actions_a_source_of_ones_own_has():
    assert {"latent": False, "discrete": False, "reach": 19.0}.items() <= data.measure(Colours(), clips=20).items()
    latents, moves = Colours(), Colours()
    latents.clip = lambda index: (Colours().clip(index)[0].astype(np.float16), None)
    assert {"latent": True, "discrete": True, "reach": 0.0}.items() <= data.measure(latents, clips=3).items()
    moves.clip = lambda index: (Colours().clip(index)[0], np.full(4, index))
    assert {"discrete": True, "reach": 2.0}.items() <= data.measure(moves, clips=3).items()


def test_vectors_of_actions_are_given_to_the_network_with_unit_variance():
    """In pixels, say, or in thousandths; each of their numbers by itself, unknown ones stay unknown."""
    source, scales = Colours(), np.float32([300, 0.01, 0])              # the last never moves
    source.clip = lambda index: (Colours().clip(index)[0],
                                 np.random.default_rng(index).normal(size=(4, 3)).astype(np.float32) * scales)
    stats = data.measure(source, clips=300)
    actions = torch.from_numpy(np.stack([source.clip(i)[1] for i in range(300)]))
    scaled = data.unit_actions(actions, stats)
    assert np.allclose(scaled.square().mean((0, 1)), [1, 1, 0], rtol=1e-5)
    assert torch.equal(scaled[:, :, 0].argsort(), actions[:, :, 0].argsort())
    assert data.unit_actions(torch.full((1, 3), math.nan), stats).isnan().all()
    moves = torch.tensor([[0, 4, -1]])
    assert data.unit_actions(moves, stats) is moves and data.unit_actions(None, stats) is None
    for without in ({}, {"action_rms": None}, {"action_rms": 0.0}):     # of earlier checkpoints, or no actions
        assert torch.equal(data.unit_actions(actions, without), actions)


@pytest.mark.parametrize("frames", [np.zeros((4, 3, 6, 6), np.float32), np.zeros((4, 6, 6, 3), np.uint8),
                                    np.zeros((5, 3, 6, 6), np.uint8)], ids=lambda x: f"{x.dtype} {x.shape}")
def test_a_source_of_ones_own_with_other_frames_than_it_says_is_refused(frames):
    source = Colours()
    source.clip = lambda index: (frames, None)
    with pytest.raises(UserError, match="expected uint8, or float16 latents, .* \\(4, 3, 6, 6\\)"):
        data.measure(source)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_every_pixel_value_survives_the_network_scale(sigma_data):
    stats = dict(mean=[0.07, 0.5, 1.0], std=[0.004, 0.3, 1.0])
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(2, 5, 3, 16, 16)
    x = data.to_network(frames, stats, sigma_data)
    assert x.dtype == torch.float32 and x.shape == frames.shape
    assert torch.equal(data.to_pixels(x, stats, sigma_data), frames)
    extremes = torch.tensor([-1e4, 1e4]).view(1, 2, 1, 1).expand(3, 2, 1, 1).movedim(0, 1)
    pixels = data.to_pixels(extremes, stats, sigma_data)
    assert torch.equal(pixels.flatten(1), torch.tensor([[0] * 3, [255] * 3], dtype=torch.uint8))


def test_network_frames_are_normalised(bank):
    clips = source(bank)
    frames, _ = data.load_batch(clips, range(64))
    x = data.to_network(frames, data.measure(clips, clips=64), sigma_data=0.5)
    assert abs(x.mean()) < 1e-5 and x.std().item() == pytest.approx(0.5, abs=1e-4)
    assert frames.float().div(255).sub(0.5).mean().abs() > 0.1  # which is not so by itself


# ---- batches


def take(count, **settings):
    with data.Batches(Colours(), 8, "cpu", **settings) as batches:
        return list(itertools.islice(batches, count))


def test_batches_hold_the_clips_of_their_numbers():
    for step, (numbers, frames, actions) in enumerate(take(3)):
        assert numbers == list(range(step * 8, step * 8 + 8))
        assert frames.shape == (8, 4, 3, 6, 6) and frames.dtype == torch.uint8
        for i, clip, action in zip(numbers, frames, actions):
            assert np.array_equal(clip.numpy(), Colours().clip(i)[0]) and (action == i).all()


@pytest.mark.parametrize("world_size, accumulate", [(1, 2), (2, 1), (4, 1), (2, 2), (4, 2), (1, 8)])
def test_processes_and_micro_batches_share_the_same_samples_in_order(world_size, accumulate):
    steps = 3
    settings = dict(world_size=world_size, accumulate=accumulate)
    ranks = [take(steps * accumulate, rank=rank, **settings) for rank in range(world_size)]
    parts = [part for micro_batch in zip(*ranks) for part in micro_batch]  # rank by rank
    whole = take(steps)
    assert [i for part in parts for i in part[0]] == [i for batch in whole for i in batch[0]]
    assert torch.equal(torch.cat([part[1] for part in parts]), torch.cat([batch[1] for batch in whole]))


def test_starting_later_is_skipping():
    settings = dict(rank=1, world_size=2, accumulate=2)
    late, all_of_them = take(2, start=3, **settings), take(8, **settings)[6:]
    for (numbers, frames, actions), expected in zip(late, all_of_them):
        assert numbers == expected[0]
        assert torch.equal(frames, expected[1]) and torch.equal(actions, expected[2])


def test_batches_without_actions(bank):
    with data.Batches(source(bank), 2, "cpu") as batches:
        assert next(batches)[2] is None


@pytest.mark.parametrize("batch_size, world_size, accumulate", [(6, 4, 1), (6, 2, 2), (0, 1, 1)])
def test_uneven_batches_are_refused(batch_size, world_size, accumulate):
    with pytest.raises(UserError, match=f"batch_size={batch_size} .*multiple of {world_size * accumulate}"):
        data.Batches(Colours(), batch_size, "cpu", world_size=world_size, accumulate=accumulate)


class Broken(Colours):
    def clip(self, index):
        if index == 5:
            raise RuntimeError("clip 5 cannot be read")
        return super().clip(index)


def test_an_error_in_the_thread_reaches_the_consumer_every_time():
    with data.Batches(Broken(), 2, "cpu", prefetch=1) as batches:
        assert [next(batches)[0] for _ in range(2)] == [[0, 1], [2, 3]]
        for _ in range(2):
            with pytest.raises(RuntimeError, match="clip 5"):
                next(batches)


@pytest.mark.parametrize("kind", [Colours, Broken])
def test_the_end_is_prompt_and_leaves_no_thread(kind):
    before = set(threading.enumerate())
    with data.Batches(kind(), 2, "cpu", prefetch=4) as batches:
        threads = set(threading.enumerate()) - before
        next(batches)
        began = time.monotonic()
    assert threads and time.monotonic() - began < 1 and not any(thread.is_alive() for thread in threads)


def test_batches_load_ahead():
    class Slow(Colours):
        def clip(self, index):
            time.sleep(0.05)
            return super().clip(index)

    with data.Batches(Slow(), 2, "cpu", prefetch=2) as batches:
        next(batches)
        time.sleep(0.5)
        began = time.monotonic()
        next(batches)
        assert time.monotonic() - began < 0.05


@pytest.mark.gpu
def test_batches_arrive_on_the_gpu():
    with data.Batches(Colours(), 4, "cuda") as batches:
        for (_, frames, actions), expected in zip(itertools.islice(batches, 5), range(0, 20, 4)):
            assert frames.is_cuda and actions.is_cuda
            assert np.array_equal(frames[0].cpu().numpy(), Colours().clip(expected)[0])


# ---- digits drawn with a font


def test_font_digits_are_plausible_and_disjoint():
    train, val = data.font_digits("train", 0), data.font_digits("val", 0)
    assert train.shape == (3000, 28, 28) and val.shape == (500, 28, 28) and train.dtype == np.uint8
    assert not {digit.tobytes() for digit in train} & {digit.tobytes() for digit in val}
    assert np.array_equal(val, data.font_digits("val", 0))
    assert not np.array_equal(val, data.font_digits("val", 1))
    bright = (train > 127).mean((1, 2))
    assert 0.02 < bright.min() and bright.max() < 0.45  # strokes: neither nothing nor a blot
    assert train.mean() / 255 == pytest.approx(0.13, abs=0.03)  # MNIST: 0.131
    border = np.concatenate([train[:, [0, -1]].ravel(), train[:, :, [0, -1]].ravel()])
    assert (border > 0).mean() < 0.01  # nothing is cut off
    soft = ((train > 20) & (train < 235)).mean() / (train > 20).mean()
    assert 0.15 < soft < 0.7  # smooth edges, white inside
    ones, (y, x) = train[1::10] / 255, np.mgrid[:28, :28]
    ink = ones.sum((1, 2))
    (up, right) = (at - ((ones * at).sum((1, 2)) / ink)[:, None, None] for at in (y, x))            # of the centre
    slant = (ones * up * right).sum((1, 2)) / (ones * up ** 2).sum((1, 2))
    height = (ones.max(2) > 0.5).sum(1)
    assert ink.max() > 2.5 * ink.min() and slant.std() > 0.22 and np.ptp(height) > 4    # each of four variations
    shapes = np.stack([train[i::10].mean(0).ravel() for i in range(10)])
    assert np.corrcoef(shapes)[~np.eye(10, dtype=bool)].max() < 0.97
    nearest = ((val.reshape(500, 1, -1) - shapes) ** 2).sum(-1).argmin(1)
    assert (nearest == np.arange(500) % 10).mean() > 0.6  # ten kinds that can be told apart


# ---- download


class Mirror(BaseHTTPRequestHandler):
    """The first folder of the path says how this mirror behaves."""

    content, seen, release = GOOD, [], threading.Event()

    def do_GET(self):
        behaviour = self.path.split("/")[1]
        self.seen.append(self.path)
        if behaviour == "stall":
            self.release.wait(20)
            return
        self.send_response(404 if behaviour == "missing" else 200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        if behaviour == "slow_body":
            self.trickle(self.content)
        elif behaviour != "missing":
            bodies = {"good": self.content, "short": self.content[:-100], "other": self.content[::-1]}
            self.wfile.write(bodies[behaviour])

    def trickle(self, content):
        for byte in content:
            self.wfile.write(bytes([byte]))
            if self.release.wait(0.05):
                return

    def handle(self):
        with contextlib.suppress(OSError):  # the client gave up
            super().handle()

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(monkeypatch):
    """`mirror("good")` is the base address of a mirror of that behaviour."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(Mirror, "seen", [])
    monkeypatch.setattr(Mirror, "release", threading.Event())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
    yield lambda behaviour: f"http://127.0.0.1:{server.server_port}/{behaviour}/"
    Mirror.release.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def nowhere(monkeypatch):
    """The address of a port that nobody listens on."""
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"http://127.0.0.1:{port}/"


DIGESTS = dict.fromkeys((TRAIN, TEST), hashlib.md5(GOOD).hexdigest())


def test_download(mirror, tmp_path):
    folder = tmp_path / "new" / "folder"
    data.download(TRAIN, folder, mirrors=[mirror("good")], md5=DIGESTS)
    assert [path.name for path in folder.iterdir()] == [TRAIN]
    assert (folder / TRAIN).read_bytes() == GOOD


FAILURES = [
    ("other", "wrong checksum"),
    ("short", f"{len(GOOD) - 100} bytes"),
    ("missing", "404"),
    ("stall", "timed out"),
]


@pytest.mark.parametrize("behaviour, reason", FAILURES)
def test_a_failed_download_leaves_nothing_behind(mirror, tmp_path, behaviour, reason):
    began = time.monotonic()
    with pytest.raises(UserError, match=reason) as error:
        data.download(TRAIN, tmp_path, mirrors=[mirror(behaviour)], md5=DIGESTS, timeout=0.3)
    assert time.monotonic() - began < 3
    assert TRAIN in str(error.value) and mirror(behaviour) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_mirror_that_trickles_is_given_up(mirror, tmp_path):
    """At 20 bytes a second the file would take two minutes, with never a pause as long as the timeout."""
    began = time.monotonic()
    with pytest.raises(UserError, match="not complete after"):
        data.download(TRAIN, tmp_path, mirrors=[mirror("slow_body")], md5=DIGESTS, timeout=0.08)
    assert 2 < time.monotonic() - began < 4
    assert list(tmp_path.iterdir()) == []


def test_the_second_mirror_is_used_when_the_first_fails(mirror, nowhere, tmp_path):
    for first in (nowhere, mirror("other"), mirror("short")):
        folder = tmp_path / str(abs(hash(first)))
        data.download(TRAIN, folder, mirrors=[first, mirror("good")], md5=DIGESTS)
        assert (folder / TRAIN).read_bytes() == GOOD and len(list(folder.iterdir())) == 1


def test_every_mirror_has_its_reason(mirror, nowhere, tmp_path):
    with pytest.raises(UserError) as error:
        data.download(TRAIN, tmp_path, mirrors=[nowhere, mirror("missing")], md5=DIGESTS)
    first, second = str(error.value).split(mirror("missing"))
    assert nowhere in first and "refused" in first and "404" in second


def test_missing_files_are_downloaded_once(mirror, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "download", partial(data.download, mirrors=[mirror("good")], md5=DIGESTS))
    train, val = source(tmp_path), source(tmp_path, "val")
    assert "MNIST train split" in train.origin and "MNIST val split" in val.origin
    assert sorted(Mirror.seen) == sorted(f"/good/{name}" for name in (TRAIN, TEST))
    assert capsys.readouterr().out == ""


def test_without_any_mirror_digits_are_drawn_and_it_is_said_once(nowhere, tmp_path, monkeypatch, capsys):
    tried = []

    def download(*args):
        tried.append(args)
        original(*args, mirrors=[nowhere])

    original = data.download
    monkeypatch.setattr(data, "download", download)
    train, val = source(tmp_path), source(tmp_path, "val")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and len(tried) == 1
    assert "refused" in lines[0] and "font" in lines[0] and TRAIN in lines[0] and str(tmp_path) in lines[0]
    for clips in (train, val):
        assert "font" in clips.origin and "refused" not in clips.origin            # a run may go on, whatever fails
        assert clips.clip(0)[0].max() > 100
    assert len(train.bank) == 3000 and len(val.bank) == 500
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_failed_download(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    clips = source(tmp_path / "file" / "mnist")
    out = capsys.readouterr().out
    assert "font" in clips.origin and "Not a directory" in out and "https" not in out


@pytest.mark.parametrize("given, named", [
    ({"size": 16, "fps": 10.0}, "--fps, --size does nothing without --src or --env"),               # as in --src=$UNSET
    ({"src": "clips", "seed": 1, "fps": 10.0}, "--seed does nothing with --src"),
    ({"env": "CartPole-v1", "seed": 1, "fps": 10.0}, "--fps does nothing with --env"),
    ({"src": "clips", "data_dir": "out"}, "--data_dir does nothing with --src"),
], ids=" ".join)
def test_settings_that_would_do_nothing_are_refused(given, named, monkeypatch):
    for work in ("fetch", "prepare"):
        monkeypatch.setattr(data, work, lambda _: pytest.fail("went to work"))
    with pytest.raises(UserError, match=named):
        data.main(SimpleNamespace(**plain_settings(vars(data)) | given))


def test_the_script_fetches_what_is_missing(mirror, tmp_path, monkeypatch, capsys):
    (tmp_path / TRAIN).write_bytes(GOOD)
    monkeypatch.setattr(data, "download", partial(data.download, mirrors=[mirror("good")], md5=DIGESTS))
    data.main(SimpleNamespace(**plain_settings(vars(data)) | {"data_dir": str(tmp_path)}))
    assert Mirror.seen == [f"/good/{TEST}"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["train:", "3"], ["val:", "3"]]
    mean = random_images(3).mean() / 255
    assert f"mean {mean:.4f}" in lines[0] and "MNIST val split" in lines[1]


# ------------------------------------------------------------------------------------------------
# Videos from files.


def coloured_frames(n=3, h=12, w=20):
    """uint8 t h w c: each frame of one colour, its left third black."""
    frames = np.empty((n, h, w, 3), np.uint8)
    frames[:] = np.array([[200, 40, 90], [30, 220, 60], [120, 120, 250]], np.uint8)[:n, None, None]
    frames[:, :, :w // 3] = 0
    return frames


def test_arrays_pictures_and_gifs_are_decoded_exactly(tmp_path):
    frames = coloured_frames()
    np.save(tmp_path / "a.npy", frames)
    np.save(tmp_path / "grey.npy", frames[..., 0])
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100)
    pictures[1].save(tmp_path / "a.png")
    for name, expected in (("a.npy", frames), ("grey.npy", frames[..., :1]), ("a.gif", frames), ("a.png", frames[1:2])):
        assert np.array_equal(np.stack([frame for _, frame in data.decode(tmp_path / name)]), expected), name


@pytest.mark.parametrize("name, kind, codec", [("a.mp4", "mp4", "libx264"), ("a.webm", "webm", "libvpx-vp9")])
def test_films_are_decoded_nearly(tmp_path, name, kind, codec):
    av = pytest.importorskip("av")
    frames = coloured_frames(h=32, w=48)
    with av.open(str(tmp_path / name), "w", format=kind) as film:
        stream = film.add_stream(codec, rate=5)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for frame in frames:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        film.mux(stream.encode())
    found = np.stack([frame for _, frame in data.decode(tmp_path / name)]).astype(int)
    assert found.shape == frames.shape
    assert np.abs(found[:, 8:24, 24:40] - frames[:, 8:24, 24:40]).mean() < 12
    (tmp_path / "torn.mp4").write_bytes((tmp_path / name).read_bytes()[:200])
    with pytest.raises(UserError, match=r"torn\.mp4 cannot be read"):
        list(data.decode(tmp_path / "torn.mp4"))


@pytest.mark.parametrize("name, content, named", [
    ("a.npy", b"nonsense", "cannot be read"), ("a.gif", b"GIF89a", "cannot be read"), ("a.png", b"", "cannot be read"),
    ("floats.npy", np.zeros((2, 4, 4)), "float64"), ("two.npy", np.zeros((2, 4, 4, 2), np.uint8), r"4, 2\)"),
    ("flat.npy", np.zeros((4, 4), np.uint8), r"\(4, 4\)"),
    ("objects.npy", np.array([{}]), "cannot be read"),
])
def test_files_that_are_no_videos_are_named(tmp_path, name, content, named):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content, allow_pickle=True)
    with pytest.raises(UserError, match=rf"{name}.*{named}"):
        list(data.decode(tmp_path / name))


def test_a_missing_file_and_a_film_without_pyav_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no file .*a\.mp4"):
        list(data.decode(tmp_path / "a.mp4"))
    (tmp_path / "a.mp4").touch()
    older = SimpleNamespace(VideoFrame=object, __version__="14.0.0")    # whose frames do not say how they are turned
    monkeypatch.setitem(sys.modules, "av", older)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: older)
    with pytest.raises(UserError, match=r"a\.mp4.*14\.0\.0: pip install -U av"):
        list(data.decode(tmp_path / "a.mp4"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a\.mp4.*pip install av"):
        list(data.decode(tmp_path / "a.mp4"))


def test_a_frame_is_cropped_at_its_centre_and_resized():
    frame = np.zeros((8, 24, 3), np.uint8)
    frame[:, 6:18] = (255, 128, 0)                                      # a little more than the middle third is kept
    assert np.array_equal(data.crop(frame, (3, 4, 4)), np.broadcast_to([[[255]], [[128]], [[0]]], (3, 4, 4)))
    grey = data.crop(frame, (1, 4, 4))
    assert grey.shape == (1, 4, 4) and (grey == grey[0, 0, 0]).all() and 100 < grey[0, 0, 0] < 200
    assert np.array_equal(data.crop(frame[:, :, :1], (3, 8, 24)), np.repeat(frame[..., 0][None], 3, 0))
