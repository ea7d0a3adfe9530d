"""Configuration keys: their declaration, validation, and parsing from text. No torch."""

import dataclasses
import operator
import typing
from dataclasses import field

from blockgpt.errors import ConfigError, did_you_mean, short_repr


def key(default, help, *, group, minimum=None, above=None, maximum=None, below=None, choices=None, label=None,
        example=None):
    """A dataclass field that is a configuration key: its default, its line of help, its legal range.

    minimum / maximum are inclusive bounds, above / below exclusive; choices lists the legal values. label: what an
    unusual value adds to the architecture's name, as "FF{}". example: a legal value other than the default, for tests
    and tables.
    """
    metadata = dict(help=help, group=group, minimum=minimum, above=above, maximum=maximum, below=below,
                    choices=tuple(choices) if choices else None, label=label, example=example)
    return field(default=default, metadata=metadata)


def key_types(cls):
    """{key: the types that its value may have} of a dataclass of keys."""
    hints = typing.get_type_hints(cls)
    return {f.name: typing.get_args(hints[f.name]) or (hints[f.name],) for f in dataclasses.fields(cls) if f.metadata}


def check_fields(config):
    """Raise `ConfigError` for the first key of `config` whose value has the wrong type, range or choice."""
    accepted = key_types(type(config))
    for f in dataclasses.fields(config):
        if f.metadata:
            check_value(f, accepted[f.name], getattr(config, f.name))


def check_value(f, accepted, value):
    """Raise `ConfigError` if the key with dataclass field `f` and the types `accepted` cannot have `value`."""
    if value is None and type(None) in accepted:
        return
    if type(value) not in accepted and not (type(value) is int and float in accepted):
        names = " or ".join("None" if t is type(None) else t.__name__ for t in accepted)
        raise ConfigError(f.name, f"{short_repr(value)} is {type(value).__name__}, not {names}")
    limits = f.metadata
    if limits["choices"] and value not in limits["choices"]:
        raise ConfigError(f.name, f"{short_repr(value)} is unknown{did_you_mean(value, limits['choices'])}")
    if isinstance(value, str):
        if not value or not value.isprintable():
            raise ConfigError(f.name, f"{short_repr(value)} has characters that cannot be printed" if value else "is empty")
        return
    if value != value or value in (float("inf"), float("-inf")):
        raise ConfigError(f.name, f"{value} is not a finite number")
    for bound, outside, words in BOUNDS:
        limit = LARGEST if limits[bound] is None and bound == "maximum" and type(value) is int else limits[bound]
        if limit is not None and outside(value, limit):
            raise ConfigError(f.name, f"{short_repr(value)} is out of range, must be {words} {limit}")
LARGEST = 2**63 - 1  # numpy and torch know no larger integer
BOUNDS = (("minimum", operator.lt, "at least"), ("above", operator.le, "above"),
          ("maximum", operator.gt, "at most"), ("below", operator.ge, "below"))
