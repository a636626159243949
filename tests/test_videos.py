"""From a folder of anything to clips: what is stored, what is left out and why; nothing half-written counts."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
from config import UserError, plain_settings

ROOT = Path(__file__).resolve().parents[1]


def settings(**changes):
    return SimpleNamespace(**plain_settings(vars(data)) | {"size": 8, "workers": 1} | changes)


def numbered(n, h=8, w=8, channels=3, start=0):
    """uint8 t h w c whose frame t is all `start` + t."""
    return np.broadcast_to(np.arange(start, start + n, dtype=np.uint8)[:, None, None, None], (n, h, w, channels)).copy()


def write_film(path, times, base=0.001, size=16):
    """An mp4 (or by its name another kind) whose frame i is of brightness 20 i and is shown at times[i] seconds."""
    import fractions

    import av
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libvpx-vp9" if path.suffix == ".webm" else "libx264", rate=1000)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), 20 * i, np.uint8))
            frame.pts, frame.time_base = round(time / base), fractions.Fraction(1, 1000)
            film.mux(stream.encode(frame))
        film.mux(stream.encode())


def turn_film(av, path, target):
    """The film at `path`, marked to be shown turned by a quarter."""
    import struct
    raw = bytearray(path.read_bytes())
    matrix = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = raw.index(matrix, raw.index(b"tkhd"))
    raw[at:at + 36] = struct.pack(">9i", 0, -(1 << 16), 0, 1 << 16, 0, 0, 0, 0, 1 << 30)
    target.write_bytes(raw)
    with av.open(str(target)) as film:
        assert next(film.decode(video=0)).rotation == 90


def source(folder, split="train", **changes):
    cfg = dict(data_dir=str(folder), frames=4, frame_size=8, stride=1, flip=False, seed=0, dataset="video")
    return data.open_source(SimpleNamespace(**cfg | changes), split)


def stored(folder, name):
    """The frames of one prepared clip, t c h w."""
    record = json.loads((folder / "clips" / f"{name}.json").read_text())
    return np.fromfile(folder / "clips" / f"{name}.raw", record["dtype"]).reshape(record["frames"], *record["shape"])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Preparation in this process: a new one takes seconds to start."""
    def in_this_process(cfg, names):
        return {name: reason for name in names if (reason := data.prepare_source(cfg, name))}
    monkeypatch.setattr(data, "in_processes", in_this_process)
    (tmp_path / "src").mkdir()
    return tmp_path


def prepare(folder, **changes):
    cfg = settings(**{"src": str(folder / "src"), "out": str(folder / "out")} | changes)
    data.prepare(cfg)
    return json.loads(Path(cfg.out, "meta.json").read_text())


# ------------------------------------------------------------------------------------------------
# What is stored.


def test_arrays_are_stored_exactly_and_measured(here, capsys):
    for i in range(4):
        np.save(here / "src" / f"{i}.npy", numbered(5 + i, start=10 * i))
    meta = prepare(here)
    frames = [numbered(5 + i, start=10 * i).transpose(0, 3, 1, 2) for i in range(4)]
    for i in range(4):
        assert np.array_equal(stored(here / "out", f"{i}.npy"), frames[i])
    values = np.concatenate(frames)[:, 0] / 255
    assert meta["shape"] == [3, 8, 8] and meta["left_out"] == {}
    assert np.allclose(meta["mean"], values.mean()) and np.allclose(meta["std"], values.std())
    assert len(meta["train"]) == 3 and len(meta["val"]) == 1
    assert "3 train clips" in capsys.readouterr().out


def test_every_kind_of_source_is_found(here):
    pytest.importorskip("av")
    src = here / "src"
    np.savez(src / "a.npz", numbered(3))
    write_film(src / "b.mp4", [0, 0.1, 0.2])
    write_film(src / "c.webm", [0, 0.1, 0.2])
    pictures = [Image.fromarray(frame) for frame in numbered(12)]
    pictures[0].save(src / "d.gif", save_all=True, append_images=pictures[1:], duration=100)
    (src / "deep" / "walk.mp4").mkdir(parents=True)                     # a folder named like a film
    for i, picture in enumerate(pictures):
        picture.save(src / "deep" / "walk.mp4" / f"{i}.png")
    (src / "notes.txt").write_text("no video")
    meta = prepare(here)
    lengths = {name: frames for name, frames, _ in meta["train"] + meta["val"]}
    assert lengths == {"a.npz": 3, "b.mp4": 3, "c.webm": 3, "d.gif": 12, "deep/walk.mp4": 12}
    assert np.array_equal(stored(here / "out", "deep/walk.mp4")[:, 0, 0, 0], np.arange(12))       # 2.png before 10.png


@pytest.mark.parametrize("fps, expected", [
    (0, [0, 1, 2, 3, 4]),
    (10, [0, 1, 1, 2, 3, 3, 3, 4]),        # shown at 0, .1, .3, .4, .7
    (5, [0, 1, 3, 3]),
    (2.5, [0, 3]),
])
def test_frame_rates_are_converted_by_the_clock(fps, expected):
    times = (0, 0.1, 0.3, 0.4, 0.7)
    assert list(data.at_rate(zip(times, range(5)), fps)) == expected
    later = [time + 7.25 for time in times]
    assert list(data.at_rate(zip(later, range(5)), fps)) == expected


@pytest.mark.parametrize("digits", [2, 3], ids=["GIF", "Matroska"])
@pytest.mark.parametrize("rate", [12, 15, 24, 30000 / 1001, 30])
def test_clocks_that_count_hundredths_or_thousandths_lose_no_frame(rate, digits):
    times = [round(7.25 + i / rate, digits) for i in range(200)]
    assert list(data.at_rate(zip(times, range(200)), rate)) == list(range(200))
    assert list(data.at_rate(zip(times, range(200)), rate / 3)) == list(range(0, 200, 3))


def test_frames_without_a_clock_are_all_kept(here, capsys):
    assert list(data.at_rate([(None, 1), (None, 2)], 10)) == [1, 2]
    np.save(here / "src" / "a.npy", numbered(7))
    np.save(here / "src" / "b.npy", numbered(7))
    meta = prepare(here, fps=2.0)
    assert [clip[1] for clip in meta["train"]] == [7]
    assert "2 sources have no clock" in capsys.readouterr().out


def test_a_film_of_variable_frame_rate_is_converted_with_its_actions(here):
    pytest.importorskip("av")
    write_film(here / "src" / "a.mp4", [0, 0.1, 0.3, 0.4, 0.7])
    np.save(here / "src" / "a.actions.npy", np.array([0, 1, 2, 3, 4]))
    meta = prepare(here, fps=5.0)
    brightness = stored(here / "out", "a.mp4").mean((1, 2, 3)) / 20
    assert np.abs(brightness - [0, 1, 3, 3]).max() < 0.3
    assert np.load(here / "out" / "clips" / "a.mp4.actions.npy").tolist() == [0, 1, 3, 3]
    assert meta["action_dim"] == 4 and meta["discrete"]


@pytest.mark.parametrize("letterbox, expected", [(False, [255, 255]), (True, [0, 255])])
def test_odd_sizes_are_cropped_or_put_between_bars(here, letterbox, expected):
    np.save(here / "src" / "wide.npy", np.full((3, 9, 27, 1), 255, np.uint8))
    prepare(here, letterbox=letterbox, channels=1)
    frame = stored(here / "out", "wide.npy")[0]
    assert frame.shape == (1, 8, 8) and [frame[0, 0, 4], frame[0, 4, 4]] == expected


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("wanted", [1, 3])
def test_grey_colour_and_transparent_frames_become_what_is_wanted(here, channels, wanted):
    frames = numbered(3, channels=channels, start=100)
    frames[..., 3:] = 255                                   # nothing is transparent
    np.save(here / "src" / "a.npy", frames)
    prepare(here, channels=wanted)
    assert np.array_equal(stored(here / "out", "a.npy"), numbered(3, channels=wanted, start=100).transpose(0, 3, 1, 2))


def test_what_is_transparent_is_black_whatever_colour_it_hides(here):
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[:4], picture[4:] = (255, 0, 255, 0), (200, 100, 50, 128)
    np.save(here / "src" / "a.npy", np.stack([picture] * 2))
    (here / "src" / "b").mkdir()
    for i in range(2):
        Image.fromarray(picture).save(here / "src" / "b" / f"{i}.png")
    other = picture // np.array([1, 1, 2, 1], np.uint8)
    Image.fromarray(picture).save(here / "src" / "c.gif", save_all=True, append_images=[Image.fromarray(other)])
    prepare(here)
    for name in ("a.npy", "b"):
        frames = stored(here / "out", name)
        assert not frames[:, :, :4].any()
        assert abs(frames[0, :, 4, 0].astype(int) - [100, 50, 25]).max() <= 1
    assert not stored(here / "out", "c.gif")[:, :, :4].any()


def test_an_avis_frames_come_at_its_rate(here):
    """It stores no times of its own, and a film whose frames are not coded in order has none that can be used."""
    av = pytest.importorskip("av")
    with av.open(str(here / "src" / "a.avi"), "w") as film:
        stream = film.add_stream("libx264", rate=30, options={"preset": "veryslow"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(24):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * i, np.uint8))))
        film.mux(stream.encode())
    with av.open(str(here / "src" / "a.avi")) as film:
        times = [frame.time for frame in film.decode(video=0)]
    assert times != sorted(times)
    np.save(here / "src" / "b.npy", numbered(3))
    prepare(here, fps=30)
    assert (stored(here / "out", "a.avi")[:, 0, 0, 0] / 10).round().tolist() == list(range(24))
    prepare(here, fps=10, out=str(here / "tens"))
    assert (stored(here / "tens", "a.avi")[:, 0, 0, 0] / 10).round().tolist() == list(range(0, 24, 3))


def test_files_that_are_not_read_and_pictures_beside_films_are_told(here, capsys):
    np.save(here / "src" / "a.npy", numbered(3))
    (here / "src" / "notes.txt").write_text("none")
    for i in range(3):
        Image.new("RGB", (8, 8)).save(here / "src" / f"thumbnail{i}.png")
    prepare(here)
    told = capsys.readouterr().out
    assert "1 other files, such as notes.txt, are of no kind that is read" in told
    assert f"{here / 'src'} holds pictures beside films" in told


def test_films_and_photographs_are_shown_upright(here):
    """A phone held upright stores lying frames, and how to turn them. Here the left half is bright, turned it is the
    lower one, or the upper one."""
    av = pytest.importorskip("av")
    lying = np.zeros((16, 32, 3), np.uint8)
    lying[:, :16] = 200
    with av.open(str(here / "src" / "plain.mp4"), "w") as film:
        stream = film.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for _ in range(3):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(lying)))
        film.mux(stream.encode())
    turn_film(av, here / "src" / "plain.mp4", here / "src" / "turned.mp4")
    exif = Image.Exif()
    exif[0x0112] = 6                                        # to be turned by a quarter, clockwise
    (here / "src" / "photographs").mkdir()
    for i in range(2):
        Image.fromarray(lying).save(here / "src" / "photographs" / f"{i}.jpg", exif=exif)
    shapes = {name: next(data.decode(here / "src" / name))[1] for name in ("plain.mp4", "turned.mp4", "photographs")}
    assert shapes["plain.mp4"].shape == (16, 32, 3)
    for name, first, last in (("turned.mp4", 0, 200), ("photographs", 200, 0)):
        frame = shapes[name].astype(int)
        assert frame.shape == (32, 16, 3)
        assert abs(frame[:12].mean() - first) < 12 and abs(frame[20:].mean() - last) < 12


def test_pixels_of_a_film_that_are_no_squares_become_squares(here):
    av = pytest.importorskip("av")
    with av.open(str(here / "src" / "wide.mp4"), "w") as film:
        stream = film.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.sample_aspect_ratio = 32, 32, "yuv420p", 2
        film.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        film.mux(stream.encode())
    assert next(data.decode(here / "src" / "wide.mp4"))[1].shape == (32, 64, 3)


def test_pictures_of_more_than_eight_bits_are_named(here):
    np.save(here / "src" / "good.npy", numbered(3))
    (here / "src" / "deep").mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(here / "src" / "deep" / f"{i}.png")
    assert "more than 8 bits a channel" in prepare(here)["left_out"]["deep"]


def test_a_photograph_is_one_frame_also_if_a_preview_is_stored_with_it(here):
    (here / "src" / "phone").mkdir()
    for i in range(3):
        photo, preview = (Image.fromarray(np.full((8, 8, 3), grey, np.uint8)) for grey in (200, 0))
        photo.save(here / "src" / "phone" / f"{i}.jpg", "MPO", save_all=True, append_images=[preview])
    prepare(here)
    frames = stored(here / "out", "phone")
    assert len(frames) == 3 and (abs(frames.astype(int) - 200) < 5).all()


def test_a_gif_without_delays_is_shown_at_ten_frames_a_second(here):
    pictures = [Image.fromarray(np.full((8, 8), 25 * i, np.uint8)) for i in range(6)]
    pictures[0].save(here / "src" / "a.gif", save_all=True, append_images=pictures[1:], duration=0)
    prepare(here, fps=5.0)
    assert len(stored(here / "out", "a.gif")) == 3


def test_names_with_dots_and_of_other_encodings_and_the_folder_itself(here, monkeypatch):
    np.save(here / "src" / os.fsdecode(b"caf\xe9.npy"), numbered(4))
    for i in range(3):
        (here / "src" / "run.1").mkdir(exist_ok=True)
        Image.fromarray(numbered(3)[i]).save(here / "src" / "run.1" / f"{i}.png")
    np.save(here / "src" / "run.1.actions.npy", np.arange(3))
    meta = prepare(here)
    assert meta["action_dim"] == 3 and len(meta["train"]) == 1
    monkeypatch.chdir(here / "src" / "run.1")
    data.prepare(settings(src=".", out=str(here / "alone")))
    assert (here / "alone" / "meta.json").exists()


def test_a_bad_file_whose_name_cannot_be_printed_is_left_out_like_others(tmp_path):
    (tmp_path / "src").mkdir()
    np.save(tmp_path / "src" / "good.npy", numbered(4))
    Path(tmp_path, "src", os.fsdecode(b"caf\xe9.npy")).write_bytes(b"torn")
    done = subprocess.run([sys.executable, ROOT / "data.py", "--src=src", "--out=out", "--size=8", "--workers=1"],
                          cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "out" / "meta.json").read_text())["train"]) == 1


def test_latents_stay_as_they_are(here):
    latents = np.random.default_rng(0).normal(3, 2, (2, 9, 4, 8, 8))
    for i in range(2):
        np.save(here / "src" / f"{i}.npy", latents[i].astype(np.float32))
    meta = prepare(here)
    assert meta["dtype"] == "float16" and meta["shape"] == [4, 8, 8]
    frames, actions = source(here / "out").clip(0)
    assert frames.dtype == np.float16 and frames.shape == (4, 4, 8, 8) and actions is None
    stats = data.measure(source(here / "out"))
    x = data.to_network(torch.from_numpy(latents.astype(np.float16)), stats, 0.5)
    assert np.allclose(x.mean((0, 1, 3, 4)), 0, atol=1e-2) and np.allclose(x.std((0, 1, 3, 4)), 0.5, atol=1e-2)
    again = data.to_pixels(x, stats, 0.5)
    assert again.dtype == torch.float16 and np.abs(again.numpy() - latents).max() < 0.02


@pytest.mark.parametrize("scale", [1, 0.005, 200])
def test_the_scale_of_latents_does_not_matter_and_a_channel_that_never_changes_is_not_blown_up(here, scale):
    latents = scale * np.random.default_rng(0).normal(0.5, 1, (2, 9, 4, 8, 8))
    latents[:, :, 3] = scale / 2
    for i in range(2):
        np.save(here / "src" / f"{i}.npy", latents[i].astype(np.float32))
    prepare(here)
    stats = data.measure(source(here / "out"))
    x = data.to_network(torch.from_numpy(latents.astype(np.float16)), stats, 0.5)
    assert np.allclose(x.std((0, 1, 3, 4)), [0.5, 0.5, 0.5, 0], atol=1e-2)
    made = data.to_pixels(x + 0.05, stats, 0.5).float().numpy()         # as a network makes it, a little off
    assert np.allclose((made - latents).mean((0, 1, 3, 4)) / scale, [0.1, 0.1, 0.1, 0], atol=1e-2)


# ------------------------------------------------------------------------------------------------
# The split.


def test_no_file_is_in_both_splits_and_a_set_that_grows_keeps_its_split(here):
    for i in range(30):
        np.save(here / "src" / f"{i}.npy", numbered(3))
    before = prepare(here, val_share=0.2)
    for i in range(30, 60):
        np.save(here / "src" / f"{i}.npy", numbered(3))
    after = prepare(here, val_share=0.2)
    for meta, count in ((before, 30), (after, 60)):
        names = {split: {clip[0] for clip in meta[split]} for split in ("train", "val")}
        assert not names["train"] & names["val"] and len(names["train"] | names["val"]) == count
        assert 0.05 * count < len(names["val"]) < 0.4 * count
    assert {clip[0] for clip in before["val"]} <= {clip[0] for clip in after["val"]}


@pytest.mark.parametrize("share", [1e-9, 0.3, 0.6])
def test_what_was_held_out_stays_so_and_what_was_trained_on_too(here, share):
    trained, held = set(), set()
    for i in range(16):
        np.save(here / "src" / f"{i}.npy", numbered(3))
        if i % 2:
            meta = prepare(here, val_share=share)
            trained, held = trained | {clip[0] for clip in meta["train"]}, held | {clip[0] for clip in meta["val"]}
    assert len(trained) + len(held) == 16 and len(held) == len(meta["val"])


@pytest.mark.parametrize("names, share", [(["a", "b"], 1e-9), (["a", "b"], 0.999999), ("abcdefgh", 1e-9)])
def test_some_are_held_out_and_some_are_not(names, share):
    assert 0 < len(data.held_out(names, share, {"train": [], "val": []})) < len(names)


def test_of_new_ones_alone_more_are_held_out_however_many_are_asked_for():
    before = {"train": [[name, 3, False] for name in "abcd"], "val": [["e", 3, False]]}
    assert set(data.held_out("abcdefgh", 0.999999, before)) == set("efgh")
    assert data.held_out("abcdefgh", 1e-9, before) == ["e"]


def test_a_single_source_leaves_nothing_to_hold_out_and_is_said_to(here, capsys):
    np.save(here / "src" / "a.npy", numbered(9))
    prepare(here)
    assert len(source(here / "out").clips) == 1
    assert "one clip alone" in capsys.readouterr().out
    with pytest.raises(UserError, match="no val clips: prepare two files"):
        source(here / "out", "val")
    np.save(here / "src" / "b.npy", numbered(9))
    prepare(here)
    assert len(source(here / "out", "val").clips) == 1
    assert "alone" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Training on them.


@pytest.fixture
def prepared(here):
    for i in range(6):
        np.save(here / "src" / f"{i}.npy", numbered(20 + i, start=40 * i))
        np.save(here / "src" / f"{i}.actions.npy", np.arange(20 + i) % 3)
    prepare(here)
    return here / "out"


def test_a_clip_is_a_window_of_one_source_with_its_actions(prepared):
    clips = source(prepared, stride=2)
    seen = set()
    for index in range(200):
        frames, actions = clips.clip(index)
        values = frames[:, 0, 0, 0].astype(int)
        number, start = divmod(values[0], 40)
        assert (frames == frames[:, :1, :1, :1]).all() and values.tolist() == [values[0] + 2 * t for t in range(4)]
        assert actions.tolist() == [(start + 2 * t) % 3 for t in range(4)]
        seen.add((number, start))
        again = source(prepared, stride=2).clip(index)
        assert np.array_equal(frames, again[0]) and np.array_equal(actions, again[1])
    names = {int(name[0]) for name, _, _ in clips.clips}
    assert {number for number, _ in seen} == names
    assert {0, 13} <= {start for number, start in seen}                 # first and last windows of 20 frames: 0 to 13


def test_every_window_is_as_likely(here):
    np.save(here / "src" / "long.npy", numbered(43))
    np.save(here / "src" / "short.npy", numbered(13, start=100))
    prepare(here)
    clips = source(here / "out")
    clips.clips = [("long.npy", 43, False), ("short.npy", 13, False)]   # 40 and 10 windows, whatever the split was
    clips.ends = np.array([40, 50])
    firsts = np.bincount([clips.clip(i)[0][0, 0, 0, 0] for i in range(5000)], minlength=110)
    assert np.flatnonzero(firsts).tolist() == [*range(40), *range(100, 110)]
    assert firsts[firsts > 0].min() > 60 and firsts.max() < 150


def test_half_of_the_training_clips_are_mirrored(here):
    for i in range(4):
        np.save(here / "src" / f"{i}.npy", np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None], (6, 8, 8, 3)).copy())
    prepare(here)
    first = [source(here / "out", flip=True).clip(i)[0][:, :, 0, 0] for i in range(100)]
    assert all((pixels == pixels[0, 0]).all() for pixels in first)      # all frames or none
    assert 30 < sum(pixels[0, 0] == 7 for pixels in first) < 70
    assert all(source(here / "out", "val", flip=True).clip(i)[0][0, 0, 0, 0] == 0 for i in range(20))


@pytest.mark.parametrize("rows, dtype", [(np.arange(6), int), (np.ones((6, 2), np.float32), float)])
def test_a_clip_without_actions_has_unknown_ones(here, rows, dtype):
    for i in range(4):
        np.save(here / "src" / f"{i}.npy", numbered(6, start=50 * i))
    np.save(here / "src" / "0.actions.npy", rows)
    meta = prepare(here)
    split = "train" if "0.npy" in {clip[0] for clip in meta["train"]} else "val"
    clips = [source(here / "out", "train").clip(i) for i in range(40)]
    for frames, actions in clips:
        unknown = np.isnan(actions).all() if dtype is float else (actions == -1).all()
        assert unknown == (frames[0, 0, 0, 0] >= 50)
    assert split == "val" or {frames[0, 0, 0, 0] < 50 for frames, _ in clips} == {True, False}


@pytest.mark.parametrize("prefetch", [1, 8])
def test_batches_do_not_depend_on_the_number_of_threads(prepared, prefetch):
    with data.Batches(source(prepared), 4, "cpu", prefetch=prefetch) as batches:
        found = [next(batches) for _ in range(20)]
    clips = source(prepared)
    for step, (numbers, frames, actions) in enumerate(found):
        assert numbers == list(range(4 * step, 4 * step + 4))
        expected = data.load_batch(clips, numbers)
        assert torch.equal(frames, expected[0]) and torch.equal(actions, expected[1])


# ------------------------------------------------------------------------------------------------
# Bad input: one clear line each, and the rest is prepared.


def truncated_film(path):
    pytest.importorskip("av")
    write_film(path, [0, 0.1, 0.2])
    path.write_bytes(path.read_bytes()[:300])


def torn_picture(path):
    path.mkdir()
    for i in range(3):
        Image.fromarray(numbered(3, h=64, w=64)[i]).save(path / f"{i}.png")
    (path / "1.png").write_bytes((path / "1.png").read_bytes()[:60])


def of_actions(actions, frames=5):
    def write(path):
        np.save(path, numbered(frames))
        np.save(path.with_suffix(".actions.npy"), actions)
    return write


def archived_actions(path):
    of_actions(np.arange(5))(path)
    with open(path.with_suffix(".actions.npy"), "wb") as file:
        np.savez(file, a=np.arange(5))


BAD = {
    "one.npy": (lambda path: np.save(path, numbered(1)), "1 frames, fewer than min_frames=2"),
    "torn.mp4": (truncated_film, "torn.mp4 cannot be read"),
    "torn.npy": (lambda path: path.write_bytes(b"\x93NUMPY"), "torn.npy cannot be read"),
    "torn.npz": (lambda path: path.write_bytes(b"PK\x03\x04 and so on"), "torn.npz cannot be read"),
    "text.gif": (lambda path: path.write_text("no GIF"), "text.gif cannot be read"),
    "walk.v1": (torn_picture, "walk.v1.1.png cannot be read"),
    "folder.mp4": (Path.mkdir, "folder.mp4 is a folder without pictures"),
    "gone.mp4": (lambda path: path.symlink_to("nowhere"), "there is no file .*gone.mp4"),
    "two.npz": (lambda path: np.savez(path, a=numbered(3), b=numbered(3)), "two.npz holds 2 arrays"),
    "two.npy": (lambda path: np.save(path, np.zeros((3, 8, 8, 2), np.uint8)), r"two.npy holds uint8 \(3, 8, 8, 2\)"),
    "real.npy": (lambda path: np.save(path, np.zeros((4, 9, 9, 3))), r"real.npy holds float64 \(4, 9, 9, 3\)"),
    "nan.npy": (lambda path: np.save(path, np.full((3, 4, 8, 8), np.nan, np.float32)), "frame 1 .* not finite"),
    "huge.npy": (lambda path: np.save(path, np.full((3, 4, 8, 8), 1e5, np.float32)), "not finite in float16"),
    "long.npy": (of_actions(np.arange(6)), "long.actions.npy has 6 actions for 5 frames"),
    "short.npy": (of_actions(np.arange(4)), "short.actions.npy has 4 actions, and short.npy has more frames"),
    "grid.npy": (of_actions(np.zeros((5, 2, 2))), r"grid.actions.npy holds float64 \(5, 2, 2\)"),
    "picture.npy": (lambda path: np.save(path, numbered(1)[0]), r"picture.npy holds uint8 \(8, 8, 3\): expected"),
    "flat.npy": (lambda path: np.save(path, np.zeros((3, 0, 8, 3), np.uint8)), r"flat.npy holds uint8 \(3, 0, 8, 3\)"),
    "archive.npy": (archived_actions, "archive.actions.npy cannot be read"),
    "many.npy": (of_actions(np.full(5, 2 ** 36)), "many.actions.npy holds int64 .* from 0 to 65535"),
    "wraps.npy": (of_actions(np.full(5, 2 ** 63 + 5, np.uint64)), "wraps.actions.npy holds uint64"),
    "vast.npy": (of_actions(np.full((5, 2), 1e20)), "vast.actions.npy holds float64 .* from -1e6 to 1e6"),
    f"{'x' * 240}.npy": (lambda path: np.save(path, numbered(3)), "its name is too long: rename it"),
    "minus.npy": (of_actions(np.arange(5) - 1), "minus.actions.npy holds int64"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_source_is_left_out_and_named(here, name):
    write, reason = BAD[name]
    np.save(here / "src" / "good.npy", numbered(5))
    write(here / "src" / name)
    meta = prepare(here)
    assert list(meta["left_out"]) == [name]
    assert re.search(reason, meta["left_out"][name])
    assert [clip[0] for clip in meta["train"] + meta["val"]] == ["good.npy"]
    assert not list((here / "out" / "clips").glob(f"*{Path(name).stem}*"))         # nothing half-written


def test_clips_shorter_than_asked_for_are_left_out(here):
    np.save(here / "src" / "long.npy", numbered(5))
    np.save(here / "src" / "short.npy", numbered(4))
    meta = prepare(here, min_frames=5)
    assert [clip[0] for clip in meta["train"] + meta["val"]] == ["long.npy"]
    assert "4 frames, fewer than min_frames=5" in meta["left_out"]["short.npy"]


@pytest.fixture
def nobody():
    """A user who may not read everything, as root may, and a folder that is theirs to write."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        os.seteuid(user or 65534)
        yield Path(folder)
        os.seteuid(user)


def test_an_unreadable_file_is_left_out_and_named(here, nobody):
    (nobody / "src").mkdir()
    np.save(nobody / "src" / "good.npy", numbered(5))
    np.save(nobody / "src" / "locked.npy", numbered(5))
    (nobody / "src" / "locked.npy").chmod(0)
    meta = prepare(nobody)
    assert "Permission denied" in meta["left_out"]["locked.npy"]
    assert [clip[0] for clip in meta["train"] + meta["val"]] == ["good.npy"]


def test_two_videos_of_one_stem_are_both_kept(here):
    np.save(here / "src" / "a.npy", numbered(3))
    np.savez(here / "src" / "a.npz", numbered(4))
    prepare(here)
    assert len(stored(here / "out", "a.npy")) == 3 and len(stored(here / "out", "a.npz")) == 4


def test_clips_of_another_kind_than_the_first_are_left_out(here):
    np.save(here / "src" / "a.npy", np.zeros((3, 4, 8, 8), np.float32))
    np.save(here / "src" / "b.npy", np.zeros((3, 4, 6, 6), np.float32))
    assert "unlike" in prepare(here)["left_out"]["b.npy"]


def test_the_kind_of_most_clips_counts_and_the_others_are_named(here, capsys):
    np.save(here / "src" / "0.npy", np.zeros((3, 4, 8, 8), np.float32))
    for name in "abc":
        np.save(here / "src" / f"{name}.npy", numbered(3))
    meta = prepare(here)
    assert sorted(clip[0] for clip in meta["train"] + meta["val"]) == ["a.npy", "b.npy", "c.npy"]
    assert "left out: 0.npy: ('float16', 4, 8, 8), unlike ('uint8', 3, 8, 8) of 3 others" in capsys.readouterr().out


def test_sources_of_one_name_in_different_folders_are_told_apart(here):
    for folder in "xy":
        (here / "src" / folder).mkdir()
        np.save(here / "src" / folder / "good.npy", numbered(5))
        np.save(here / "src" / folder / "frames.npy", numbered(1))
    assert prepare(here)["left_out"]["y/frames.npy"].startswith("y/frames.npy: 1 frames, fewer")


def test_a_link_to_a_folder_is_named(here, capsys):
    (here / "elsewhere").mkdir()
    np.save(here / "elsewhere" / "b.npy", numbered(3))
    np.save(here / "src" / "a.npy", numbered(3))
    (here / "src" / "link").symlink_to(here / "elsewhere")
    prepare(here)
    assert "left out: link is a link to a folder" in capsys.readouterr().out


@pytest.mark.parametrize("length", [1, 2])
def test_discrete_and_continuous_actions_do_not_mix(here, length):
    np.save(here / "src" / "a.npy", numbered(3))
    np.save(here / "src" / "a.actions.npy", np.arange(3))
    np.save(here / "src" / "b.npy", numbered(3))
    np.save(here / "src" / "b.actions.npy", np.zeros((3, length)))
    with pytest.raises(UserError, match="a.npy has discrete actions, b.npy has vectors of"):
        prepare(here)


def test_clips_whose_actions_are_of_different_kinds_are_named(here):
    for name, length in (("a", 2), ("b", 2), ("c", 3)):
        np.save(here / "src" / f"{name}.npy", numbered(3))
        np.save(here / "src" / f"{name}.actions.npy", np.zeros((3, length)))
    with pytest.raises(UserError, match=r"b\.npy has vectors of 2, c\.npy has vectors of 3"):
        prepare(here)


def test_hidden_files_and_folders_are_none_of_the_sources(here):
    for path in ("a.npy", "b.npy", ".c.npy", ".hidden/d.npy"):
        (here / "src" / path).parent.mkdir(exist_ok=True)
        np.save(here / "src" / path, numbered(3))
    (here / "src" / "walk").mkdir()
    for i in range(3):
        Image.fromarray(numbered(3)[i]).save(here / "src" / "walk" / f"{i}.png")
    (here / "src" / "walk" / "._1.png").write_bytes(b"what a Mac leaves beside a file")
    meta = prepare(here)
    assert sorted(clip[0] for clip in meta["train"] + meta["val"]) == ["a.npy", "b.npy", "walk"]


@pytest.mark.parametrize("changes, named", [
    (dict(src="nowhere"), "no such folder"), (dict(size=0), "size=0"), (dict(channels=2), "--channels=2"),
    (dict(env="CartPole-v1"), "not both"), (dict(val_share=1.0), "--val_share"), (dict(fps=-1.0), "fps=-1"),
    (dict(), "no file in there ends in .*.mp4"),
])
def test_settings_that_cannot_work_are_named(here, changes, named):
    with pytest.raises(UserError, match=named):
        data.prepare(settings(**dict(src=str(here / "src"), out=str(here / "out")) | changes))


def test_nothing_usable_is_an_error(here):
    np.save(here / "src" / "one.npy", numbered(1))
    with pytest.raises(UserError, match="nothing in .* was usable"):
        prepare(here)


def test_other_settings_do_not_touch_what_is_there(prepared):
    before = {path: path.read_bytes() for path in prepared.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="size was 8, now 16"):
        prepare(prepared.parent, size=16)
    assert {path: path.read_bytes() for path in prepared.rglob("*") if path.is_file()} == before


def test_what_is_done_is_not_done_again_and_what_changed_is(prepared, monkeypatch):
    made, write = [], data.write_frames
    monkeypatch.setattr(data, "write_frames", lambda path, *rest: made.append(path.name) or write(path, *rest))
    prepare(prepared.parent)
    prepare(prepared.parent, seed=1, max_frames=50)                     # which are an environment's
    assert made == []
    np.save(prepared.parent / "src" / "2.npy", numbered(30))
    np.save(prepared.parent / "src" / "2.actions.npy", np.arange(30) % 3)
    meta = prepare(prepared.parent)
    assert made == ["2.npy.raw"] and ["2.npy", 30, True] in meta["train"] + meta["val"]


def test_a_set_whose_table_was_lost_is_made_of_what_is_there_and_only_of_that(prepared):
    before = json.loads((prepared / "meta.json").read_text())
    (prepared / "meta.json").write_text("{")
    with pytest.raises(UserError, match="meta.json cannot be read .* delete it, and prepare the clips again"):
        prepare(prepared.parent)
    (prepared / "meta.json").unlink()
    assert prepare(prepared.parent) == before
    (prepared / "meta.json").unlink()
    assert prepare(prepared.parent, size=4)["shape"] == [3, 4, 4]       # and not some of 8 x 8


def test_sources_of_another_folder_are_not_taken_for_those_that_are_there(here):
    for folder, brightness in (("src", 10), ("other", 200)):
        (here / folder).mkdir(exist_ok=True)
        for i in range(2):
            np.save(here / folder / f"{i}.npy", np.full((3, 8, 8, 3), brightness, np.uint8))
            os.utime(here / folder / f"{i}.npy", (10 ** 9, 10 ** 9))
        data.prepare(settings(src=str(here / folder), out=str(here / "out")))
        assert (stored(here / "out", "0.npy") == brightness).all()


def test_a_source_that_was_moved_or_spoilt_is_not_in_the_set_as_it_was(here, capsys):
    """Moved, its old clip beside the new one could be on the other side of the split."""
    for i in range(4):
        np.save(here / "src" / f"{i}.npy", numbered(5))
    prepare(here)
    (here / "src" / "sub").mkdir()
    (here / "src" / "0.npy").rename(here / "src" / "sub" / "0.npy")
    (here / "src" / "1.npy").write_text("no array")
    for _ in range(2):
        meta = prepare(here)
        assert sorted(clip[0] for clip in meta["train"] + meta["val"]) == ["2.npy", "3.npy", "sub/0.npy"]
    assert "1 clips of before, such as 0.npy, are no longer there" in capsys.readouterr().out
    (here / "src" / "1.npy").unlink()
    assert len(prepare(here)["train"]) == 2


def test_a_folder_of_pictures_is_read_again_when_one_of_them_changed(here):
    (here / "src" / "walk").mkdir()
    for brightness in (10, 200):
        for i in range(3):
            Image.new("RGB", (8, 8), (brightness,) * 3).save(here / "src" / "walk" / f"{i}.png")
        prepare(here)
        assert np.all(stored(here / "out", "walk") == brightness)


def test_a_first_call_in_vain_does_not_settle_the_settings(here):
    with pytest.raises(UserError, match="no file in there"):
        prepare(here, size=16)
    np.save(here / "src" / "a.npy", numbered(3))
    assert prepare(here, size=8)["shape"] == [3, 8, 8]


def test_a_folder_that_holds_something_else_is_left_alone(here):
    np.save(here / "src" / "a.npy", numbered(3))
    (here / "out").mkdir()
    (here / "out" / "meta.json").write_text('{"of": "another program"}')
    with pytest.raises(UserError, match="meta.json is not of this program"):
        prepare(here)
    assert "another program" in (here / "out" / "meta.json").read_text()


class KillsItsReader:
    def __reduce__(self):
        return os._exit, (1,)


@pytest.fixture
def preparing(tmp_path):
    """A session in which `python data.py` prepares a source that never ends, its worker started."""
    (tmp_path / "src").mkdir()
    os.mkfifo(tmp_path / "src" / "a.npy")
    with open(tmp_path / "told", "w") as told:
        process = subprocess.Popen([sys.executable, ROOT / "data.py", f"--src={tmp_path / 'src'}", "--workers=1",
                                    f"--out={tmp_path / 'out'}"], stdout=told, stderr=told, start_new_session=True)
    try:
        until(lambda: len(session(process.pid)) > 2)        # itself, a worker, what keeps track of them
        yield process
    finally:
        for pid in session(process.pid):
            os.kill(pid, signal.SIGKILL)


def session(pid):
    """The processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session, *_ = stat.read_text().rpartition(")")[2].split()
            found += [int(stat.parent.name)] if its_session == str(pid) and state != "Z" else []
    return found


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_second_ctrl_c_ends_a_preparation_at_once(preparing, tmp_path):
    def told(text):
        os.killpg(preparing.pid, signal.SIGINT)             # as a terminal does: to all of them, importing or working
        time.sleep(0.5)
        return text in (tmp_path / "told").read_text()
    until(lambda: told("once more to quit at once"))
    os.killpg(preparing.pid, signal.SIGINT)
    assert preparing.wait(30) == 130
    until(lambda: not session(preparing.pid))
    assert "Traceback" not in (tmp_path / "told").read_text()


def test_workers_end_with_the_process_that_started_them(preparing):
    time.sleep(4)                                           # imported, and at work
    preparing.terminate()
    until(lambda: not session(preparing.pid))


def test_a_killed_worker_is_one_line():
    with pytest.raises(UserError, match="was killed.*fewer --workers"):
        data.in_processes(settings(), [KillsItsReader()])


def test_an_interrupted_source_is_not_believed(here, monkeypatch):
    np.save(here / "src" / "a.npy", numbered(5))
    np.save(here / "src" / "b.npy", numbered(5))

    def dies(path, actions):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(data, "write_actions", dies)                      # after the frames, before the record
        with pytest.raises(KeyboardInterrupt):
            prepare(here)
    with pytest.raises(UserError, match="not prepared to the end"):
        source(here / "out")
    (here / "out" / "clips" / ".b.npy.raw.123").write_bytes(b"what a process that was killed leaves behind")
    meta = prepare(here)
    assert len(meta["train"]) == len(meta["val"]) == 1
    assert not list((here / "out" / "clips").glob(".*"))


def test_the_given_frames_do_not_depend_on_what_is_asked_of_a_rollout(prepared):
    cfg = SimpleNamespace(data_dir="", split="train", play=False)
    state = {"settings": vars(source(prepared, frames=6).cfg), "model_config": {"frame_shape": (3, 8, 8)}}
    state["model_config"]["action_dim"] = source(prepared).action_dim
    few, many = (sample.open_data(cfg, state, frames) for frames in (2, 6))
    for i in range(20):
        assert np.array_equal(few.clip(i)[0][:2], many.clip(i)[0][:2])


@pytest.mark.parametrize("damage, named", [
    (lambda out: next(out.glob("clips/*.raw")).write_bytes(b"short"), "has 5 bytes, and should have .* prepare"),
    (lambda out: [path.unlink() for path in out.glob("clips/*.actions.npy")], r"actions\.npy is not there: prepare"),
    (lambda out: (out / "meta.json").write_text("{"), "meta.json cannot be read"),
    (lambda out: (out / "meta.json").write_text("{\"of\": \"another\"}"), "meta.json is not of this program"),
    (lambda out: (out / "meta.json").write_text("[1, 2]"), "meta.json is not of this program"),
    (lambda out: (out / "meta.json").unlink(), "no prepared clips are there.*python data.py --src"),
])
def test_a_damaged_folder_is_named_with_the_fix(prepared, damage, named):
    for split in ("train", "val"):
        source(prepared, split)
    damage(prepared)
    with pytest.raises(UserError, match=named):
        for split in ("train", "val"):
            source(prepared, split)


@pytest.mark.parametrize("suffix", [".raw", ".actions.npy"])
def test_preparing_again_mends_what_was_damaged(here, prepared, suffix):
    whole = {path: path.read_bytes() for path in prepared.glob(f"clips/*{suffix}")}
    first, second, *_ = whole
    first.unlink()
    if suffix == ".raw":
        second.write_bytes(b"short")
    prepare(here)
    assert {path: path.read_bytes() for path in whole} == whole


def test_a_set_says_how_much_it_holds_so_that_a_run_notices_when_that_changes(here, prepared):
    before = source(prepared).origin
    for name in ("0", "1"):                                 # one of them may be held out
        np.save(here / "src" / f"{name}.npy", numbered(31))
        np.save(here / "src" / f"{name}.actions.npy", np.arange(31) % 3)
    prepare(here)
    assert source(prepared).origin != before


def test_two_sets_of_as_many_frames_made_in_two_ways_are_told_apart(here):
    for i in range(3):
        np.save(here / "src" / f"{i}.npy", numbered(9, h=16, start=9 * i))
    origins = set()
    for name, letterbox in (("bars", True), ("crop", False), ("again", False)):
        prepare(here, out=str(here / name), letterbox=letterbox)
        origins.add(source(here / name).origin.replace(name, ""))
    assert len(origins) == 2


@pytest.mark.parametrize("changes, named", [
    (dict(frames=21, stride=2), "has the 41 frames"), (dict(frame_size=16), "train with --frame_size=8"),
    (dict(stride=0), "stride=0"), (dict(flip=True), "flip=True"),
])
def test_training_settings_that_do_not_fit_the_clips_are_named(prepared, changes, named):
    with pytest.raises(UserError, match=named):
        source(prepared, **changes)


def test_a_disk_that_is_full_stops_the_preparation_and_keeps_what_is_done(here, monkeypatch):
    for name in "abc":
        np.save(here / "src" / f"{name}.npy", numbered(5))

    def full(path, *rest):
        if path.name.startswith("b"):
            with data.replacing(path):
                raise OSError(28, "No space left on device")
        return write(path, *rest)
    write = data.write_frames
    with monkeypatch.context() as patch:
        patch.setattr(data, "write_frames", full)
        with pytest.raises(UserError, match=r"b\.npy\.raw cannot be written: No space left on device"):
            prepare(here)
    assert len(stored(here / "out", "a.npy")) == 5


# ------------------------------------------------------------------------------------------------
# Games, and the commands.


def record(folder, env="CartPole-v1", **changes):
    data.prepare(settings(**{"env": env, "out": str(folder / "game"), "episodes": 3, "max_frames": 12} | changes))
    return json.loads((folder / "game" / "meta.json").read_text())


def test_episodes_are_recorded_with_their_actions(here):
    gymnasium = pytest.importorskip("gymnasium")
    pytest.importorskip("pygame")
    meta = record(here, size=32)
    assert meta["action_dim"] == 2 and meta["discrete"] and meta["shape"] == [3, 32, 32]
    for number in range(3):
        actions = np.load(here / "game" / "clips" / f"{number:06d}.actions.npy")
        frames = stored(here / "game", f"{number:06d}")
        assert len(actions) == len(frames) <= 12 and actions[0] == 0
        env = gymnasium.make("CartPole-v1", render_mode="rgb_array")
        env.reset(seed=int(np.random.SeedSequence((0, number)).generate_state(1)[0]))
        for t, frame in enumerate(frames):                              # these actions lead to these frames
            if t:
                env.step(int(actions[t]))
            assert np.array_equal(data.crop(env.render(), (3, 32, 32)), frame)
    assert set(np.concatenate([np.load(path) for path in (here / "game").rglob("*.actions.npy")])) == {0, 1}


def test_actions_that_were_never_drawn_count_too(here):
    pytest.importorskip("gymnasium")
    pytest.importorskip("pygame")
    meta = record(here, size=16, episodes=1, max_frames=2)
    assert not np.load(here / "game" / "clips" / "000000.actions.npy").any()
    assert meta["action_dim"] == 2


def test_box_actions_are_recorded_as_vectors(here):
    pytest.importorskip("gymnasium")
    pytest.importorskip("pygame")
    meta = record(here, env="Pendulum-v1", size=16)
    assert meta["action_dim"] == 1 and not meta["discrete"]
    recorded = [np.load(path) for path in (here / "game").rglob("*.actions.npy")]
    assert meta["reach"] == max(abs(actions).max() for actions in recorded) > 1          # of 2
    assert np.allclose(meta["action_rms"], np.sqrt(np.mean(np.concatenate(recorded) ** 2, axis=0)))
    frames, actions = source(here / "game", frame_size=16).clip(0)
    assert frames.shape == (4, 3, 16, 16) and actions.shape == (4, 1) and actions.dtype == np.float32
    assert data.measure(source(here / "game", frame_size=16))["discrete"] is False


def test_an_unknown_environment_is_named(here):
    pytest.importorskip("gymnasium")
    with pytest.raises(UserError, match="--env=NoSuchGame-v1"):
        record(here, env="NoSuchGame-v1")


def game(gymnasium, actions, picture):
    """A registered environment whose every picture is the given one."""
    class Game(gymnasium.Env):
        metadata, action_space = {"render_modes": ["rgb_array"]}, actions
        observation_space = gymnasium.spaces.Discrete(1)

        def __init__(self, render_mode=None):
            self.render_mode = render_mode

        def reset(self, **_):
            return 0, {}

        def step(self, action):
            return 0, 0.0, False, False, {}

        def render(self):
            return picture
    gymnasium.register("Game-v0", Game)
    return "Game-v0"


@pytest.mark.filterwarnings("ignore")
def test_actions_that_do_not_count_from_zero_do_so_when_recorded(here):
    gymnasium = pytest.importorskip("gymnasium")
    env = game(gymnasium, gymnasium.spaces.Discrete(3, start=-1), np.zeros((8, 8, 3), np.uint8))
    assert record(here, env=env, max_frames=30)["action_dim"] == 3
    actions = np.load(here / "game" / "clips" / "000000.actions.npy")
    assert actions[0] == 0 and set(actions) == {0, 1, 2}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("picture", [None, np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_an_environment_without_pictures_is_named(here, picture):
    gymnasium = pytest.importorskip("gymnasium")
    with pytest.raises(UserError, match="--env=Game-v0: its picture is .*, expected uint8 h w 3"):
        record(here, env=game(gymnasium, gymnasium.spaces.Discrete(3), picture))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("error", [ValueError("no such level"), OSError("no font"), KeyError("score")], ids=repr)
def test_an_environment_that_fails_is_named(here, error):
    gymnasium = pytest.importorskip("gymnasium")

    class Picture:
        def __get__(self, *_):
            raise error
    env = game(gymnasium, gymnasium.spaces.Discrete(3), np.zeros((8, 8, 3), np.uint8))
    gymnasium.registry[env].entry_point.render = property(Picture().__get__)
    with pytest.raises(UserError, match=f"^--env=Game-v0, episode 0: .*{error.args[0]}"):
        record(here, env=env)


@pytest.mark.filterwarnings("ignore")
def test_actions_of_several_parts_are_refused(here):
    gymnasium = pytest.importorskip("gymnasium")
    env = game(gymnasium, gymnasium.spaces.MultiDiscrete([3, 2]), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="MultiDiscrete.* only Discrete and flat Box"):
        record(here, env=env)


def test_an_environment_of_a_package_that_is_not_there_is_named(here):
    pytest.importorskip("gymnasium")
    with pytest.raises(UserError, match="--env=nowhere:Game-v0, episode 0: No module named 'nowhere'"):
        record(here, env="nowhere:Game-v0")


def test_from_a_folder_of_films_to_a_rollout_in_three_commands(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "clips").mkdir()
    for i in range(5):
        write_film(tmp_path / "clips" / f"{i}.mp4", np.arange(12) / 20)
    (tmp_path / "clips" / "torn.mp4").write_bytes(b"no film")

    def command(*arguments):
        result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
        return result.stdout
    folder, out = f"{tmp_path}/video", f"{tmp_path}/run"
    printed = command("data.py", f"--src={tmp_path}/clips", f"--out={folder}", "--size=16", "--fps=20", "--workers=2")
    assert "4 train clips, 48 frames of (3, 16, 16)" in printed and "1 sources left out" in printed
    command("train.py", "config/video.py", f"--data_dir={folder}", f"--out_dir={out}", "--frame_size=16", "--frames=6",
            "--channels=16", "--head_dim=16", "--channel_mults=1,2", "--video_attn_resolutions=4", "--window=4",
            "--batch_size=2", "--max_steps=2", "--eval_interval=2", "--eval_clips=2", "--picture_frames=5")
    command("sample.py", f"--checkpoint={out}/checkpoint.pt", f"--out={tmp_path}/rollout.gif", "--frames=14",
            "--samples=1", "--steps=1")                     # longer than any of the clips
    with Image.open(tmp_path / "rollout.gif") as gif:
        assert gif.n_frames == 14
