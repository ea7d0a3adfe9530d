"""The promises of a tortured run, in short; `python -m tools.torture` has the long form."""

import importlib
import pickle
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT, run_python

from tools.torture import ranks
from tools.torture.__main__ import GROUPS
from tools.torture.files import MALICIOUS, Bomb, files_read, reset_access_times
from tools.torture.network import CUT, Quality, TwoNodes, has_namespaces
from tools.torture.runs import LaunchResult, rank_environments, read_losses
from tools.torture.trials import Row, run_trials


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


@pytest.mark.long
def test_one_process_under_torture(tmp_path):  # test_faults.py has the short form of signals and pauses
    groups = {*GROUPS} - {"signals", "pauses", "network"}
    rows = run_torture(tmp_path, *sorted(groups), "--modes=single", "--phases=commit,rename", "--no_torchrun",
                   "--scale=0.01", "--seed=2")
    assert {group for group, _ in rows} == groups
    assert total(rows, "kills") >= 2 and total(rows, "full") == 2 and total(rows, "files") == 1


@pytest.mark.long
def test_two_processes_under_torture(tmp_path):
    rows = run_torture(tmp_path, "kills", "--modes=fsdp", "--phases=rename", "--no_torchrun", "--scale=0.01",
                       "--seed=3")
    assert total(rows, "kills") >= 1


@pytest.mark.long
@pytest.mark.parametrize("group", sorted(GROUPS))
def test_every_mode_under_torture(tmp_path, group):
    run_torture(tmp_path, group, "--scale=1" if group == "malicious" else "--scale=0.05", "--seed=11", timeout=1800)


# ---- the instruments

def ping(node: str, other: str) -> bool:
    return subprocess.run(["ip", "netns", "exec", node, sys.executable, "-c",
                           f"import socket; socket.create_connection(('{other}', 1), 2)"],
                          capture_output=True, text=True).stderr.strip().endswith("Connection refused")


@pytest.mark.slow
def test_the_link_of_two_nodes_is_cut_and_restored():
    if not has_namespaces():
        pytest.skip("network namespaces need root")
    with TwoNodes(0, random.Random(0)) as nodes:
        assert ping(nodes.names[0], "10.9.8.2") and ping(nodes.names[1], "10.9.8.1")
        nodes.set_quality(CUT)
        assert not ping(nodes.names[0], "10.9.8.2") and nodes.lost
        nodes.set_quality(Quality(delay=0.1))
        assert ping(nodes.names[0], "10.9.8.2")


def test_every_wrapped_function_exists():
    for module, qualified_name in ranks.WRAPPED.values():
        function = importlib.import_module(module)
        for name in qualified_name.split("."):
            function = getattr(function, name)
        assert callable(function)
    assert {*ranks.PHASES} - {"rename"} == ranks.WRAPPED.keys() - {"save"}


def test_a_read_is_detected(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"x")
    reset_access_times([file])
    assert files_read([file]) == []
    file.read_bytes()
    if not files_read([file]):
        pytest.skip("this file system has no access times")


def test_the_malicious_pickle_runs_when_it_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists() and len(MALICIOUS) >= 15


# ---- trials, and what a launch reports

class FakeHarness:
    seed, scale, jobs = 1, 0.5, 2

    def __init__(self):
        self.ended = []

    def end_trial(self, trial):
        self.ended.append(trial)


class FakeTrial:
    broken = ()


def run_fake_trials(run_trial, target, **options):
    harness = FakeHarness()
    (row,) = run_trials(harness, "kills", "ddp", "kills", target, run_trial, **options)
    return row, harness


def test_trials_are_repeated_until_the_target_is_counted():
    row, harness = run_fake_trials(lambda rng, i: (FakeTrial(), Counter(kills=2, runs=1)), 20, per_trial=3)
    assert 10 <= row.counts["kills"] <= 12 and row.counts["runs"] == len(harness.ended)  # 20 × scale
    row, _ = run_fake_trials(lambda rng, i: (FakeTrial(), Counter(kills=0)), 2)
    assert row.counts["kills"] == 0  # ends although nothing is ever counted


def test_trials_draw_the_same_random_numbers_for_the_same_seed():
    draws = []
    for _ in range(2):
        drawn = {}

        def draw(rng, i, drawn=drawn):
            drawn[i] = rng.random()
            return FakeTrial(), Counter(kills=1)

        run_fake_trials(draw, 8)
        draws.append(drawn)
    assert draws[0] == draws[1] and len(set(draws[0].values())) == 4


def test_a_row_counts_its_broken_promises():
    row = Row("kills", "ddp", Counter(kills=3), [("lost", "a"), ("lost", "b")], 1.0)
    assert "3 kills, BROKEN: 2 lost" in str(row) and "0 broken" in str(row._replace(broken=[]))


def test_a_launch_reports_where_it_resumed_and_what_it_saved():
    out = "resumed from runs/step_00000004 at step 4\nstep      6   saved in 0.01 s\nstep      8   saved\n"
    result = LaunchResult([0], out, "warning: a\nerror: b\n", fired=["commit 9 10"])
    assert result.resumed_at() == 4 and result.newest_saved() == 10
    assert result.lines("error: ") == ["error: b"]
    assert LaunchResult([0], "no checkpoint yet\n", "").resumed_at() == 0
    assert LaunchResult([-9], "", "").resumed_at() is None and LaunchResult([-9], "", "").newest_saved() == 0


def test_losses_are_read_up_to_an_incomplete_line(tmp_path):
    lines = ['{"kind": "step", "step": 1, "loss": 3.0}', '{"kind": "eval", "step": 1}',
             '{"kind": "step", "step": 1, "loss": 2.0}', '{"kind": "step", "st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_losses(tmp_path) == {1: 2.0}


def test_ranks_get_the_variables_of_torchrun():
    assert rank_environments(1) == [{}]
    first, second = rank_environments(2)
    assert first["MASTER_PORT"] == second["MASTER_PORT"] and (first["RANK"], second["LOCAL_RANK"]) == ("0", "1")


# ---- faults in a rank

def new_fault(tmp_path, monkeypatch, **spec):
    monkeypatch.chdir(tmp_path)
    return ranks.Fault({"run_dir": str(tmp_path), **spec}, rank=0)


def write_file(path):
    with open(path, "wb", buffering=0) as f:
        f.write(b"x")


def test_a_fault_is_injected_at_the_nth_event_of_its_phase(tmp_path, monkeypatch):
    fault = new_fault(tmp_path, monkeypatch, action="refuse", phase="write", n=2, failures=1)
    save = fault.wrap("save", fault.wrap("write", write_file))
    with pytest.raises(OSError, match="No space left"):
        save("a")  # its second event is the write
    assert fault.counts == {"write": 2} and (tmp_path / "fired0").read_text() == "write 0 0\n"
    save("b")  # no more failures are left
    assert (tmp_path / "b").read_bytes() == b"x" and (tmp_path / "a").read_bytes() == b""


def test_events_outside_a_save_are_not_counted(tmp_path, monkeypatch):
    fault = new_fault(tmp_path, monkeypatch)
    fault.wrap("write", write_file)("a")
    assert fault.counts == {} and not fault.fired


def test_the_disk_is_filled_to_the_last_byte(tmp_path):
    script = ("import resource, sys; from tools.torture.ranks import fill_disk; "
              "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
              "resource.setrlimit(resource.RLIMIT_FSIZE, (100_001, 100_001)); fill_disk(sys.argv[1])")
    done = run_python("-c", script, tmp_path / "ballast")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ballast").stat().st_size == 100_001
