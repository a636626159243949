"""The scripts as one runs them: files they leave, what they say, exit codes, and mistakes in one line."""

import fcntl
import importlib
import json
import os
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import TINY, flags, load, write_digits

import model
from config import UserError, read_settings
from data import open_source
from sample import find_checkpoint

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}  # refuses at once

SHORT = TINY | {"max_steps": 4, "checkpoint_interval": 2, "eval_interval": 4, "picture_frames": 3}
ROLLOUT = {"frames": 6, "samples": 3, "context": 2, "steps": 2, "scale": 2, "fps": 5, "device": "cpu"}


# ------------------------------------------------------------------------------------------------
# Helpers: a command in a process of its own, and, to save the seconds that importing torch takes, in this one


def start(folder, script, *arguments):
    """`python script ...` in `folder`, where nothing can be downloaded."""
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, arguments)], cwd=folder, text=True,
                            env=os.environ | OFFLINE | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def finish(process):
    out, err = process.communicate(timeout=300)
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def signal_when_training(process, number, folder):
    """Sends the signal when the second step is in the log."""
    log, began = folder / "log.jsonl", time.monotonic()
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 3):
        if time.monotonic() > began + 300:
            process.kill()
        time.sleep(0.05)
    process.send_signal(number)


@pytest.fixture
def command(capfd, monkeypatch):
    """Runs a script as `python script ...` would in `folder`, in this process."""
    def run(folder, script, *arguments):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capfd.readouterr()
        code, message = 0, ""
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as ended:  # with text: Python prints it and exits with 1
            code, message = (1, f"{ended.code}\n") if isinstance(ended.code, str) else (ended.code or 0, "")
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err + message)

    return run


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder in which commands were run, two at a time as each takes seconds to start: `python train.py
    config/mnist.py`, shortened, then `python sample.py`, one run interrupted and one, without data, terminated.
    (folder, {name: what came of the command})."""
    folder = tmp_path_factory.mktemp("workshop")
    digits = write_digits(folder / "digits")
    endless = TINY | {"max_steps": 10**6}
    runs = {
        "train": start(folder, "train.py", ROOT / "config" / "mnist.py", *flags(SHORT | {"data_dir": digits})),
        "SIGINT": start(folder, "train.py", *flags(endless | {"data_dir": digits, "out_dir": "SIGINT"})),
    }
    signal_when_training(runs["SIGINT"], signal.SIGINT, folder / "SIGINT")
    ended = {name: finish(process) for name, process in runs.items()}
    runs = {
        "SIGTERM": start(folder, "train.py", *flags(endless | {"data_dir": "nothing", "out_dir": "SIGTERM"})),
        "sample": start(folder, "sample.py", "--out=rollout.gif", *flags(ROLLOUT)),
    }
    ended["sample"] = finish(runs["sample"])
    signal_when_training(runs["SIGTERM"], signal.SIGTERM, folder / "SIGTERM")
    return folder, ended | {"SIGTERM": finish(runs["SIGTERM"])}


@pytest.fixture(scope="module")
def vivid(workshop):
    """The trained checkpoint, its network's output and its modulation by the noise level turned up: after so few steps
    they are next to nothing, and what changes them would be lost in rounding."""
    state = load(workshop[0] / "out/mnist")
    for weights in (state["model"], *state["ema"].values()):
        for name, gain in weights.items():
            if name.endswith("gain"):
                gain.fill_(1.0 if weights is state["model"] else 0.9)
    path = workshop[0] / "vivid" / "checkpoint.pt"
    path.parent.mkdir()
    torch.save(state, path)
    return path


@pytest.fixture
def sampled(command, workshop, tmp_path):
    """Runs sample.py on the trained checkpoint; returns what it said and the path of what it wrote."""

    def run(name, **changes):
        changes = {"checkpoint": workshop[0] / "out/mnist/checkpoint.pt", "out": tmp_path / name} | changes
        done = command(workshop[0], "sample.py", *flags(ROLLOUT | changes))
        assert done.code == 0, done.err
        return done.out, tmp_path / name

    return run


def assert_refused(done, *named):
    """Exit code 1 and one line on stderr, which names what is wrong."""
    assert done.code == 1
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and done.err.endswith("\n")
    for part in named:
        assert part in done.err


# ------------------------------------------------------------------------------------------------
# Train, then sample


def test_training_leaves_a_checkpoint_a_log_a_picture_and_snapshots(workshop):
    folder, ended = workshop
    done, out = ended["train"], folder / "out/mnist"
    assert done.code == 0, done.err
    assert "done at step 4: out/mnist/checkpoint.pt" in done.out
    assert "step 4: denoising error" in done.out
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "checkpoint-previous.pt", "log.jsonl", "log.png",
                                                    "rollout-00000004.png", "ema-00000002.pt", "ema-00000004.pt"}
    assert load(out)["step"] == 4


def test_sampling_finds_the_checkpoint_and_writes_the_gif(workshop):
    folder, ended = workshop
    done = ended["sample"]
    assert done.code == 0, done.err
    assert "out/mnist/checkpoint.pt, step 4" in done.out
    assert "rollout.gif: 3 x 6 frames, the first 2 given" in done.out
    with Image.open(folder / "rollout.gif") as gif:
        assert gif.format == "GIF" and gif.n_frames == 6 and gif.info["loop"] == 0
        cell = 16 * 2 + 2  # pixels, and a border of one on either side
        assert gif.size == (3 * cell, cell)
        for frame in range(6):
            gif.seek(frame)
            assert gif.info["duration"] == 200
            red, green, blue = gif.convert("RGB").getpixel((0, 0))
            assert (red > 200 and blue < 50) if frame < 2 else (red == green == blue)  # given frames stand out
    assert not list(folder.glob("*.part")) + list(folder.glob(".*.part"))


def test_the_newest_checkpoint_is_taken(command, workshop, tmp_path):
    for name, age in (("old", 200), ("new", 100), ("older", 300)):
        shutil.copytree(workshop[0] / "out/mnist", tmp_path / "out" / name)
        then = time.time() - age
        os.utime(tmp_path / "out" / name / "checkpoint.pt", (then, then))
    done = command(tmp_path, "sample.py", *flags(ROLLOUT | {"frames": 2, "out": "made/a.npy"}))
    assert done.code == 0 and "\nout/new/checkpoint.pt, step 4" in "\n" + done.out, done.err
    assert (tmp_path / "made/a.npy").exists()


def test_of_a_folder_the_newest_checkpoint_is_taken_links_to_other_disks_included(workshop, tmp_path):
    run, elsewhere, link = workshop[0] / "out/mnist", tmp_path / "disk/long", tmp_path / "runs/[1]"
    shutil.copytree(run, tmp_path / "runs/old")
    os.utime(tmp_path / "runs/old/checkpoint.pt", (0, 0))
    shutil.copytree(run, elsewhere)
    link.symlink_to(elsewhere)
    assert find_checkpoint(str(tmp_path / "runs")) == str(link / "checkpoint.pt")
    assert find_checkpoint(str(link)) == str(link / "checkpoint.pt")
    assert find_checkpoint("nothing.pt") == "nothing.pt"                # and `load_file` says that there is none
    with pytest.raises(UserError, match=f"no checkpoint under {tmp_path}/empty"):
        (tmp_path / "empty").mkdir()
        find_checkpoint(str(tmp_path / "empty"))


@pytest.mark.parametrize("extension", ["gif", "png", "npy"])
def test_the_same_command_makes_the_same_file_and_another_seed_another(sampled, extension):
    files = [sampled(f"{i}.{extension}", seed=seed, churn=5.0)[1].read_bytes() for i, seed in enumerate((3, 3, 4))]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("changes", [
    {"solver": "heun"}, {"steps": 3}, {"churn": 5.0}, {"guidance": 1.5}, {"sigma_min": 0.5}, {"sigma_max": 20.0},
    {"rho": 3.0}, {"context_noise": 0.5}, {"ema": 0.0}, {"seed": 1}, {"first_clip": 1}, {"data_dir": "other"}], ids=str)
def test_every_setting_of_a_rollout_reaches_it(sampled, workshop, vivid, changes):
    write_digits(workshop[0] / "other", seed=1)
    usual, changed = (np.load(sampled(f"{len(how)}.npy", checkpoint=vivid, **{"steps": 4} | how)[1])
                      for how in ({}, changes))
    assert usual.shape == changed.shape and (usual != changed).any()


def test_the_past_is_read_with_half_of_the_largest_noise_of_training_unless_another_is_given(sampled, vivid):
    said, usual = sampled("a.npy", checkpoint=vivid)
    half = load(vivid.parent)["settings"]["context_noise"] / 2
    assert half > 0 and f"noise of level {half:g}," in said
    assert np.array_equal(np.load(usual), np.load(sampled("b.npy", checkpoint=vivid, context_noise=half)[1]))


def test_compiling_is_asked_for_each_of_the_two_passes_of_a_frame(sampled, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled.append(function.__name__) or function)
    sampled("a.npy", compile=True)
    assert compiled == ["step", "read"]


def test_more_given_frames_than_the_model_sees_at_once_are_told(sampled):
    """A window of three, with the present one."""
    assert "the model sees" not in sampled("a.npy", context=2)[0]
    assert "--context=3: the model sees the 2 frames before one; older ones" in sampled("b.npy", context=3)[0]


def test_the_given_frames_are_those_of_the_data(sampled, workshop):
    made = np.load(sampled("a.npy", samples=2, first_clip=7, context=5)[1])
    assert made.shape == (2, 6, 16, 16, 1) and made.dtype == np.uint8
    settings = SimpleNamespace(**load(workshop[0] / "out/mnist")["settings"] | {"frames": 6})
    val = open_source(settings, "val")
    for sample, clip in zip(made, (7, 8), strict=True):
        frames = val.clip(clip)[0].transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(sample[:5], frames[:5])
        assert (sample[5] != frames[5]).any()
    train = np.load(sampled("b.npy", samples=2, first_clip=7, context=5, split="train")[1])
    np.testing.assert_array_equal(train[0, :5], open_source(settings, "train").clip(7)[0][:5].transpose(0, 2, 3, 1))


def test_a_contact_sheet_has_a_row_per_sample_and_a_column_per_frame(sampled):
    videos = np.load(sampled("a.npy")[1])
    with Image.open(sampled("a.png")[1]) as picture:
        sheet = np.asarray(picture)
    cell = 16 * 2 + 2
    assert sheet.shape == (3 * cell, 6 * cell, 3)
    for row in range(3):
        for column in range(6):
            framed = sheet[row * cell:(row + 1) * cell, column * cell:(column + 1) * cell]
            for shift in (1, 2):  # every pixel is two wide and high
                inside = framed[shift:-1:2, shift:-1:2]
                np.testing.assert_array_equal(inside, videos[row, column].repeat(3, axis=-1))


def test_a_longer_rollout_begins_like_a_shorter_one(sampled):
    short, long = (np.load(sampled(f"{n}.npy", frames=n)[1]) for n in (4, 7))
    np.testing.assert_array_equal(long[:, :4], short)


def test_a_rollout_can_start_from_nothing(sampled):
    out, path = sampled("a.npy", context=0, frames=2)
    assert "the first 0 given" in out
    made = np.load(path)
    assert made.shape == (3, 2, 16, 16, 1)
    assert (made[0, 0] != made[1, 0]).any() and (made[0, 0] != made[0, 1]).any()


def test_the_readmes_python_makes_frames(workshop, monkeypatch):
    monkeypatch.chdir(workshop[0])
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["rollout"].cache.position == 100
    assert names["picture"].shape == (1, 1, 16, 16) and names["picture"].dtype == torch.uint8


def test_raw_averaged_and_rebuilt_weights_all_sample(sampled):
    made = {ema: sampled(f"{ema}.npy", ema=ema) for ema in (0, 0.05, 0.1, 0.08)}
    assert "raw weights" in made[0][0] and "averaged over 0.08" in made[0.08][0]
    assert re.search(r"rebuilt from 2 snapshots; \d+(\.\d)?% of it is out of their reach", made[0.08][0])
    videos = [np.load(path) for _, path in made.values()]
    for i, video in enumerate(videos):
        assert all((video != other).any() for other in videos[:i])


@pytest.mark.parametrize("precision, atol", [("float32", 0), ("bfloat16", 40)])
def test_weights_alone_sample_like_their_checkpoint(command, sampled, workshop, tmp_path, precision, atol):
    """A file for sharing is a fraction of the checkpoint, and gives the same rollout: in float32, byte for byte."""
    out, path = sampled("shared.pt", precision=precision, ema=0.1)
    whole = workshop[0] / "out/mnist/checkpoint.pt"
    size = whole.stat().st_size / (4 if precision == "float32" else 8)          # of weights, momentum, two averages
    assert f"{path}: 0." in out and path.stat().st_size < 1.3 * size + 20_000
    a, b = (np.load(sampled(f"{name}.npy", **changes)[1]) for name, changes in
            (("a", {"ema": 0.1}), ("b", {"checkpoint": path, "ema": 0.05})))
    assert np.abs(a.astype(int) - b).mean() <= atol / 10 and (atol or np.array_equal(a, b))
    assert "weights averaged over 0.1" in sampled("c.npy", checkpoint=path)[0]
    wider = command(tmp_path, "sample.py", *flags(ROLLOUT | {"checkpoint": path, "ema": 0.2}))
    assert_refused(wider, "--ema=0.2", "averaged over 0.1")
    shutil.copytree(workshop[0] / "out/mnist", tmp_path / "run")
    shutil.copy(path, tmp_path / "run/checkpoint.pt")
    (tmp_path / "run/checkpoint-previous.pt").unlink()
    refused = command(workshop[0], "train.py", *flags(SHORT | {"out_dir": tmp_path / "run"}))
    assert_refused(refused, "checkpoint.pt", "it has no ema, optimizer, origin, recent")  # no training


def test_a_width_that_was_not_tracked_needs_snapshots(command, workshop, tmp_path):
    shutil.copy(workshop[0] / "out/mnist/checkpoint.pt", tmp_path)
    settings = ROLLOUT | {"checkpoint": tmp_path / "checkpoint.pt", "out": "a.npy", "frames": 2}
    assert_refused(command(tmp_path, "sample.py", *flags(settings | {"ema": 0.08})), "--ema=0.08", "ema-*.pt")
    assert command(tmp_path, "sample.py", *flags(settings | {"ema": 0.1})).code == 0


# ------------------------------------------------------------------------------------------------
# Data


def test_data_py_says_where_its_digits_come_from(command, workshop, monkeypatch):
    def refused(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refused)
    digits = workshop[0] / "digits"
    done = command(workshop[0], "data.py", f"--data_dir={digits}")
    assert done.code == 0, done.err
    assert "not downloaded" in done.out and "no network" in done.out
    path = re.escape(str(digits / "t10k-images-idx3-ubyte"))
    assert re.search(rf"^train: 36 digits, mean 0\.\d+, std 0\.\d+ \(MNIST, .*{path}\)$", done.out, re.M)
    assert re.search(rf"^val: 4 digits, mean 0\.\d+, std 0\.\d+ \(MNIST, .*{path}\)$", done.out, re.M)


def test_without_data_or_network_training_starts_with_font_digits_and_says_so_once(workshop):
    folder, ended = workshop
    done = ended["SIGTERM"]
    said = [line for line in done.out.splitlines() if "could not be downloaded" in line]
    assert len(said) == 1 and "font" in said[0] and "nothing" in said[0]
    entries = [json.loads(line) for line in (folder / "SIGTERM/log.jsonl").read_text().splitlines()]
    assert "font" in entries[0]["origin"] and entries[0]["origin"] in done.out
    assert entries[1]["loss"] > 0
    assert load(folder / "SIGTERM")["origin"] == entries[0]["origin"]


# ------------------------------------------------------------------------------------------------
# Interruptions


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_run_saves_and_can_be_sampled(command, workshop, tmp_path, name, code):
    folder, ended = workshop
    done = ended[name]
    assert done.code == code
    assert "Traceback" not in done.err
    step = load(folder / name)["step"]
    assert step >= 2 and f"stopped at step {step}: {name}/checkpoint.pt" in done.out
    assert json.loads((folder / name / "log.jsonl").read_text().splitlines()[-1])["step"] == step
    path = folder / name / "checkpoint.pt"
    done = command(tmp_path, "sample.py", *flags(ROLLOUT | {"checkpoint": path, "frames": 3, "out": "a.gif"}))
    assert done.code == 0, done.err
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3


# ------------------------------------------------------------------------------------------------
# --help and mistakes


def test_sampling_imports_no_compiler(workshop, tmp_path):
    """Which takes longer than a short rollout."""
    settings = flags(ROLLOUT | {"checkpoint": workshop[0] / "out/mnist/checkpoint.pt", "out": tmp_path / "a.gif"})
    code = f"""import sys, sample, config
sample.main(config.read_settings(vars(sample), {settings}))
raise SystemExit(3 if "torch._dynamo" in sys.modules else 4)"""
    path = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, "-c", code], cwd=workshop[0], env=path).returncode == 4


@pytest.mark.parametrize("script", ["train.py", "sample.py", "data.py"])
def test_help_describes_every_setting(command, tmp_path, script):
    done = command(tmp_path, script, "--help")
    assert done.code == 0 and "usage: python" in done.out
    described = dict(re.findall(r"^  --(\w+)=(?:.*?)  +(\S.*)$", done.out, re.M))
    module = importlib.import_module(script.removesuffix(".py"))
    assert set(described) == set(vars(read_settings(vars(module), [])))
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_one_line_and_exit_code_1(tmp_path):
    done = finish(start(tmp_path, "sample.py"))
    assert_refused(done, "no checkpoint under out/", "train.py")
    assert done.out == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line, named", [
    ("sample.py", ["no checkpoint under out/"]),
    ("sample.py --checkpoint=gone.pt", ["gone.pt"]),
    ("sample.py --checkpiont=a.pt", ["checkpiont", "did you mean 'checkpoint'"]),
    ("sample.py --frames=many", ["frames", "many"]),
    ("sample.py --frames=0", ["frames=0"]),
    ("sample.py --samples=0", ["samples=0"]),
    ("sample.py --context=-1", ["context=-1"]),
    ("sample.py --steps=0", ["steps=0"]),
    ("sample.py --frames=4 --context=5", ["--context=5", "--frames=4"]),
    ("sample.py --truth --actions=0,1", ["--truth", "--actions=0,1"]),
    ("sample.py --out=.", ["--out=. is a folder"]),
    ("train.py --batch_size=0", ["batch_size=0: must be at least 1"]),
    ("train.py --batchsize=3", ["batchsize", "did you mean 'batch_size'"]),
    ("train.py --batch_size=", ["batch_size", "int"]),
    ("train.py config/nothing.py", ["config/nothing.py"]),
    ("train.py batch_size=3", ["batch_size=3", "--key=value"]),
    ("data.py --datadir=x", ["datadir", "did you mean 'data_dir'"]),
])
def test_mistakes_are_named(command, tmp_path, line, named):
    done = command(tmp_path, *line.split())
    assert_refused(done, *named)
    assert not (tmp_path / "rollout.gif").exists()


def test_an_interrupted_rollout_keeps_the_frames_made_so_far(workshop, tmp_path):
    settings = ROLLOUT | {"checkpoint": workshop[0] / "out/mnist/checkpoint.pt", "frames": 100_000, "out": "a.npy"}
    process = start(tmp_path, "sample.py", *flags(settings))
    while process.poll() is None and b"frame/s" not in os.read(process.stderr.fileno(), 1000):
        pass                                                            # until the progress bar shows a rate
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 130, done.err
    made = np.load(tmp_path / "a.npy")
    assert 2 < made.shape[1] < 100_000 and f"x {made.shape[1]} frames, the first 2 given, stopped there" in done.out


def test_a_rollout_whose_terminal_is_closed_keeps_the_frames_made_so_far(workshop, tmp_path):
    """Which is told with a SIGHUP; after that, whatever is written to the terminal fails."""
    ours, theirs = os.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))          # of 80 columns, for a progress bar

    def take_terminal():
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
    settings = ROLLOUT | {"checkpoint": workshop[0] / "out/mnist/checkpoint.pt", "frames": 100_000, "out": "a.gif"}
    process = subprocess.Popen([sys.executable, str(ROOT / "sample.py"), *flags(settings)], cwd=tmp_path,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=theirs, stdout=theirs, stderr=theirs,
                               start_new_session=True, preexec_fn=take_terminal)
    os.close(theirs)
    while b"frame/s" not in os.read(ours, 1000):
        pass
    time.sleep(0.5)
    os.close(ours)
    try:
        assert process.wait(timeout=60) == 128 + signal.SIGHUP
    finally:
        process.kill()
    with Image.open(tmp_path / "a.gif") as gif:
        assert 2 < gif.n_frames < 100_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_rollout_stopped_before_its_first_frame_leaves_what_was_there(workshop, tmp_path, monkeypatch, capsys,
                                                                        number):
    """Nothing is given, and the signal comes before a frame is made."""
    def interrupted(*arguments):
        signal.raise_signal(number)
        return begin(*arguments)
    import sample
    begin = sample.start_rollout
    monkeypatch.setattr(sample, "start_rollout", interrupted)
    (tmp_path / "a.gif").write_bytes(b"made before")
    path = workshop[0] / "out/mnist/checkpoint.pt"
    changes = {"checkpoint": path, "context": 0, "frames": 9, "steps": 1, "out": tmp_path / "a.gif"}
    with pytest.raises(SystemExit) as ended:
        sample.main(read_settings(vars(sample), flags(changes)))
    assert ended.value.code == 128 + number and (tmp_path / "a.gif").read_bytes() == b"made before"
    assert "frames, the first" not in capsys.readouterr().out


def test_the_truth_may_be_shown_above_each_sample(sampled):
    made, both = (np.load(sampled(f"{truth}.npy", truth=truth)[1]) for truth in (False, True))
    assert np.array_equal(both[1::2], made)
    assert np.array_equal(both[0::2, :2], made[:, :2]) and (both[0::2, 2:] != made[:, 2:]).any()


def test_a_users_own_file_is_the_prompt(sampled, tmp_path):
    """Frames in the model's shape are given as they are; of another, cropped and resized, and said to be."""
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "own.npy", frames)
    out, path = sampled("a.npy", prompt=tmp_path / "own.npy", context=3)
    made = np.load(path)
    assert made.shape == (3, 6, 16, 16, 1) and "own.npy" in out and "resized" not in out
    for sample in made:
        assert np.array_equal(sample[:3, ..., 0], frames[:3])
    assert not np.array_equal(made[0, 3:], made[1, 3:])
    Image.fromarray(frames[0].repeat(2, 0)).save(tmp_path / "tall.png")
    out, path = sampled("b.npy", prompt=tmp_path / "tall.png", context=1)
    assert "tall.png: 16 x 32 pixels, cropped and resized to 16 x 16" in out
    expected = frames[0].repeat(2, 0)[8:24]
    assert np.array_equal(np.load(path)[0, 0, ..., 0], expected)


@pytest.mark.parametrize("changes, named", [
    ({"actions": "0,1"}, ["--actions=0,1", "without actions"]),
    ({"prompt": "nothing.gif", "truth": True}, ["--truth", "--prompt"]),
    ({"prompt": "nothing.gif"}, ["nothing.gif"]),
    ({"prompt": "nothing.gif", "context": 0}, ["--prompt=nothing.gif --context=0"]),
    ({"prompt": "nothing.gif", "first_clip": 3, "split": "train"}, ["--first_clip, --split", "nothing with --prompt"]),
    ({"prompt": ROOT / "readme_images/mask.png", "context": 2}, ["mask.png", "1 frame", "--context=1"]),
    ({"split": "test"}, ["split", "test"]),
    ({"device": "abacus"}, ["abacus"]),
    ({"seed": -1}, ["seed"]),
    ({"first_clip": -1}, ["first_clip"]),
    ({"ema": -1}, ["ema"]),
    ({"ema": 1}, ["ema"]),
    ({"sigma_min": 0}, ["sigma_min"]),
    ({"rho": 0.001}, ["rho"]),
    ({"rho": 1e300}, ["rho"]),
    ({"sigma_max": "inf"}, ["sigma_max=inf"]),
    ({"sigma_max": 1e38}, ["sigma_max=1e+38", "at most 1e6"]),
    ({"scale": 5000}, ["--scale=5000: at most 64"]),
    ({"guidance": "nan"}, ["guidance=nan"]),
    ({"context_noise": -0.5}, ["--context_noise=-0.5"]),
    ({"fps": 60, "out": "a.gif"}, ["--fps=60", "50"]),
    ({"play": True, "truth": True}, ["--truth does nothing with --play"]),
], ids=lambda value: " ".join(value))
def test_mistakes_that_need_a_checkpoint_to_show_are_named(command, workshop, tmp_path, changes, named):
    path = workshop[0] / "out/mnist/checkpoint.pt"
    done = command(tmp_path, "sample.py", *flags(ROLLOUT | {"checkpoint": path} | changes))
    assert_refused(done, *named)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_of_another_kind_is_refused(command, workshop, tmp_path):
    """Floats in [0, 1] would be taken for latents, and shown as black."""
    np.save(tmp_path / "own.npy", np.ones((3, 1, 16, 16), np.float32))
    path = workshop[0] / "out/mnist/checkpoint.pt"
    done = command(tmp_path, "sample.py", *flags(ROLLOUT | {"checkpoint": path, "prompt": tmp_path / "own.npy"}))
    assert_refused(done, "own.npy holds float32", "trained on pixels, uint8")


def test_data_of_another_shape_is_refused(command, workshop, tmp_path):
    changed = torch.load(workshop[0] / "out/mnist/checkpoint.pt", weights_only=True)
    changed["settings"]["frame_size"] = 32
    torch.save(changed, tmp_path / "other.pt")
    done = command(workshop[0], "sample.py", *flags(ROLLOUT | {"checkpoint": tmp_path / "other.pt", "out": "a.npy"}))
    assert_refused(done, "frames of (1, 32, 32) and 0 actions; this model knows (1, 16, 16) and 0")


def test_the_checkpoint_is_not_overwritten_by_its_own_weights(command, workshop, tmp_path):
    shutil.copy(workshop[0] / "out/mnist/checkpoint.pt", tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    refused = command(tmp_path, "sample.py", "--checkpoint=checkpoint.pt", f"--out={tmp_path}/checkpoint.pt")
    assert_refused(refused, "is the checkpoint itself")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_from_nothing_no_data_is_needed(sampled, tmp_path):
    out, path = sampled("a.NPY", context=0, frames=3, data_dir=tmp_path / "not_there")
    assert np.load(path).shape[1] == 3 and "font" not in out


def test_an_unknown_extension_is_refused_before_anything_is_sampled(command, workshop, tmp_path, monkeypatch):
    def sampled_first(*_):
        raise AssertionError("the mistake shows only after minutes of sampling")

    monkeypatch.setattr(model.Denoiser, "step", sampled_first)
    path = workshop[0] / "out/mnist/checkpoint.pt"
    done = command(tmp_path, "sample.py", *flags(ROLLOUT | {"checkpoint": path, "out": "a.avi"}))
    assert_refused(done, "a.avi", ".gif", ".png", ".npy")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_videos_is_named(command, tmp_path):
    config = ROOT / "config" / "video.py"
    chosen = [config] if config.exists() else ["--dataset=video"]
    assert_refused(command(tmp_path, "train.py", *chosen, "--data_dir=nowhere", "--device=cpu"), "nowhere")


@pytest.mark.parametrize("content", ["", "not a checkpoint"])
def test_a_file_that_is_no_checkpoint_is_named(command, tmp_path, content):
    (tmp_path / "a.pt").write_text(content)
    assert_refused(command(tmp_path, "sample.py", "--checkpoint=a.pt"), "a.pt")


# ------------------------------------------------------------------------------------------------
# The programs beside the tests: what they count is asserted, what they time is not


def test_the_benchmark_counts_what_the_method_saves(command, tmp_path, workshop):
    """Operations per supervised frame, over those of an image: the encoder twice and a past for one noised copy, and
    less for each of four that share them; the shared past costs less than a past for every copy."""
    done = command(tmp_path, "tests/bench.py", str(ROOT / "config/mnist.py"), "--quick", "--supervised_frames=8",
                   "--channels=16", "--head_dim=16", "--channel_mults=1,2", "--frame_size=16", "--digit_size=10",
                   "--far=3", "--window=2", "--device=cpu", "--out=bench.json",
                   f"--data_dir={workshop[0] / 'digits'}")
    assert done.code == 0, done.err
    tables = json.loads((tmp_path / "bench.json").read_text())
    assert set(tables) == {"train", "conv", "attention", "data", "sample", "memory"} and all(tables.values())
    ratios = {(row["R"], row["T"]): row["FLOPs/image"] for row in tables["train"]}
    assert 1.2 < ratios[1, 8] < 1.6 and 1 < ratios[4, 8] < 1.25
    for row in tables["attention"]:
        frames, window = row["T"], row["window"]
        seen = sum(2 * min(t, window - 1) + 2 for t in range(frames))
        assert row["hidden pairs %"] == pytest.approx(100 * (1 - seen / (2 * frames) ** 2))
    (row,) = tables["memory"]                                # momentum, two averages, weight and gradient; fp32
    assert row["state MB"] == pytest.approx(20 * row["million parameters"])
    assert row["MB once"] == pytest.approx(2 * row["million parameters"]) and row["MB per clip"] > 1    # bfloat16
    for size in (12, 24, 80):
        room = 0.9e3 * size - row["state MB"] - row["MB once"]
        assert row[f"clips in {size} GB"] == int(room / row["MB per clip"]) > 0
    assert len({row["cache MB"] for row in tables["sample"] if "cache MB" in row}) == 1


def test_the_benchmark_counts_the_memory_that_one_more_clip_takes():
    import bench
    flags = "--quick --channels=16 --head_dim=16"
    cfg = read_settings(bench.DEFAULTS | vars(bench), [str(ROOT / "config/mnist.py"), *flags.split()])
    clips = torch.zeros(5, cfg.frames, *bench.model_of(cfg).cfg.frame_shape)
    kept = [bench.kept_bytes(bench.video_step(cfg, clips[:n], cfg.noised_copies, bench.CPU).loss) for n in (4, 5)]
    (row,) = bench.memory_table(cfg, bench.CPU)
    assert row["MB per clip"] == pytest.approx((kept[1] - kept[0]) / 2e6, rel=0.02)


def test_the_benchmark_counts_what_no_machine_could_compute():
    import bench
    n, weight = 10 ** 7, torch.zeros(3, 5, requires_grad=True)
    assert bench.count_flops(lambda: (torch.zeros(n, 3) @ weight).sum().backward()) == 2 * (2 * n * 3 * 5)
    assert bench.count_flops(lambda: torch.zeros(n, n) @ torch.zeros(n, 5)) == 2 * n * n * 5            # 400 TB


def test_the_benchmark_counts_nothing_that_is_compiled(monkeypatch):
    """torch compiles code no more that has once run under a counter: only the first row would be of compiled steps."""
    import bench
    compiled, counted = [], []
    monkeypatch.setattr(bench.train, "compiled", lambda model: compiled.append(model) or model)
    monkeypatch.setattr(bench, "count_flops", lambda function: counted.append(function.__self__.model) or 1)
    flags = "--quick --supervised_frames=8 --repeat_times=1 --compile --channels=8 --head_dim=8"
    cfg = read_settings(bench.DEFAULTS | vars(bench), [str(ROOT / "config/mnist.py"), *flags.split()])
    rows = bench.train_table(cfg, torch.device("cpu"))
    assert len(compiled) == 2 * len(rows) and len(counted) == 1 + len(rows) and not {*compiled} & {*counted}
