"""The promises of a tortured run, in short; `python -m tools.torture` has the long form."""

import importlib
import pickle
import re

import pytest
from conftest import ROOT, run_python

from tools.torture import ranks
from tools.torture.__main__ import GROUPS
from tools.torture.files import MALICIOUS, Bomb, files_read, reset_access_times


def run_torture(tmp_path, *argv, timeout=600):
    """The rows that tools.torture prints: {(group, row): {event: count}}."""
    done = run_python("-m", "tools.torture", "--jobs=1", "--folder", tmp_path, *argv, cwd=ROOT, timeout=timeout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = done.stdout.split("\n\n")[0].splitlines()
    assert all(row.count(", 0 broken ") == 1 for row in rows), done.stdout
    assert not list(tmp_path.iterdir())  # it cleans up
    return {(row[:10].strip(), row[10:41].strip()): dict(
        (event, int(n)) for n, event in re.findall(r"(\d+) ([a-z0-9]+)", row[41:])) for row in rows}


def total(rows, event):
    return sum(counts.get(event, 0) for counts in rows.values())


@pytest.mark.slow
def test_one_process_under_torture(tmp_path):  # test_faults.py has the short form of signals
    groups = {*GROUPS} - {"signals"}
    rows = run_torture(tmp_path, *sorted(groups), "--modes=single", "--phases=commit,rename", "--no_torchrun",
                   "--scale=0.01", "--seed=2")
    assert {group for group, _ in rows} == groups
    assert total(rows, "kills") >= 2 and total(rows, "full") == 2 and total(rows, "files") == 1


@pytest.mark.slow
def test_two_processes_under_torture(tmp_path):
    rows = run_torture(tmp_path, "kills", "--modes=fsdp", "--phases=rename", "--no_torchrun", "--scale=0.01",
                       "--seed=3")
    assert total(rows, "kills") >= 1


@pytest.mark.long
@pytest.mark.parametrize("group", sorted(GROUPS))
def test_every_mode_under_torture(tmp_path, group):
    run_torture(tmp_path, group, "--scale=1" if group == "malicious" else "--scale=0.05", "--seed=11", timeout=1800)


# ---- the instruments

def test_every_wrapped_function_exists():
    for module, qualified_name in ranks.WRAPPED.values():
        function = importlib.import_module(module)
        for name in qualified_name.split("."):
            function = getattr(function, name)
        assert callable(function)
    assert {*ranks.PHASES} - {"rename"} == ranks.WRAPPED.keys() - {"save"}


def test_a_read_is_noticed(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"x")
    reset_access_times([file])
    assert files_read([file]) == []
    file.read_bytes()
    if not files_read([file]):
        pytest.skip("this file system has no access times")


def test_the_bomb_goes_off_when_it_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists() and len(MALICIOUS) >= 15
