"""Config files and flags: what overrides what, which types are taken, and how mistakes are reported."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import config
from config import UserError, read_settings

DEFAULTS = {
    "batch_size": 8, "lr": 1e-2, "out_dir": "out", "compile": False, "shift": 0,
    "channel_mults": (1, 2), "betas": [0.9, 0.99], "mixed": (0, 0.5), "empty": (),
    "_private": 1, "COLOUR": (255, 0, 0), "os": os, "Path": Path,
}

SCRIPT = '''"""A script for tests.

Not part of the help.
"""
import os

from config import UserError, run

# -- data
batch_size = 8          # clips per step
out_dir = "out"         # where; a # and "quotes" are fine
channel_mults = (1, 2)  # widths
# -- optimizer
resolutions = ()
compile = False         # torch.compile
_private = 3            # not a setting
COLOUR = (255, 0, 0)    # nor is this

# ---------------------------------
def main(settings):
    if settings.out_dir == "missing":
        raise UserError("no such folder")
    if settings.out_dir == "interrupt":
        raise KeyboardInterrupt
    if settings.out_dir == "locked":
        raise PermissionError(13, "Permission denied", "locked")
    if settings.out_dir == "defect":
        raise RuntimeError("a defect")
    print(settings.batch_size, settings.out_dir, settings.compile)
    print("line\\n" * 10_000 * (settings.out_dir == "long"))

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
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    return write


@pytest.fixture
def script(tmp_path):
    """Runs `python toy.py ARGUMENTS` in a shell, toy.py being SCRIPT; returns the finished process."""
    (tmp_path / "toy.py").write_text(SCRIPT)
    options = {"shell": True, "capture_output": True, "text": True, "cwd": tmp_path}
    options["env"] = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return lambda arguments: subprocess.run(f"{shlex.quote(sys.executable)} toy.py {arguments}", **options)


# What is a setting, and what overrides it.


def test_defaults_are_the_public_plain_values():
    assert list(vars(read())) == "batch_size lr out_dir compile shift channel_mults betas mixed empty".split()
    assert read().betas == [0.9, 0.99]


def test_files_come_first_then_flags_each_in_order(config_file):
    first, second = config_file("shift = 1\nlr = 0.1", "1.py"), config_file("shift = 2", "2.py")
    assert (read(first, second).shift, read(second, first).shift) == (2, 1)
    settings = read("--shift=3", first, "--shift", "4", second)
    assert (settings.shift, settings.lr, settings.out_dir) == (4, 0.1, "out")


def test_config_file_is_python(config_file):
    text = "import os\nfrom math import sin\n_steps = 4\ndef twice(x): return 2 * x\nshift = twice(_steps)\n"
    assert read(config_file(text)).shift == 8


# Types, in both forms of a flag and in files.


@pytest.mark.parametrize(("key", "text", "expected"), [
    ("batch_size", "32", 32),
    ("batch_size", "-1", -1),
    ("lr", "1e-3", 1e-3),
    ("lr", "1", 1.0),
    ("compile", "True", True),
    ("compile", "0", False),
    ("out_dir", "a=b.gif", "a=b.gif"),
    ("out_dir", "1", "1"),
    ("out_dir", "-x", "-x"),
    ("out_dir", "~/x", os.path.expanduser("~/x")),
    ("out_dir", "x~", "x~"),
    ("channel_mults", "1,2,4", (1, 2, 4)),
    ("channel_mults", "(1, 2, 4)", (1, 2, 4)),
    ("channel_mults", "2", (2,)),
    ("channel_mults", "(2,)", (2,)),
    ("channel_mults", "()", ()),
    ("betas", "0,1e-1", [0.0, 0.1]),
    ("mixed", "0.25,1", (0.25, 1.0)),
    ("empty", "1,0.5,x", (1, 0.5, "x")),
])
def test_value(key, text, expected):
    for argv in ([f"--{key}={text}"], [f"--{key}", text]):
        settings = read(*argv, "--shift=9")
        assert repr(getattr(settings, key)) == repr(expected)  # repr tells 1 from 1.0 and True
        assert settings.shift == 9


def test_bare_bool_flag_is_true(config_file):
    assert read("--compile").compile is True
    settings = read("--compile", config_file("lr = 3"))  # the file is not taken for the flag's value
    assert (settings.compile, settings.lr) == (True, 3.0)


def test_types_in_a_file(config_file):
    settings = read(config_file("lr = 1\nchannel_mults = [1]\nbetas = (0, 1)\nempty = (8, 0.5)\ncompile = True"))
    assert repr((settings.lr, settings.channel_mults, settings.betas)) == "(1.0, (1,), [0.0, 1.0])"
    assert repr((settings.empty, settings.compile)) == "((8, 0.5), True)"


@pytest.mark.parametrize(("key", "text", "expected"), [
    ("batch_size", "1.5", "int, as in --batch_size=8"), ("batch_size", "True", "int, as in --batch_size=8"),
    ("lr", "fast", "float, as in --lr=0.01"), ("compile", "2", "bool, as in --compile=False"),
    ("channel_mults", "1,0.5", "tuple of int, as in --channel_mults=1,2"),
    ("betas", "x", "list of float, as in --betas=0.9,0.99"),
])
def test_wrong_type_in_a_flag(key, text, expected):
    assert refusal(f"--{key}={text}") == f"command line: {key} is {text!r}, expected {expected}"


@pytest.mark.parametrize("line", [
    "batch_size = (1, 2)", "batch_size = True", "batch_size = 1.5", "lr = True", "compile = 1",
    "out_dir = 3", "channel_mults = (1, 'x')", "channel_mults = {}", "empty = (True,)",
])
def test_wrong_type_in_a_file(config_file, line):
    path, (key, value) = config_file(line), line.split(" = ")
    kind = {"channel_mults": "tuple of int"}.get(key, type(DEFAULTS[key]).__name__)
    expected = f"{kind}, as in {key} = {DEFAULTS[key]!r}"
    assert refusal(path) == f"{path}: {key} is {value}, expected {expected}"


# Mistakes other than types.


def test_names_of_ones_own_in_a_file_are_no_settings(config_file):
    assert read(config_file("BASE = 3\n_twice = 2 * BASE\nbatch_size = _twice\n")).batch_size == 6


def test_unknown_key(config_file):
    assert refusal("--batchsize=2") == "command line: unknown setting 'batchsize'; did you mean 'batch_size'?"
    assert "did you mean 'out_dir'?" in refusal("--out-dir", "x")
    assert "unknown setting '_private'" in refusal("--_private=2")
    path = config_file("lr = 1\nbatchsize = 2\n")
    assert refusal(path) == (f"{path}: unknown setting 'batchsize'; did you mean 'batch_size'? (names of your own "
                             "begin with _, or are CAPITALS)")


def test_missing_value():
    assert refusal("--lr") == "command line: lr has no value, expected float, as in --lr=0.01"
    assert read("--out_dir=").out_dir == ""
    for key in ("out_dir", "channel_mults", "empty"):
        assert f"{key} has no value" in refusal(f"--{key}", "--batch_size=2")


def test_missing_config_file_lists_those_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "__file__", str(tmp_path / "__init__.py"))
    for name in ("__init__.py", "video.py", "mnist.py"):
        (tmp_path / name).touch()
    for argument in ("config/mnits.py", "32", "-lr=1"):
        start = f"no config file {argument!r}; there are: config/mnist.py, config/video.py (settings are"
        assert refusal("--batch_size=2", argument).startswith(start)


@pytest.mark.parametrize(("text", "line", "reason"), [
    ("lr = 1\nbatch_size = = 2\n", 2, "SyntaxError: invalid syntax"),
    ("lr = 1\n\nbatch_size = undefined\n", 3, "NameError: name 'undefined' is not defined"),
    ("import json\n\n\njson.loads('?')\n", 4, "JSONDecodeError: Expecting value"),
])
def test_broken_config_file(config_file, text, line, reason):
    path = config_file(text)
    assert refusal(path) == f"{path}, line {line}: {reason}"


# The whole, as a user meets it.


def test_help_lists_every_setting_with_default_and_comment(script):
    process = script("--nope=1 --help")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == """\
A script for tests.

usage: python toy.py [config/NAME.py ...] [--key=value ...]

data
  --batch_size=8       clips per step
  --out_dir=out        where; a # and "quotes" are fine
  --channel_mults=1,2  widths

optimizer
  --resolutions=
  --compile=False      torch.compile
"""


@pytest.mark.parametrize(("arguments", "code", "stdout", "stderr"), [
    ("--batch_size 32 --compile --out_dir=x.gif", 0, "32 x.gif True\n\n", ""),
    ("--batchsize=2", 1, "", "error: command line: unknown setting 'batchsize'; did you mean 'batch_size'?\n"),
    ("--out_dir=missing", 1, "", "error: no such folder\n"),
    ("--out_dir=interrupt", 130, "", ""),
    ("--out_dir=locked", 1, "", "error: [Errno 13] Permission denied: 'locked'\n"),
])
def test_a_script_run(script, arguments, code, stdout, stderr):
    process = script(arguments)
    assert (process.returncode, process.stdout, process.stderr) == (code, stdout, stderr)


def test_defects_keep_their_traceback(script):
    assert script("--out_dir=defect").stderr.startswith("Traceback")


def test_closed_pipe_is_quiet(script):
    process = script("--out_dir=long | head -n 1")
    assert (process.stdout, process.stderr) == ("8 long False\n", "")
    assert script("--help | true").stderr == ""
