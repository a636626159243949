"""Config files, then flags, override a script's settings, in order. The script ends in `run(main, globals())`.

Settings are the globals at the script's top, one a line: `batch_size = 8  # clips per optimizer step`.

    python train.py config/mnist.py --batch_size=32 --out_dir out/x --compile
"""
import contextlib
import difflib
import math
import os
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType, SimpleNamespace

BOOL_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class UserError(ValueError):
    """Something the user can mend; its text is the whole message."""


def require(condition, message, kind=UserError):
    if not condition:
        raise kind(message)


def at_least(cfg, least, *names):
    for name in names:
        require(getattr(cfg, name) >= least, f"{name}={getattr(cfg, name)}: must be at least {least}")


def all_finite(cfg, *but):
    for name, value in vars(cfg).items():
        numbers = [x for x in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(x, float)]
        require(name in but or all(map(math.isfinite, numbers)), f"{name}={value}: must be finite")


def one_of(cfg, **choices):
    for name, words in choices.items():
        require(getattr(cfg, name) in words, f"{name}={getattr(cfg, name)!r}: choose {' or '.join(words)}")


def plain_settings(names):
    """Without modules, functions, _private names and CONSTANTS."""
    return {key: value for key, value in names.items() if not key.startswith("_") and not key.isupper()
            and isinstance(value, (bool, int, float, str, tuple, list))}


def not_default(cfg, script_globals):
    """The settings that are not at their defaults."""
    return {key for key, default in plain_settings(script_globals).items() if getattr(cfg, key, default) != default}


def as_flag(key, value):
    return f"--{key}={','.join(map(str, value)) if isinstance(value, (tuple, list)) else value}"


def convert(value, default):
    """`value`, the text of a flag or anything from a file, in the type of `default`. ValueError if it does not fit."""
    kind = type(default)
    if kind in (tuple, list):
        if isinstance(value, str):  # 1,2,4 or (1,2,4)
            value = [item.strip(" '\"") for item in value.strip("()[], ").split(",") if item]
        like = max(default, key=lambda element: isinstance(element, float), default=None)  # (0, 0.5) holds floats
        return kind(convert(item, like) for item in (value if isinstance(value, (tuple, list)) else [value]))
    if kind is bool and isinstance(value, str):
        value = BOOL_WORDS.get(value.lower())
    for wanted in (int, float, str) if default is None else (kind,):  # None: the default is an empty tuple
        if type(value) in (wanted, str) or (wanted is float and type(value) is int):
            with contextlib.suppress(ValueError):
                return os.path.expanduser(value) if wanted is str else wanted(value)  # few shells do, in --out=~/x
    raise ValueError


def read_file(path):
    """{key: value}: a config file is Python, and the public names that it leaves behind are overrides."""
    if not (path.endswith(".py") and os.path.isfile(path)):
        known = sorted(f"config/{file.name}" for file in Path(__file__).parent.glob("[!_]*.py"))
        raise UserError(f"no config file {path!r}; there are: {', '.join(known)} (settings are given as --key=value)")
    names = {"__name__": "config_file", "__file__": path}
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), names)
    except Exception as error:  # its line is the last that ran in this file; if none did, the one that does not parse
        ran = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}, line {ran[-1] if ran else getattr(error, 'lineno', 1)}"
        raise UserError(f"{where}: {type(error).__name__}: {getattr(error, 'msg', error)}") from error
    return {key: value for key, value in names.items()
            if not (key.startswith("_") or key.isupper() or isinstance(value, ModuleType) or callable(value))}


def find_overrides(argv, defaults):
    """[(where, key, value)], files first. A flag without a value is True if it is a bool, else None."""
    from_files, from_flags, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            from_files += [(argument, key, value) for key, value in read_file(argument).items()]
            continue
        key, equals, value = argument[2:].partition("=")
        if not equals:
            is_bool = isinstance(defaults.get(key), bool)
            has_value = rest and (rest[0].lower() in BOOL_WORDS if is_bool else not rest[0].startswith("--"))
            value = rest.pop(0) if has_value else True if is_bool else None
        from_flags.append(("command line", key, value))
    return from_files + from_flags


def read_settings(defaults, argv):
    """All settings as a SimpleNamespace: the defaults, then config files, then flags."""
    defaults = plain_settings(defaults)
    settings = dict(defaults)
    for where, key, value in find_overrides(argv, defaults):
        if key not in defaults:
            closest = "".join(difflib.get_close_matches(key, defaults, n=1, cutoff=0))
            own = "" if where == "command line" else " (names of your own begin with _, or are CAPITALS)"
            raise UserError(f"{where}: unknown setting {key!r}; did you mean {closest!r}?{own}")
        try:
            settings[key] = convert(value, defaults[key])
        except ValueError:
            default, what = defaults[key], f"is {value!r}" if value is not None else "has no value"
            example = as_flag(key, default) if where == "command line" else f"{key} = {default!r}"
            of = f" of {type(default[0]).__name__}" if default and isinstance(default, (tuple, list)) else ""
            raise UserError(f"{where}: {key} {what}, expected {type(default).__name__}{of}, as in {example}") from None
    return SimpleNamespace(**settings)


def help_text(path, defaults):
    """Every setting with its default and trailing comment, under the script's headings (`# -- data`)."""
    settings = plain_settings(defaults)
    width = max((len(as_flag(key, value)) for key, value in settings.items()), default=0)
    lines = [(defaults.get("__doc__") or "").partition("\n")[0],
             f"\nusage: python {Path(path).name} [config/NAME.py ...] [--key=value ...]", ""]
    for line in Path(path).read_text("utf-8").splitlines():
        setting = re.match(r"(\w+) = (?:.*?  # (.*))?", line)
        if line.startswith("# -- "):
            lines += ["", line[5:]] if lines[-1] else [line[5:]]
        elif setting and setting[1] in settings:
            lines.append(f"  {as_flag(setting[1], settings[setting[1]]):{width}}  {setting[2] or ''}".rstrip())
    return "\n".join(lines).strip()


def run(main, script_globals):
    """Call main(settings). What the user can mend becomes one line on stderr and exit code 1."""
    with contextlib.suppress(AttributeError):  # in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be of any encoding
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(help_text(script_globals["__file__"], script_globals))
        else:
            main(read_settings(script_globals, sys.argv[1:]))
        sys.stdout.flush()  # a closed pipe is noticed here, not at exit
    except (UserError, PermissionError) as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # python train.py --help | head -3
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
