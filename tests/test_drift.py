"""The drift figures' labels belong to the digits that data.py draws, whichever MNIST files there are."""

import gzip
import json
from types import SimpleNamespace

import drift
import numpy as np
import pytest
import torch

from config import UserError, read_settings
from data import FILES, load_digits

COUNTS = {"train": 40, "val": 30}


def numbered(split):
    """As many numbers as the split has digits; those of the two splits differ."""
    return np.arange(COUNTS[split], dtype=np.uint8) + {"train": 0, "val": 100}[split]


@pytest.fixture
def folder(tmp_path):
    """MNIST's images, each filled with its number, and its labels, which are these numbers."""
    for split, name in FILES.items():
        header = np.array([2051, COUNTS[split], 28, 28], ">i4").tobytes()
        images = np.repeat(numbered(split), 28 * 28)
        (tmp_path / name).write_bytes(gzip.compress(header + images.tobytes()))
        (tmp_path / drift.LABELS[split][0]).write_bytes(gzip.compress(bytes(8) + numbered(split).tobytes()))
    return tmp_path


@pytest.mark.parametrize("there", [("train", "val"), ("train",), ("val",)], ids="+".join)
def test_every_digit_of_the_bank_has_its_own_label(folder, there):
    for split in {*FILES} - {*there}:
        (folder / FILES[split]).unlink()
    for split in FILES:
        digits, _ = load_digits(folder, split, seed=0)
        assert len(digits) > 2 and np.array_equal(drift.read_labels(folder, split), digits[:, 0, 0])


def test_labels_that_are_missing_are_downloaded(folder, monkeypatch):
    fetched = []

    def download(name, where, md5):
        fetched.append((name, md5[name]))
        (where / name).write_bytes(gzip.compress(bytes(8) + numbered("train").tobytes()))
    monkeypatch.setattr(drift, "download", download)
    (folder / drift.LABELS["train"][0]).unlink()
    for _ in range(2):
        assert np.array_equal(drift.read_labels(folder, "train"), numbered("train"))
    assert fetched == [drift.LABELS["train"]]


def test_unpacked_labels_are_read(folder):
    packed = folder / drift.LABELS["val"][0]
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert np.array_equal(drift.read_labels(folder, "val"), numbered("val"))


def test_digits_without_labels_are_refused(tmp_path):
    with pytest.raises(UserError, match="have no labels"):
        drift.read_labels(tmp_path, "val")


@pytest.mark.parametrize("changes", [{"digits": 2}, {"dataset": "world"}], ids=str)
def test_a_checkpoint_of_anything_but_one_digit_is_refused(monkeypatch, changes):
    settings = {"dataset": "digits", "digits": 1, "data_dir": "data/mnist"} | changes
    monkeypatch.setattr(drift, "load_model", lambda *_: (SimpleNamespace(), {"settings": settings}))
    with pytest.raises(UserError, match=f"of {settings['digits']} digits|{settings['digits']} digits of dataset"):
        drift.main(SimpleNamespace(device="cpu", checkpoint="c.pt", ema=0.05, frames=4, data_dir=""))


def test_figures_that_are_not_finite_are_printed(capsys):
    """A file has null for them: the spread of one clip's ink."""
    drift.print_table("one clip", {"ink_spread": [None, None, 1.0]}, SimpleNamespace(given=0, frames=3, every=2))
    assert capsys.readouterr().out.split()[-3:] == ["ink_spread", "nan", "1.00"]


def test_the_table_says_how_far_other_clips_might_have_been(capsys):
    """Of four clips one is seen in both frames of a row and one in one of them."""
    seen = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    cfg = SimpleNamespace(given=1, frames=3, every=2)
    drift.print_table("some way", {"identity": [1, 0.5, 0.25], "seen": seen}, cfg)
    rows = [line.split() for line in capsys.readouterr().out.strip().splitlines()]
    assert rows[2] == ["identity", "0.38"] and rows[3] == ["+-", f"{np.std([1, 0.5, 0, 0], ddof=1) / 2:.2f}"]


def test_the_past_is_read_as_in_training_unless_other_levels_are_asked_for(monkeypatch, folder, tmp_path):
    """The rollouts are the true clips here, whose first pixel is the digit that the classifier sees."""
    settings = {"dataset": "digits", "digits": 1, "data_dir": str(folder), "context_noise": 0.3}
    truth, told = torch.randint(1, 10, (2, 6, 1, 4, 4), dtype=torch.uint8), []
    labels, truth[..., 0, 0] = torch.tensor([3, 7]), torch.tensor([3, 7])[:, None, None]

    def net(frames):
        return torch.eye(10)[(frames[:, 0, 0, 0] * 255).round().long()]

    def roll_out(model, clips, given, frames, stats, how, progress):
        told.append(how["context_noise"])
        return clips.numpy().swapaxes(0, 1)
    monkeypatch.setattr(drift, "load_model", lambda *_: (SimpleNamespace(), {"settings": settings, "stats": {}}))
    monkeypatch.setattr(drift, "judged", lambda *_: (truth, labels, net))
    monkeypatch.setattr(drift, "roll_out", roll_out)
    flags = ["--frames=6", f"--out={tmp_path}/drift.json", "--checkpoint=c.pt", "--device=cpu"]
    drift.main(read_settings(vars(drift), flags))
    drift.main(read_settings(vars(drift), [*flags, "--context_noise=-1,0", f"--plot={tmp_path}/drift.png"]))
    assert told == [0.15, 0.15, 0.0] and (tmp_path / "drift.png").stat().st_size > 10_000
    figures = json.loads((tmp_path / "drift.json").read_text())
    assert list(figures) == ["truth", "context_noise 0.15", "context_noise 0.0"]
    assert figures["context_noise 0.0"]["identity"] == [1] * 6 and figures["truth"]["error"] == [0] * 6
