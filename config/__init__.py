"""How config files and flags override a script's settings.

A script's settings are the globals at its top, each with a trailing comment:

    batch_size = 8          # clips per optimizer step, over all processes

    python train.py config/mnist.py --batch_size=32 --out_dir out/x --compile

Config files are applied first, then flags, each in the order given. The script ends with

    if __name__ == "__main__":
        run(main, globals())            # calls main(settings), settings being a SimpleNamespace
"""

import ast
import difflib
import os
import re
import shlex
import sys
import tokenize
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace

BOOL_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class UserError(ValueError):
    """Something the user can mend; its text is the whole message."""


# ---------------------------------------------------------------------------------------------
# Values. A flag's text is parsed first; what a config file holds is a value already. Then both
# pass the same check against the type of the setting's default.


def is_setting(name, value):
    """Settings are public and plain; imported modules, functions and classes are not settings."""
    if isinstance(value, (tuple, list)):
        return all(is_setting(name, element) for element in value)
    return not name.startswith("_") and isinstance(value, (bool, int, float, str, type(None)))


def element_of(default):
    """The element that stands for the type of a tuple's elements; those of (0, 0.5) are floats."""
    floats = [element for element in default if isinstance(element, float)]
    return (floats or list(default) or [None])[0]


def parse(text, default):
    """A flag's text, read as the type of the default; text that cannot be is left for `checked`."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        return BOOL_WORDS.get(text.lower(), text)
    if isinstance(default, (tuple, list)):  # 1,2,4 or (1,2,4) or [1,2,4]
        inner = text.strip("()[] ").removesuffix(",")
        items = inner.split(",") if inner else []
        return [parse(item.strip(" '\""), element_of(default)) for item in items]
    for read in (ast.literal_eval,) if default is None else (int, float):
        with suppress(ValueError, SyntaxError, TypeError):
            return read(text)
    return text


def checked(value, default):
    """`value` in the type of `default`, or TypeError. A bool is never taken for a number."""
    kind = type(default)
    if kind in (tuple, list) and isinstance(value, (tuple, list)):
        return kind(checked(element, element_of(default)) for element in value)
    if default is None or type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():  # 1e6
        return int(value)
    raise TypeError


def type_name(default):
    name = type(default).__name__
    if isinstance(default, (tuple, list)) and default:
        return f"{name} of {type_name(element_of(default))}s"
    return name


def as_flag(key, value):
    """`--key=value` in the form one would type it."""
    if isinstance(value, (tuple, list)):
        value = ",".join(map(str, value)) or "()"
    return f"--{key}={shlex.quote(str(value))}"


# ---------------------------------------------------------------------------------------------
# Where overrides come from: config files and flags.


def require_known(key, defaults, where):
    if key not in defaults:
        closest = difflib.get_close_matches(key, defaults, n=1, cutoff=0)
        hint = f" (did you mean {closest[0]!r}?)" if closest else ""
        raise UserError(f"{where}: unknown setting {key!r}{hint}")


def require_config_file(path):
    if not path.endswith(".py"):
        raise UserError(f"unexpected argument {path!r}: config files end in .py, settings are --key=value")
    if not os.path.isfile(path):
        known = sorted(f"config/{file.name}" for file in Path(__file__).parent.glob("[!_]*.py"))
        raise UserError(f"no config file {path}; there are: {', '.join(known) or 'none'}")


def error_line(error, path):
    """The line of `path` that does not parse, or the one that was running when `error` was raised."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return lines[-1] if lines else 1


def is_override(name, value):
    """What a config file imports or defines to compute its values is not an override."""
    return not (name.startswith("_") or isinstance(value, ModuleType) or callable(value))


def read_file(path):
    """A config file is Python; every public plain name it leaves behind is an override."""
    require_config_file(path)
    source, names = Path(path).read_bytes(), {"__name__": "config_file", "__file__": path}
    try:
        exec(compile(source, path, "exec"), names)
    except Exception as error:
        message = error.msg if isinstance(error, SyntaxError) else error
        where = f"{path}, line {error_line(error, path)}"
        raise UserError(f"{where}: {type(error).__name__}: {message}") from error
    return {key: value for key, value in names.items() if is_override(key, value)}


def take_value(key, default, rest):
    """The value of `--key` in the form `--key value`, removed from `rest`. A bare bool is True."""
    if isinstance(default, bool) and (not rest or rest[0].lower() not in BOOL_WORDS):
        return "true"
    if not rest or rest[0].startswith("--"):
        raise UserError(f"--{key}: its value is missing (for example {as_flag(key, default)})")
    return rest.pop(0)


def split_arguments(argv, defaults):
    """`argv` as a list of config files and a list of (key, text) flags."""
    files, flags, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        if argument.startswith("--"):
            key, equals, text = argument[2:].partition("=")
            require_known(key, defaults, f"--{key}")
            flags.append((key, text if equals else take_value(key, defaults[key], rest)))
        else:
            files.append(argument)
    return files, flags


def read_settings(defaults, argv):
    """All settings as a SimpleNamespace: the defaults, then config files, then flags."""
    defaults = {key: value for key, value in defaults.items() if is_setting(key, value)}
    files, flags = split_arguments(argv, defaults)
    overrides = [(path, key, value) for path in files for key, value in read_file(path).items()]
    overrides += [("command line", key, parse(text, defaults[key])) for key, text in flags]
    settings = dict(defaults)
    for where, key, value in overrides:
        require_known(key, defaults, where)
        try:
            settings[key] = checked(value, defaults[key])
        except TypeError:
            example = f"{key} = {defaults[key]!r}" if where in files else as_flag(key, defaults[key])
            kind = type_name(defaults[key])
            raise UserError(f"{where}: {key} is {value!r}, expected {kind} (for example {example})") from None
    return SimpleNamespace(**settings)


# ---------------------------------------------------------------------------------------------
# --help, read from the script itself, so that each setting is described in one place only.


def described_settings(path):
    """(key, heading above it or "", trailing comment) of each top-level assignment, in order."""
    with tokenize.open(path) as file:
        source = file.read()
    tokens = tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    previous = 0
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            between = [comments.get(line, "") for line in range(previous + 1, node.lineno)]
            headings = [text.strip("#- ") for text in between if re.match(r"# ?--.*\w", text)]  # "# -- data"
            yield node.targets[0].id, "".join(headings[-1:]), comments.get(node.end_lineno, "").strip("# ")
        previous = node.end_lineno


def help_text(path, defaults):
    """What the script does, its usage, and every setting with its default and comment."""
    flags = {key: as_flag(key, value) for key, value in defaults.items() if is_setting(key, value)}
    rows = [row for row in described_settings(path) if row[0] in flags]
    width = max((len(flags[key]) for key, _, _ in rows), default=0)
    purpose = (ast.get_docstring(ast.parse(Path(path).read_bytes())) or "").partition("\n")[0]
    lines = [purpose, f"\nusage: python {Path(path).name} [config/NAME.py ...] [--key=value ...]\n"]
    for number, (key, heading, comment) in enumerate(rows):
        lines += ["\n" * (number > 0) + heading] if heading else []
        lines += [f"  {flags[key]:{width}}  {comment}".rstrip()]
    return "\n".join(lines).strip()


# ---------------------------------------------------------------------------------------------
# The entry point of every script.


def run(main, script_globals):
    """Call main(settings). What the user can mend becomes one line on stderr and exit code 1."""
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(help_text(script_globals["__file__"], script_globals))
        else:
            main(read_settings(script_globals, sys.argv[1:]))
        sys.stdout.flush()  # a closed pipe is noticed here, not at exit
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # python train.py --help | head -3
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
