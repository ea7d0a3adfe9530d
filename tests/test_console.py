"""The console: lines, columns, sizes and times, and the parser of the commands."""

import argparse
import io
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from blockgpt import console
from blockgpt.console import (
    ArgumentParser,
    align_columns,
    check_ranges,
    echo,
    human_bytes,
    human_time,
    in_columns,
    is_terminal,
    percentages,
    script_path,
)
from blockgpt.errors import UserError


def test_a_line_appears_at_once(capsys):
    echo("one", end="")
    echo("two", sys.stderr)
    assert capsys.readouterr() == ("one", "two\n")


FULL_DISK = """
from blockgpt.console import echo
for i in range(3):
    echo("x" * 10_000)
print("still running")
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_console_that_cannot_be_written_is_reported_once_and_given_up():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", FULL_DISK], cwd=ROOT, stdout=full, stderr=subprocess.PIPE,
                              text=True)
    assert done.returncode == 0
    assert done.stderr == ("warning: the console cannot be written (No space left on device): the run continues "
                           "without output\n")


def test_a_closed_pipe_is_left_to_the_caller():
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        echo("one", Closed())


def test_a_row_is_wrapped_in_its_column_on_a_terminal_only(monkeypatch):
    text = " ".join(["word"] * 20)
    monkeypatch.setattr(console, "is_terminal", lambda: False)
    assert in_columns("name  ", text) == f"name  {text}"
    monkeypatch.setattr(console, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    lines = in_columns("name  ", text).splitlines()
    assert len(lines) > 1 and lines[0].startswith("name  word")
    assert all(line.startswith("      word") for line in lines[1:])
    assert max(map(len, lines)) < 40 and in_columns("name  ", "") == "name  "


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [["name", "n", "note"], ["a", "1,000", ""], ["longer", "2", "x"]]
    assert align_columns(rows, left=(0, 2)) == ["name        n  note", "a       1,000", "longer      2  x"]
    assert align_columns([["a"], ["bb"]]) == [" a", "bb"]


def test_percentages_are_of_the_sum():
    assert percentages({"a": 1024, "b": 3072}) == "a 1,024 (25%) · b 3,072 (75%)"
    assert percentages({"a": 1.5e6}, "M", 1e6, 2) == "a 1.50M (100%)" and percentages({"a": 0}) == "a 0 (0%)"


def test_captured_output_is_no_terminal(monkeypatch):
    assert not is_terminal()
    monkeypatch.setattr(sys, "stdout", None)
    assert not is_terminal()


@pytest.mark.parametrize("size, text", [
    (None, "? memory"), (0, "0 MiB"), (3 * 2**20, "3 MiB"), (2**30, "1.00 GiB"), (80 * 2**30, "80.00 GiB"),
])
def test_sizes_in_words(size, text):
    assert human_bytes(size) == text


@pytest.mark.parametrize("seconds, text", [
    (None, "…"), (0, "0m00s"), (59.9, "0m59s"), (61, "1m01s"), (3600, "1h00m"), (90_061, "25h01m"),
])
def test_times_in_words(seconds, text):
    assert human_time(seconds) == text


@pytest.fixture
def parser():
    parser = ArgumentParser(prog="tool", description="does something")
    parser.add_argument("--count", type=int, default=3, help="how many")
    parser.add_argument("--format", choices=("table", "csv"), help="of the output")
    return parser


@pytest.mark.parametrize("argv, message", [
    (["--coun=3"], r"unrecognized arguments: --coun=3 \(did you mean --count\?\)"),  # no abbreviations
    (["--count=few"], "--count: invalid int value: 'few'"),
    (["--format=xml"], "--format: invalid choice: 'xml'"), (["--count"], "--count: expected one argument"),
])
def test_a_mistake_on_a_command_line_is_a_user_error_with_a_hint(parser, argv, message):
    with pytest.raises(UserError, match=f"^{message}"):
        parser.parse_args(argv)


def test_the_first_flag_out_of_range_is_named():
    args = argparse.Namespace(count=0, size=9)
    check_ranges(args, {"count": (True, "any"), "size": (True, "any")})
    with pytest.raises(UserError, match=r"^--size: 9 is out of range, must be below 5$"):
        check_ranges(args, {"count": (True, "any"), "size": (False, "below 5")})


def test_help_shows_the_defaults_and_exits_with_0(parser, capsys):
    with pytest.raises(SystemExit) as left:
        parser.parse_args(["--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0 and "how many (default: 3)" in out and "does something" in out


def test_a_script_is_named_as_it_can_be_typed_here(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert script_path("data/pycode/prepare.py") == "data/pycode/prepare.py"
    monkeypatch.chdir(tmp_path)
    assert script_path("data/pycode/prepare.py") == f"{ROOT}/data/pycode/prepare.py"
    (tmp_path / "train.py").touch()  # another program of that name
    assert script_path("train.py") == f"{ROOT}/train.py"
