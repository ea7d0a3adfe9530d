"""The promises of a run under torture, in short; `python -m tools.torture` has the long form."""

import pickle
import re

import pytest
from conftest import ROOT, run_python

from tools.torture.__main__ import GROUPS
from tools.torture.files import MALICE, Bomb, unread, was_read


def torture(tmp_path, *argv, timeout=600):
    """The rows that tools.torture prints: {(group, row): figures}."""
    done = run_python("-m", "tools.torture", "--jobs=1", "--folder", tmp_path, *argv, cwd=ROOT, timeout=timeout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = done.stdout.split("\n\n")[0].splitlines()
    assert all(row.count(", 0 broken ") == 1 for row in rows), done.stdout
    assert not list(tmp_path.iterdir())  # it cleans up
    return {(row[:10].strip(), row[10:41].strip()): dict(
        (what, int(n)) for n, what in re.findall(r"(\d+) ([a-z0-9]+)", row[41:])) for row in rows}


def total(rows, what):
    return sum(figures.get(what, 0) for figures in rows.values())


def test_one_process_under_torture(tmp_path):  # of signals, test_training_faults has the short form
    groups = {*GROUPS} - {"signals"}
    rows = torture(tmp_path, *sorted(groups), "--modes=single", "--phases=index,rename", "--no_torchrun",
                   "--scale=0.01", "--seed=2")
    assert {group for group, _ in rows} == groups
    assert total(rows, "kills") >= 2 and total(rows, "full") == 2 and total(rows, "files") == 1


def test_two_processes_under_torture(tmp_path):
    rows = torture(tmp_path, "kills", "--modes=fsdp", "--phases=rename", "--no_torchrun", "--scale=0.01", "--seed=3")
    assert total(rows, "kills") >= 1


@pytest.mark.long
@pytest.mark.parametrize("group", sorted(GROUPS))
def test_every_mode_under_torture(tmp_path, group):
    torture(tmp_path, group, "--scale=1" if group == "malicious" else "--scale=0.05", "--seed=11", timeout=1800)


# ---- the instruments

def test_what_is_read_is_noticed(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"x")
    unread([file])
    assert was_read([file]) == []
    file.read_bytes()
    if not was_read([file]):
        pytest.skip("this file system keeps no times of reading")


def test_the_bomb_goes_off_where_it_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists() and len(MALICE) >= 15
