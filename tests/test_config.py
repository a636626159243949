"""Config files and flags: what overrides what, which types are taken, and how mistakes are reported."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import config
from config import UserError, help_text, read_settings

ROOT = Path(__file__).resolve().parents[1]

DEFAULTS = {
    "batch_size": 8, "lr": 1e-2, "out_dir": "out", "compile": False, "resume": None, "shift": 0,
    "channel_mults": (1, 2), "betas": [0.9, 0.99], "names": ("a", "b"), "mixed": (0, 0.5), "empty": (),
    "_private": 1, "os": os, "Path": Path,
}

SCRIPT = '''"""A script for tests.

Not part of the help.
"""
import math
import os

from config import UserError, run

# -- data
batch_size = 8          # clips per step
out_dir = "out"         # where; a # and "quotes" are fine
channel_mults = (1, 2)  # widths
# -- optimizer
betas = (0.9,
         0.99)          # Adam's two
compile = False         # torch.compile
_private = 3            # not a setting


# ---------------------------------
# The loop

def main(settings):
    if settings.out_dir == "missing":
        raise UserError("no such folder")
    if settings.out_dir == "interrupt":
        raise KeyboardInterrupt
    if settings.out_dir == "defect":
        raise RuntimeError("a defect")
    print(settings.batch_size, settings.out_dir, settings.compile)
    print("line\\n" * 10_000 * (settings.out_dir == "long"))


if __name__ == "__main__":
    run(main, globals())
'''


def read(*argv):
    return read_settings(DEFAULTS, argv)


def refusal(*argv):
    """The message of the UserError that `argv` causes."""
    with pytest.raises(UserError) as error:
        read(*argv)
    return str(error.value)


@pytest.fixture
def config_file(tmp_path):
    """Writes a config file; returns its path."""

    def write(text, name="experiment.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def script(tmp_path):
    """Runs `python toy.py ARGUMENTS` in a shell, toy.py being SCRIPT; returns the finished process."""
    (tmp_path / "toy.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(arguments):
        command = f"{shlex.quote(sys.executable)} toy.py {arguments}"
        options = {"shell": True, "capture_output": True, "text": True}
        return subprocess.run(command, env=environment, cwd=tmp_path, **options)

    return start


# What is a setting, and what overrides it.


def test_defaults_are_the_public_plain_values():
    others = ("_private", "os", "Path")
    assert vars(read()) == {key: value for key, value in DEFAULTS.items() if key not in others}


def test_flags_win_over_files_wherever_they_stand(config_file):
    path = config_file("batch_size = 16\nlr = 0.5\n")
    for argv in ([path, "--batch_size=32"], ["--batch_size=32", path]):
        settings = read(*argv)
        assert (settings.batch_size, settings.lr, settings.out_dir) == (32, 0.5, "out")


def test_the_later_file_and_the_later_flag_win(config_file):
    first, second = config_file("shift = 1\nlr = 0.1", "1.py"), config_file("shift = 2", "2.py")
    assert (read(first, second).shift, read(second, first).shift) == (2, 1)
    assert read(first, second).lr == 0.1
    assert read("--shift=3", "--shift", "4").shift == 4
    assert read("--resume=3", "--resume", "x").resume == "x"


def test_defaults_are_left_alone(config_file):
    before = dict(DEFAULTS)
    read(config_file("betas = [0, 1]"), "--lr=3")
    assert before == DEFAULTS


def test_config_file_is_python(config_file):
    text = "import os\nfrom math import sin\n_steps = 4\ndef twice(x): return 2 * x\nshift = twice(_steps)\n"
    assert read(config_file(text)).shift == 8


# Types, in both forms of a flag.

ACCEPTED = [
    ("batch_size", "32", 32),
    ("batch_size", "1e6", 1_000_000),
    ("shift", "-1", -1),
    ("lr", "1e-3", 1e-3),
    ("lr", "1", 1.0),
    ("lr", "inf", float("inf")),
    ("compile", "True", True),
    ("compile", "1", True),
    ("compile", "false", False),
    ("compile", "0", False),
    ("out_dir", "x.gif", "x.gif"),
    ("out_dir", "a=b.gif", "a=b.gif"),
    ("out_dir", "1", "1"),
    ("out_dir", "None", "None"),
    ("channel_mults", "1,2,4", (1, 2, 4)),
    ("channel_mults", "(1, 2, 4)", (1, 2, 4)),
    ("channel_mults", "[1,2,4]", (1, 2, 4)),
    ("channel_mults", "2", (2,)),
    ("channel_mults", "(2,)", (2,)),
    ("channel_mults", "()", ()),
    ("betas", "0,1e-1", [0.0, 0.1]),
    ("names", "x, 1", ("x", "1")),
    ("names", "('x', 'y')", ("x", "y")),
    ("mixed", "0.25,1", (0.25, 1.0)),
    ("empty", "1,x", (1, "x")),
    ("resume", "1e-3", 1e-3),
    ("resume", "(1, 2)", (1, 2)),
    ("resume", "out/x.pt", "out/x.pt"),
]


@pytest.mark.parametrize("form", ["equals", "space"])
@pytest.mark.parametrize(("key", "text", "expected"), ACCEPTED)
def test_value(form, key, text, expected):
    argv = [f"--{key}={text}"] if form == "equals" else [f"--{key}", text]
    value = getattr(read(*argv, "--shift=9"), key) if key != "shift" else read(*argv).shift
    assert value == expected
    assert type(value) is type(expected)
    if isinstance(expected, (tuple, list)):
        assert [type(element) for element in value] == [type(element) for element in expected]


def test_equals_form_takes_any_text():
    assert read("--out_dir=").out_dir == ""
    assert read("--out_dir=--lr").out_dir == "--lr"
    assert read("--out_dir=-x").out_dir == "-x"


def test_bare_bool_flag_is_true(config_file):
    assert read("--compile").compile is True
    assert read("--compile", "--lr=1").compile is True
    settings = read("--compile", config_file("lr = 3"))  # the file is not taken for the flag's value
    assert (settings.compile, settings.lr) == (True, 3.0)


@pytest.mark.parametrize(("key", "text"), [
    ("batch_size", "1.5"), ("batch_size", "1,2"), ("batch_size", "True"), ("batch_size", "many"),
    ("lr", "fast"), ("lr", "False"), ("compile", "2"),
    ("channel_mults", "1,x"), ("channel_mults", "1,0.5"), ("betas", "True"),
])
def test_wrong_type_in_a_flag(key, text):
    message = refusal(f"--{key}={text}")
    assert key in message
    assert type(DEFAULTS[key]).__name__ in message
    assert f"(for example --{key}=" in message


@pytest.mark.parametrize("line", [
    "batch_size = (1, 2)", "batch_size = True", "batch_size = '4'", "lr = '1e-3'", "lr = True",
    "compile = 1", "out_dir = None", "channel_mults = 2", "channel_mults = (1, 'x')", "channel_mults = '1,2'",
])
def test_wrong_type_in_a_file(config_file, line):
    path, key = config_file(line), line.split()[0]
    message = refusal(path)
    assert message.startswith(f"{path}: {key} is ")
    assert f"(for example {key} = {DEFAULTS[key]!r})" in message


def test_types_in_a_file(config_file):
    text = "lr = 1\nbatch_size = 1e3\nchannel_mults = [1]\nbetas = (0, 1)\nresume = {'any': 'thing'}"
    settings = read(config_file(text))
    assert repr(settings.lr) == "1.0"
    assert repr(settings.batch_size) == "1000"
    assert repr((settings.channel_mults, settings.betas)) == "((1,), [0.0, 1.0])"
    assert settings.resume == {"any": "thing"}


def test_wrong_type_message_in_full():
    assert refusal("--channel_mults=1,x") == (
        "command line: channel_mults is [1, 'x'], expected tuple of ints (for example --channel_mults=1,2)"
    )


# Mistakes other than types.


def test_unknown_key_in_a_flag():
    assert refusal("--batchsize=2") == "--batchsize: unknown setting 'batchsize' (did you mean 'batch_size'?)"
    assert "did you mean 'out_dir'?" in refusal("--out-dir", "x")
    assert "unknown setting '_private'" in refusal("--_private=2")


def test_unknown_key_in_a_file(config_file):
    path = config_file("lr = 1\nbatchsize = 2\n")
    assert refusal(path) == f"{path}: unknown setting 'batchsize' (did you mean 'batch_size'?)"


def test_missing_value():
    assert refusal("--lr") == "--lr: its value is missing (for example --lr=0.01)"
    assert "--lr: its value is missing" in refusal("--lr", "--batch_size=2")


def test_stray_argument():
    assert "unexpected argument '32'" in refusal("--batch_size=2", "32")
    assert "unexpected argument '-lr=1'" in refusal("-lr=1")


def test_missing_config_file_lists_those_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "__file__", str(tmp_path / "__init__.py"))
    for name in ("__init__.py", "video.py", "mnist.py"):
        (tmp_path / name).touch()
    message = "no config file config/mnits.py; there are: config/mnist.py, config/video.py"
    assert refusal("config/mnits.py") == message


@pytest.mark.parametrize(("text", "line", "reason"), [
    ("lr = 1\nbatch_size = = 2\n", 2, "SyntaxError: invalid syntax"),
    ("lr = 1\n\nbatch_size = undefined\n", 3, "NameError: name 'undefined' is not defined"),
    ("import json\n\n\njson.loads('?')\n", 4, "JSONDecodeError: Expecting value"),
])
def test_broken_config_file(config_file, text, line, reason):
    path = config_file(text)
    assert refusal(path).startswith(f"{path}, line {line}: {reason}")


# The whole, as a user meets it.


def test_help_lists_every_setting_with_default_and_comment(script):
    process = script("--help")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == """\
A script for tests.

usage: python toy.py [config/NAME.py ...] [--key=value ...]

data
  --batch_size=8       clips per step
  --out_dir=out        where; a # and "quotes" are fine
  --channel_mults=1,2  widths

optimizer
  --betas=0.9,0.99     Adam's two
  --compile=False      torch.compile
"""


def test_help_wins_over_mistakes(script):
    assert script("-h --nope=1").returncode == 0


def test_help_of_settings_without_comment_or_heading(tmp_path):
    path = tmp_path / "bare.py"
    path.write_text("lr = 1\nnote = 'two words'\n")
    lines = help_text(str(path), {"lr": 1, "note": "two words"}).splitlines()
    assert lines[-2:] == ["  --lr=1", "  --note='two words'"]


def test_settings_reach_main(script):
    process = script("--batch_size 32 --compile --out_dir=x.gif")
    assert (process.returncode, process.stdout.split()) == (0, ["32", "x.gif", "True"])


@pytest.mark.parametrize(("argument", "code", "message"), [
    ("--batchsize=2", 1, "error: --batchsize: unknown setting 'batchsize' (did you mean 'batch_size'?)\n"),
    ("--out_dir=missing", 1, "error: no such folder\n"),
    ("--out_dir=interrupt", 130, ""),
])
def test_errors_are_one_line_and_an_exit_code(script, argument, code, message):
    process = script(argument)
    assert (process.returncode, process.stderr, process.stdout) == (code, message, "")


def test_defects_keep_their_traceback(script):
    process = script("--out_dir=defect")
    assert process.returncode == 1
    assert process.stderr.startswith("Traceback")


def test_closed_pipe_is_quiet(script):
    process = script("--out_dir=long | head -n 1")
    assert (process.stdout, process.stderr) == ("8 long False\n", "")
    assert script("--help | true").stderr == ""
