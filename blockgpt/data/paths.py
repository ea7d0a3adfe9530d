"""Which files the user's names mean: files, folders and patterns. What cannot be read is an error, never left out.

A link to a folder is followed once; a file that is reached by several paths is read once. Hidden files, and the files
of datasets that this program wrote, are left out unless they are named.
"""

import fnmatch
import glob
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from blockgpt.console import echo
from blockgpt.data.formats import SUFFIXES, file_type_error
from blockgpt.errors import DataError, error_text
from blockgpt.files import exists

OUTPUT = re.compile(r"(train|val)[\w.-]*\.bin|meta\.json")  # the files of a dataset


class InputFile(NamedTuple):
    """A file to read; `named`: whether the user wrote its path, so that it may not be left out."""

    path: str
    status: os.stat_result
    named: bool


def matching_files(patterns: Iterable[str]) -> list[InputFile]:
    """The files that the patterns match, sorted by path.

    Args:
        patterns: files, folders or patterns such as "docs/**/*.txt". A folder means every file below it.

    Raises:
        DataError: a pattern without a file; a file or folder that cannot be read; a pipe.
    """
    found: dict[tuple[int, int] | str, InputFile] = {}
    outputs: dict[str, bool] = {}
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        named = os.path.lexists(pattern) and not os.path.isdir(pattern)
        n_matches = 0
        for path in [pattern] if named else expand(pattern):
            status = stat_input(path)
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode):
                raise file_type_error(path, status.st_mode)
            n_matches += 1
            file = InputFile(path, status, named)
            if not named and is_output(path, outputs):
                continue
            key = (status.st_dev, status.st_ino) if status.st_ino else path
            found[key] = min(found.get(key, file), file, key=preference)
        if not n_matches:
            raise no_such_file(pattern)
    folders = [folder for folder, has in outputs.items() if has]
    for folder in folders:
        echo(f"warning: {folder}: contains a prepared dataset, whose files are left out", sys.stderr)
    if not found:
        raise DataError(f"{folders[0]}: has only the files of a dataset, not its text (name the text)")
    return sorted(found.values())


def no_such_file(pattern: str) -> DataError:
    hint = ("a pipe cannot be read: write it to a file first" if pattern == "-"
            else "write a pattern in quotes: 'docs/**/*.txt'")
    return DataError(f"{pattern}: no such file ({hint})")


def preference(file: InputFile) -> tuple[bool, bool, str]:
    """The order of the paths of one file: first one that the user named, or whose suffix says the format."""
    return not file.named, not any(s in SUFFIXES for s in Path(file.path.lower()).suffixes), file.path


def stat_input(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        if os.path.islink(path):
            raise DataError(f"{path}: is a link to {os.readlink(path)}, which cannot be read: {error_text(error)} "
                            "(mount the disk, or remove the link)") from None
        raise DataError(f"{path}: cannot be read: {error_text(error)}") from None


def is_output(path: str, outputs: dict[str, bool]) -> bool:
    """Whether a file is component of a dataset that this program wrote, or began to write.

    Args:
        outputs: {folder: whether it has a dataset}, filled here.
    """
    folder, name = os.path.split(path)
    if not OUTPUT.fullmatch(name):
        return False
    if folder not in outputs:
        outputs[folder] = has_dataset(folder)
    return outputs[folder]


def has_dataset(folder: str) -> bool:
    if glob.glob(os.path.join(glob.escape(folder), ".parts.*.tmp")):
        return True
    try:
        meta = json.loads(Path(folder, "meta.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return type(meta) is dict and {"schema_version", "tokenizer", "dtype", "splits"} <= meta.keys()


def expand(pattern: str) -> Iterator[str]:
    """The files and folders that match a pattern. `DataError` for a folder that cannot be listed."""
    if os.path.isdir(pattern):
        return match_below(pattern, ["**", "*"], set())
    root = "/" if pattern.startswith("/") else ""
    components = [component for component in pattern.split("/") if component]
    return match_below(root, components + ["*"] * (components[-1:] == ["**"]), set())


def match_below(folder: str, components: Sequence[str], seen: set[tuple[int, int, int]]) -> Iterator[str]:
    """The paths below `folder` whose components match `components`.

    Args:
        seen: (device, inode, remaining components) of the folders that a ** has entered: links can lead back to them.
    """
    if not components:
        yield folder
        return
    component, rest = components[0], components[1:]
    if component == "**":
        status = stat_input(folder or ".")
        key = (status.st_dev, status.st_ino, len(components))
        if key in seen:
            return
        seen.add(key)
        yield from match_below(folder, rest, seen)
        names = [name for name in list_folder(folder) if not name.startswith(".")]
        if {"blobs", "refs", "snapshots"} <= set(names):  # a hub's cache: its snapshots are links to its blobs
            names = ["snapshots"]
        for name in names:
            if stat.S_ISDIR(stat_input(os.path.join(folder, name)).st_mode):
                yield from match_below(os.path.join(folder, name), components, seen)
    elif not glob.has_magic(component) or os.path.lexists(os.path.join(folder, component)):
        if exists(os.path.join(folder, component)):
            yield from match_below(os.path.join(folder, component), rest, seen)
    else:
        for name in list_folder(folder):
            if fnmatch.fnmatchcase(name, component) and name.startswith(".") <= component.startswith("."):
                yield from match_below(os.path.join(folder, name), rest, seen)


def list_folder(folder: str) -> list[str]:
    """The names in a folder, sorted; of what is no folder, none. `DataError` if that cannot be told."""
    if not stat.S_ISDIR(stat_input(folder or ".").st_mode):
        return []
    try:
        return sorted(os.listdir(folder or "."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error_text(error)}") from None
