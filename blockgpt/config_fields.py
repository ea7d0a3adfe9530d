"""Configuration keys: how a dataclass declares them, their flags and texts, which values are legal. No torch.

A key is one line of a dataclass: `name: type = key(default, help, group=...)`. Parsing, validation and `--help` read
that line. The functions take the dataclass field of a key and the types that it accepts (`key_types`). They raise
`ConfigError`; the caller adds where the value was set (`ConfigError.at`).
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import operator
import os
import re
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from blockgpt.console import ArgumentParser, terminal_width
from blockgpt.errors import ConfigError, UserError, did_you_mean, short_repr
from blockgpt.files import is_dir, is_file, list_dir

Field = dataclasses.Field[Any]
Types = tuple[type, ...]

BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
MAX_INT = 2**63 - 1  # numpy and torch have no larger integer
BOUNDS: tuple[tuple[str, Callable[[Any, Any], bool], str], ...] = (
    ("minimum", operator.lt, "at least"), ("above", operator.le, "above"),
    ("maximum", operator.gt, "at most"), ("below", operator.ge, "below"))


def key(default: Any, help: str, *, group: str, minimum: float | None = None, above: float | None = None,
        maximum: float | None = None, below: float | None = None, choices: Collection[str] | None = None,
        label: str | None = None, example: Any = None) -> Any:
    """A dataclass field that is a configuration key.

    Args:
        default: its value if it is not set; None means derived or off, as the help says.
        help: its line in `--help`.
        group: its heading in `--help`.
        minimum, maximum: inclusive bounds.
        above, below: exclusive bounds.
        choices: the legal values. Those of a table include the entries that it gets later.
        label: what an unusual value adds to the architecture's name, as "FF{}".
        example: a legal value other than the default, for tests and tables. Booleans and choices need none.
    """
    metadata = dict(help=help, group=group, minimum=minimum, above=above, maximum=maximum, below=below,
                    choices=choices, label=label, example=example)
    return field(default=default, metadata=metadata)


@functools.cache
def key_types(cls: type) -> dict[str, Types]:
    """{key: the types that its value may have} of a dataclass of keys."""
    hints = typing.get_type_hints(cls)
    union = (types.UnionType, typing.Union)
    alternatives = {f.name: typing.get_args(hints[f.name]) if typing.get_origin(hints[f.name]) in union
                    else (hints[f.name],) for f in dataclasses.fields(cls) if f.metadata}
    return {name: tuple(typing.get_origin(t) or t for t in hint) for name, hint in alternatives.items()}


def example_value(f: Field, accepted: Types) -> Any:
    """A legal value of the key: its example, another choice than the default if there is one, the other boolean."""
    if f.metadata["example"] is not None:
        return f.metadata["example"]
    if f.metadata["choices"]:
        return next((choice for choice in f.metadata["choices"] if choice != f.default), f.default)
    assert bool in accepted, f"{f.name} needs an example="
    return not f.default


@contextlib.contextmanager
def located(location: str | os.PathLike[str]) -> Iterator[None]:
    """Add the location, where a key was set, to a `ConfigError` inside the block."""
    try:
        yield
    except ConfigError as error:
        raise error.at(location) from None


def with_location(error: ConfigError, explicit: Mapping[str, str],
                  default_location: str | os.PathLike[str] = "defaults") -> UserError:
    """The error with the place where its key was set; `default_location` is that of keys not in `explicit`."""
    # A default can be wrong only in combination with another key that was set: name that one's place.
    at_fault = [error.key, *(k for k in explicit if re.search(rf"\b{k}=", error.message))]
    return error.at(next((explicit[k] for k in at_fault if k in explicit), default_location))


# Flags and files


class KeyParser(ArgumentParser):
    """The parser of a command line of config files and of one --key=value flag per key."""

    def __init__(self, fields: Mapping[str, Field], accepted: Mapping[str, Types], defaults: Mapping[str, Any],
                 **kwargs: Any) -> None:
        """Declare the flags.

        Args:
            fields: {key: its field}, the keys of a group next to each other.
            accepted: {key: the types that it accepts}.
            defaults: {key: the default in the help}, where it is not that of the field.
            kwargs: of `argparse.ArgumentParser`.
        """
        super().__init__(add_help=False, formatter_class=KeyHelpFormatter, **kwargs)
        self.accepted = accepted
        self.add_argument("-h", "--help", action=HelpAction, nargs="?", default=argparse.SUPPRESS, metavar="GROUP",
                          help=argparse.SUPPRESS)
        group = None
        for name, f in fields.items():
            if group is None or group.title != f.metadata["group"]:
                group = self.add_argument_group(f.metadata["group"])
            choices = f" [{' | '.join(f.metadata['choices'])}]" if f.metadata["choices"] else ""
            # nargs and const: some versions of argparse drop the value `--`.
            action = group.add_argument(f"--{name}", action="append", nargs="?", const="--", default=argparse.SUPPRESS,
                                        metavar=str(defaults.get(name, f.default)),
                                        help=f"{f.metadata['help']}{choices}".replace("%", "%%"))
            values = f.metadata["choices"] or (("True", "False") if bool in accepted[name] else ())
            action.completer = lambda values=tuple(values), **_: values  # type: ignore[attr-defined]  # argcomplete

    def groups(self) -> dict[str, Any]:
        """{name: argparse's group} of the groups of keys; a name has underscores for spaces."""
        return {str(group.title).replace(" ", "_"): group for group in self._action_groups
                if group.title and group._group_actions and group._group_actions[0].help != argparse.SUPPRESS}

    def format_help(self) -> str:
        """Every key by group, and how to print one group."""
        self.epilog = f"--help GROUP prints one group: {', '.join(self.groups())}"
        return super().format_help()

    def format_group(self, name: str) -> str:
        """The keys of one group; `UserError` if there is none of that name."""
        group = self.groups().get(name.lower().replace(" ", "_").replace("-", "_"))
        if group is None:
            raise UserError(f"--help: {short_repr(name)} is no group{did_you_mean(name, self.groups())}")
        formatter = self._get_formatter()
        formatter.start_section(group.title)
        formatter.add_arguments(group._group_actions)
        formatter.end_section()
        return formatter.format_help()

    def parse_flags(self, argv: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
        """argv -> ({key: [the text of each of its flags]}, [every other word])."""
        if "_ARGCOMPLETE" in os.environ:
            if not os.environ.get("COMP_LINE", "").split(" ")[-1].startswith("-"):
                self.add_argument("files", nargs="*", help=argparse.SUPPRESS)  # what is no flag may be a file
            self.complete()
        flags, others = self.parse_known_args(self.join_values(argv))
        return vars(flags), others

    def join_values(self, argv: Iterable[str]) -> list[str]:
        """argv with every `--key value` as --key=value, every bare boolean as --key=True and --no_key as --key=False.

        argparse would take the config file behind a bare boolean for its value, and refuse a value with a leading dash.
        Names may have dashes in place of underscores.

        Raises:
            UserError: a key that is no boolean has no value, or is negated.
        """
        words, rest = [], list(argv)
        while rest:
            word = rest.pop(0)
            flag, equals, _ = word.partition("=")
            name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
            negated = name[3:] if name.startswith("no_") and name not in self.accepted else ""
            if negated in self.accepted:
                if bool not in self.accepted[negated]:
                    raise ConfigError(flag[2:], f"{negated} is not a boolean (--{negated}=…)").at(flag)
                if equals:
                    raise ConfigError(flag[2:], f"takes no value ({flag}, or --{negated}=…)").at(flag)
                words.append(f"--{negated}=False")
                continue
            if name in self.accepted:
                word = f"--{name}{word[len(flag):]}"
            accepted = self.accepted.get(name) if not equals else None
            if accepted:
                is_value = rest and not rest[0].startswith("--") and (str in accepted or not rest[0].endswith(".py"))
                if not is_value and bool not in accepted:
                    raise ConfigError(name, f"needs a value (--{name}=…)").at(f"--{name}")
                word = f"{word}={rest.pop(0) if is_value else True}"
            words.append(word)
        return words


class HelpAction(argparse.Action):
    """`--help` prints every key, `--help GROUP` one group of them."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        assert isinstance(parser, KeyParser)
        print(parser.format_group(values) if values and not values.endswith(".py") else parser.format_help(), end="",
              flush=True)
        parser.exit()


class KeyHelpFormatter(argparse.HelpFormatter):
    """Help in the form `--key=default   what it means`."""

    def __init__(self, prog: str) -> None:
        width = min(terminal_width() - 1, 112)
        super().__init__(prog, max_help_position=min(41, width * 3 // 8), width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return f"{action.option_strings[0]}={action.metavar}"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def read_config_file(path: str, root: Path) -> dict[str, Any]:
    """Run a flat Python file.

    Args:
        path: relative to the current folder, or else to `root`.
        root: the project's folder. The file may import from it.

    Returns:
        {name: value} of its variables, without modules and names with a leading underscore.
    """
    found = next((p for p in (path, str(root / path)) if is_file(p)), None)
    if found is None:
        existing = sorted(f"config/{p.name}" for p in list_dir(root / "config", "[!_]*.py"))
        raise UserError(f"{path}: {'not a file' if is_dir(path) else 'no such config file'}"
                        f"{did_you_mean(path, existing)}")
    namespace: dict[str, Any] = {"__name__": Path(found).stem, "__file__": found}
    search_path = sys.path[:]
    try:
        code = compile(Path(found).read_bytes(), found, "exec")
        sys.path.insert(0, str(root))  # for `from config.arch_llama import *`
        exec(code, namespace)
    except (Exception, SystemExit) as error:  # any error is the file's
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f"line {frame.lineno}: " for frame in reversed(frames) if frame.filename == found), "")
        raise UserError(f"{path}: {line}{type(error).__name__}: {error}") from None
    finally:
        sys.path[:] = search_path
    return {k: v for k, v in namespace.items() if not k.startswith("_") and not isinstance(v, types.ModuleType)}


# Text to values


def parse_value(f: Field, accepted: Types, text: str) -> Any:
    """The value that the text of a flag means. The type of the key decides, not the look of the text.

    Raises:
        ConfigError: the text is no such value.
    """
    if text in ("None", "none") and type(None) in accepted:
        return None
    if is_nested(accepted, text):
        return text  # `coerce` parses it, also where a config file quotes it
    if bool in accepted:
        if text.lower() in BOOLEANS:
            return BOOLEANS[text.lower()]
        raise ConfigError(f.name, f"{short_repr(text)} is not a boolean (True or False)")
    if int in accepted or float in accepted:
        try:
            return float(text) if float in accepted else parse_int(text)
        except ValueError:
            if str not in accepted:
                expected = "a number" if float in accepted else "a whole number"
                raise ConfigError(f.name, f"{short_repr(text)} is not {expected}") from None
    return text


def parse_int(text: str) -> int:
    """int of '12', '1_000' or '1e4'.

    Raises:
        ValueError: the text is no number, has a fraction, or is not finite.
    """
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():  # neither is nan or inf
            raise ValueError(text) from None
        return int(value)


def is_nested(accepted: Types, text: str) -> bool:
    """Whether the text means a dict or a list, for a key that takes one."""
    return (text[:1] == "{" and dict in accepted) or (text[:1] in ("[", "(") and list in accepted)


def coerce(f: Field, accepted: Types, value: Any) -> Any:
    """The value converted to the type of its key and checked: a file may say max_iters = 1e4 or learning_rate = 1.

    Raises:
        ConfigError: the value has the wrong type, range or choice.
    """
    if int in accepted and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is str and is_nested(accepted, value):
        try:
            value = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise ConfigError(f.name, f"{short_repr(value)} is not a Python dict or list (in a shell, quote it: "
                                      f"--{f.name}=\"{{'a': 0.7, 'b': 0.3}}\")") from None
    if type(value) in (dict, list, tuple):
        try:
            value = tuples_to_lists(value)
        except RecursionError:
            raise ConfigError(f.name, "is nested too deeply") from None
    check_value(f, accepted, value)
    return float(value) if float in accepted and type(value) is int else value


def tuples_to_lists(value: Any) -> Any:
    """A nested value as run.json returns it: with lists for tuples."""
    if type(value) is dict:
        return {k: tuples_to_lists(v) for k, v in value.items()}
    return [tuples_to_lists(v) for v in value] if type(value) in (list, tuple) else value


# Validation


def check_fields(config: Any) -> None:
    """Check every key of a dataclass of keys.

    Raises:
        ConfigError: the first key whose value has the wrong type, range or choice.
    """
    accepted = key_types(config.__class__)
    for f in dataclasses.fields(config):
        if f.metadata:
            check_value(f, accepted[f.name], getattr(config, f.name))


def check_value(f: Field, accepted: Types, value: Any) -> None:
    """Check one value.

    Raises:
        ConfigError: the value has the wrong type, range or choice.
    """
    if value is None and type(None) in accepted:
        return
    if type(value) not in accepted and not (type(value) is int and float in accepted):
        names = " or ".join("None" if t is type(None) else t.__name__ for t in accepted)
        raise ConfigError(f.name, f"{short_repr(value)} is {type(value).__name__}, not {names}")
    limits = f.metadata
    if limits["choices"] and value not in limits["choices"]:
        raise ConfigError(f.name, f"{short_repr(value)} is unknown{did_you_mean(value, limits['choices'])}")
    if isinstance(value, str):
        if not value:
            raise ConfigError(f.name, "is empty")
        if not value.isprintable():
            raise ConfigError(f.name, f"{short_repr(value)} has characters that cannot be printed")
        return
    if value != value or value in (float("inf"), float("-inf")):
        raise ConfigError(f.name, f"{value} is not a finite number")
    for bound, is_outside, words in BOUNDS:
        limit = MAX_INT if limits[bound] is None and bound == "maximum" and type(value) is int else limits[bound]
        if limit is not None and is_outside(value, limit):
            raise ConfigError(f.name, f"{short_repr(value)} is out of range, must be {words} {limit}")


def check_folder_name(key: str, value: str) -> None:
    """Check that a value can name a folder in another folder.

    Raises:
        ConfigError: it cannot, for this key.
    """
    if set(value) & set("/\\") or value.startswith(".") or value != value.strip() or len(value.encode()) > 255:
        raise ConfigError(key, f"{short_repr(value)} is not the name of a folder (no slash, no leading dot, no space "
                               "around it, at most 255 bytes)")
