"""tools.mutate: which mutants there are, what becomes of them, and that an interrupted run continues."""

import subprocess

import pytest
from conftest import ROOT

from blockgpt.errors import UserError
from tools import mutate
from tools.mutate import TESTS, find_mutants

MODULE = '''"""A module."""
from __future__ import annotations
import sys

LIMIT: int = 3


def clamp(x: int, floor: int = 0, *, strict: bool = True) -> int:
    """Between floor and LIMIT."""
    assert x != 5
    if not strict and x < floor:
        raise ValueError(f"{x + 1} is too small")
    return max(floor, min(x, LIMIT)) + 0


if __name__ == "__main__":
    sys.exit(1)
'''
TEST = '''import m


def test_clamp():
    assert [m.clamp(x) for x in (-1, 2, 9)] == [0, 2, 3]
'''


@pytest.fixture
def project(tmp_path):
    """A git checkout with a module m.py and its test, not committed."""
    (tmp_path / "m.py").write_text(MODULE)
    (tmp_path / "test_m.py").write_text(TEST)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n'
                                             'markers = ["long: x", "slow: y"]\n')
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    return tmp_path


def test_every_operator_finds_its_mutants_and_nothing_else(tmp_path):
    (tmp_path / "m.py").write_text(MODULE)
    assert [(m.line, m.operator, m.before, m.after) for m in find_mutants(tmp_path, "m.py")] == [
        (5, "constant", "3", "(2)"), (5, "constant", "3", "(4)"),
        (8, "constant", "0", "(-1)"), (8, "constant", "0", "(1)"), (8, "constant", "True", "False"),
        (11, "removed not or sign", "not strict", "(strict)"),
        (11, "and/or", "not strict and x < floor", "(not strict or x < floor)"),
        (11, "comparison", "x < floor", "(x <= floor)"), (11, "comparison", "x < floor", "(x >= floor)"),
        (12, "removed statement", 'raise ValueError(f"{x + 1} is too small")', "pass"),
        (13, "returned None", "return max(floor, min(x, LIMIT)) + 0", "return None"),
        (13, "swapped arguments", "max(floor, min(x, LIMIT))", "(max(min(x, LIMIT), floor))"),
        (13, "arithmetic", "max(floor, min(x, LIMIT)) + 0", "(max(floor, min(x, LIMIT)) - 0)"),
        (13, "swapped arguments", "min(x, LIMIT)", "(min(LIMIT, x))"),
        (13, "constant", "0", "(-1)"), (13, "constant", "0", "(1)")]


def test_a_mutant_changes_its_own_range_of_bytes_alone(tmp_path):
    source = 'def f(x):\n    "é"\n    return "ü", x -\\\n        1  # ü\n'.encode()
    (tmp_path / "m.py").write_bytes(source)
    mutants = {(m.operator, m.after): m.apply(source).decode() for m in find_mutants(tmp_path, "m.py")}
    assert mutants["arithmetic", "(x + 1)"] == 'def f(x):\n    "é"\n    return "ü", (x + 1)  # ü\n'
    assert mutants["constant", "(2)"].endswith("x -\\\n        (2)  # ü\n")


def test_modules_and_their_tests_exist():
    for path, tests in TESTS.items():
        assert (ROOT / path).is_file() and all((ROOT / test.split("::")[0]).exists() for test in tests), path
    assert find_mutants(ROOT, "blockgpt/training/diagnostics.py")


@pytest.mark.long
def test_mutants_are_tested_in_a_copy_and_an_interrupted_run_continues(project, capsys):
    results = project / "results.jsonl"

    def run(*flags):
        mutate.main([f"--output={results}", *flags], root=project, tests={"m.py": ("test_m.py",)})
        return mutate.read_results(results), capsys.readouterr().out

    first, _ = run("--sample=4")
    assert len(first) == 4
    results.write_text(results.read_text()[:-20])  # a kill in the middle of a line
    records, out = run("--sample=16")
    assert len(records) == 16 and records[:3] == first[:3]
    assert (project / "m.py").read_text() == MODULE and (project / "test_m.py").read_text() == TEST
    survived = {(r["line"], r["after"]) for r in records if r["status"] == "survived"}
    assert survived == {(11, "(x <= floor)"), (11, "(x >= floor)"), (12, "pass"), (13, "(min(LIMIT, x))"),
                        (13, "(max(min(x, LIMIT), floor))"), (13, "(max(floor, min(x, LIMIT)) - 0)")}
    assert {r["by"] for r in records if r["status"] == "killed"} == {"test_m.py::test_clamp"}
    assert "| m.py | 16 | 10 | 0 | 6 |" in out and "m.py:12: removed statement: raise" in out
    (project / "test_m.py").write_text(TEST.replace("[0, 2, 3]", "[0, 2, 4]"))
    (project / "m.py").write_text(MODULE + "\n")  # another version of the module: its mutants are new
    with pytest.raises(UserError, match="its tests fail without a mutant: test_m"):
        run("--sample=1")


def test_what_all_mutants_share_is_none_of_the_tree(project):
    """A test's module that was imported before a mutant was written would test the unchanged module."""
    (project / "tests/area").mkdir(parents=True)
    (project / "test_m.py").rename(project / "tests/area/test_n.py")
    outcome = mutate.run_forked(project, ["tests"], mutate.MARKERS, 60, "--import-mode=importlib")
    assert outcome.exit_code == 0 and "pytest" in outcome.modules
    assert not {name.partition(".")[0] for name in outcome.modules} & {"m", "tests", "test_n"}


def test_an_unknown_module_is_named():
    with pytest.raises(UserError, match=r"--module: 'trian.py' is unknown .*train.py"):
        mutate.main(["--module=trian.py"])
