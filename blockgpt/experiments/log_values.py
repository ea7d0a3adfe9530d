"""Values of run.json and metrics.jsonl, read without trust: a damaged log is an error that says why, never a crash."""

import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class BrokenLogError(Exception):
    """A log, or a line of metrics.jsonl, cannot be used. Broken lines are only counted, so messages name run.json."""


def finite_or_none(digits: str) -> float | None:
    return value if math.isfinite(value := float(digits)) else None


AS_ZEROS = bytes.maketrans(b"123456789E", b"000000000e")
PLAIN_TYPES = frozenset((bool, int, float, type(None)))
FAST_DECODER = json.JSONDecoder(parse_constant=lambda _: None)
CAREFUL_DECODER = json.JSONDecoder(parse_float=finite_or_none, parse_constant=lambda _: None)


def parse_json(data: bytes) -> Any:
    """The JSON value in `data`, with None for every number that is not finite (NaN, Infinity, 1e999)."""
    # Only an exponent of three digits or 300 digits can overflow; to check every float takes as long as all the rest.
    zeros = data.translate(AS_ZEROS, b"+")
    decoder = CAREFUL_DECODER if b"0e000" in zeros or b"0" * 300 in zeros else FAST_DECODER
    try:
        return decoder.decode(data.decode(json.detect_encoding(data), "surrogatepass"))
    except (ValueError, RecursionError) as error:  # invalid UTF-8 is a ValueError too
        raise BrokenLogError(f"run.json is not JSON: {error}") from None


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, as `parse_json` reads it."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise BrokenLogError("run.json is not an object")
    return value


def parse_lines(lines: Sequence[bytes]) -> list[dict[str, Any] | None]:
    """The JSON object in each line, None for a line that has none."""
    def parse_line(line: bytes) -> dict[str, Any] | None:
        try:
            return parse_object(line)
        except BrokenLogError:
            return None

    try:
        values = parse_json(b"[%s]" % b",".join(lines))  # at once: half the time
    except BrokenLogError:
        return list(map(parse_line, lines))
    whole = len(values) == len(lines) and all(isinstance(value, dict) for value in values)
    return values if whole else list(map(parse_line, lines))


def numeric_value(section: dict[str, Any], key: str) -> Any:
    """section[key], or None if it is absent or null. Raises `BrokenLogError` if it is not a number."""
    value = section.get(key)
    # No logged number comes near this bound. Beyond it, arithmetic on a damaged log could overflow.
    if value is not None and (type(value) not in (int, float) or not -1e18 < value < 1e18):
        raise BrokenLogError(f"run.json: {key} is {printable(value)[:20]}, which is not a number or far out of range")
    return value


def printable(value: Any) -> str:
    """A value from a log as one printable line: logs may contain line feeds, terminal escapes and half characters."""
    text = " ".join(("-" if value is None else value if isinstance(value, str) else json.dumps(value)).split())
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


@functools.lru_cache(maxsize=8192)
def printable_text(text: str) -> str:
    """`printable` of a text that many runs have, such as a key."""
    return printable(text)


def plain_value(value: Any) -> Any:
    """A number as it is, everything else as text, so that it can be compared, hashed and printed."""
    if type(value) in PLAIN_TYPES:
        return value
    return printable_text(value) if type(value) is str and len(value) < 64 else printable(value)


def plain_values(section: dict[str, Any]) -> dict[str, Any]:
    """A section with plain values."""
    # Most values need no call, which matters for the 150 keys of each of thousands of runs.
    return {printable_text(key): value if type(value) in PLAIN_TYPES else plain_value(value)
            for key, value in section.items()}


def without_index(device: Any) -> Any:
    """cuda:1 → cuda: which of several devices it was does not matter."""
    return device.partition(":")[0] if isinstance(device, str) else device


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        link = f"a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "missing"
        raise BrokenLogError(f"{path.name} is {link}") from None
    except OSError as error:
        raise BrokenLogError(f"{path.name} cannot be read: {error.strerror}") from None


def modified_time(path: Path) -> float:
    """In seconds since 1970; 0 if the file does not exist."""
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def is_missing(path: Path) -> bool:
    """Whether nothing has this name. A link to nowhere, and what cannot be told, is not missing."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError:
        pass
    return False
