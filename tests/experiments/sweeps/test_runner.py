"""Claims, retries, resumes and looks of the runner, with a train.py of a few lines that ends as it is told."""

import fcntl
import json
import multiprocessing
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, environment
from dataset_helpers import refusal

from blockgpt.errors import UserError
from blockgpt.experiments.sweeps.launchers import Job, LocalLauncher
from blockgpt.experiments.sweeps.plan import PlannedRun
from blockgpt.experiments.sweeps.runner import (
    RunOutcome,
    SweepRunner,
    allow_retries,
    append_line,
    incomplete_blocks,
    last_error,
    read_attempts,
    read_looks,
    read_outcome,
    record_look,
)

TRAIN = '''
import json, os, signal, sys, time
flags = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
folder = os.path.join(flags["out_dir"], flags["run_name"])
launches = os.path.join(folder, "launches")
with open(launches, "a") as file:
    file.write(f"{time.monotonic()} {flags['resume']} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
count = len(open(launches).readlines())

def end(status, code, message=""):
    record = {"status": status, "criterion": {"metric": "val_loss", "more_is_better": False},
              "results": {"step": 10, "best_val_loss": 2.5, "wall_time": 1.0, "step_time": 0.1, "peak_memory": 7}}
    with open(os.path.join(folder, "run.json"), "w") as file:
        json.dump(record, file)
    print(message, flush=True)
    sys.exit(code)

ending = flags["ending"]
if ending == "fails" or (ending == "fails_once" and count == 1):
    end("failed", 7, "error: out of memory, try again")
if ending == "diverges":
    end("failed", 5, "error: the loss is not finite")
if ending == "refused":
    print("error: --x: no such key")
    sys.exit(2)
if ending == "killed_once" and count == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if ending == "waits" and count == 1:
    signal.signal(signal.SIGTERM, lambda *_: end("interrupted", 0, "saved"))
    open(os.path.join(folder, "waits"), "w").close()
    time.sleep(60)
end("finished", 0)
'''


def planned(ending, name=None, variant="a", seed=1, block=None, purpose="judge"):
    name = name or ending
    return PlannedRun(name, name, variant, "base", seed, (f"--ending={ending}",), purpose, steps=10, block=block)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/train.py").write_text(TRAIN)
    return tmp_path / "root"


@pytest.fixture
def runner(tmp_path, root):
    """A runner of one worker; `states` are the (run, state) that it has reported."""
    (tmp_path / "study").mkdir()
    states = []
    runner = SweepRunner(tmp_path / "study", LocalLauncher(1), root, {},
                         lambda run, state, outcome: states.append((run.id, state)))
    runner.states = states
    return runner


def launches(runner, name):
    path = runner.folder / name / "launches"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_finished_runs_are_skipped_and_new_ones_are_run(runner):
    first = runner.run([planned("finishes")])
    assert first["finishes"] == RunOutcome("finished", "", 10, 2.5, 1.0, 0.1, first["finishes"].overhead, 7)
    outcomes = runner.run([planned("finishes"), planned("finishes", "more")])
    assert [outcome.state for outcome in outcomes.values()] == ["finished", "finished"]
    assert (launches(runner, "finishes"), launches(runner, "more")) == (1, 1)


@pytest.mark.grid(4)
@pytest.mark.parametrize("ending, state, tries, reason", [
    ("fails", "failed", 2, "out of memory, try again (exit code 7)"),
    ("fails_once", "finished", 2, ""),
    ("killed_once", "finished", 2, ""),
    ("diverges", "diverged", 1, "the loss is not finite (exit code 5)"),
    ("refused", "refused", 1, "--x: no such key (exit code 2)"),
])
def test_a_failed_run_is_retried_once_and_then_reported(runner, ending, state, tries, reason):
    outcome = runner.run([planned(ending)])[ending]
    assert (outcome.state, outcome.reason) == (state, reason)
    assert launches(runner, ending) == tries
    assert outcome.value == (2.5 if state == "finished" else None)
    again = runner.run([planned(ending)])[ending]  # another sweep counts the same attempts
    assert (again.state, launches(runner, ending)) == (state, tries)


@pytest.mark.slow
def test_failed_runs_are_tried_again_on_request(runner):
    runs = [planned("fails"), planned("diverges"), planned("finishes")]
    runner.run(runs)
    allow_retries(runner.folder, runs)
    runner.run(runs)
    assert [launches(runner, run.name) for run in runs] == [4, 2, 1]


def test_a_killed_run_says_nothing_of_an_earlier_attempt(runner):
    (runner.folder / "killed_once/sweep").mkdir(parents=True)
    (runner.folder / "killed_once/sweep/console.txt").write_text("error: of an earlier attempt\n")
    runner.run([planned("killed_once")])
    assert read_attempts(runner.folder / "killed_once")[0]["reason"] == "ended (signal 9)"


@pytest.mark.slow
def test_a_run_that_another_process_has_claimed_is_waited_for(runner, monkeypatch):
    monkeypatch.setattr("blockgpt.experiments.sweeps.runner.ELSEWHERE_SECONDS", 0.1)
    sweep = runner.folder / "finishes/sweep"
    sweep.mkdir(parents=True)
    other = open(sweep / ".lock", "w")  # noqa: SIM115 (the other process holds it)
    fcntl.flock(other, fcntl.LOCK_EX)
    thread = threading.Timer(1.0, other.close)
    thread.start()
    outcomes = runner.run([planned("finishes"), planned("finishes", "next")])
    thread.join()
    assert runner.states[0] == ("finishes", "elsewhere")
    assert runner.states.index(("next", "finished")) < runner.states.index(("finishes", "running"))
    assert {outcome.state for outcome in outcomes.values()} == {"finished"}


@pytest.mark.slow
def test_a_run_that_still_trains_without_its_sweep_is_not_started_twice(runner, monkeypatch):
    monkeypatch.setattr("blockgpt.experiments.sweeps.runner.ELSEWHERE_SECONDS", 0.1)
    (runner.folder / "finishes").mkdir()
    training = open(runner.folder / "finishes/.lock", "w")  # noqa: SIM115
    fcntl.flock(training, fcntl.LOCK_EX)
    started = time.monotonic()
    thread = threading.Timer(1.0, training.close)
    thread.start()
    runner.run([planned("finishes")])
    thread.join()
    assert float((runner.folder / "finishes/launches").read_text().split()[0]) - started > 0.9
    assert runner.states[0] == ("finishes", "elsewhere")


def test_stopping_saves_what_runs_starts_nothing_more_and_is_no_failure(runner):
    runs = [planned("waits"), planned("finishes")]

    def tick():
        if (runner.folder / "waits/waits").exists():
            runner.stop()

    outcomes = runner.run(runs, tick)
    assert [outcome.state for outcome in outcomes.values()] == ["open", "open"]
    assert [attempt["state"] for attempt in read_attempts(runner.folder / "waits")] == ["interrupted"]
    assert launches(runner, "finishes") == 0
    runner.stopping = False
    assert {outcome.state for outcome in runner.run(runs).values()} == {"finished"}


@pytest.mark.slow
def test_the_rest_of_a_pair_goes_on_next_to_a_run_that_is_retried(runner):
    runner.run([planned("fails_once"), planned("finishes", "partner"), planned("finishes", "later")])
    order = [name for name, state in runner.states if state == "running"]
    assert order == ["fails_once", "fails_once", "partner", "later"]


def test_each_slot_has_a_gpu_of_its_own(runner):
    runner.launcher = LocalLauncher(2, ["3", "5"])
    runner.run([planned("finishes", "x"), planned("finishes", "y")])
    gpus = {(runner.folder / name / "launches").read_text().split()[2] for name in "xy"}
    assert gpus == {"3", "5"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_a_run_is_told_when_its_sweep_is_killed(tmp_path, root):
    (tmp_path / "waits").mkdir()
    job = Job((sys.executable, str(root / "train.py"), "--ending=waits", f"--out_dir={tmp_path}", "--run_name=waits",
               "--resume=auto"), tmp_path, tmp_path, {})
    script = ("import time\nfrom pathlib import Path\n"
              "from blockgpt.experiments.sweeps.launchers import Job, start_process\n"
              f"start_process(Job({job.command!r}, Path({str(tmp_path)!r}), Path({str(tmp_path)!r}), {{}}))\n"
              "time.sleep(60)\n")
    sweep = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment())
    deadline = time.monotonic() + 60
    while not (tmp_path / "waits/waits").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    while not (tmp_path / "waits/run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert read_outcome(tmp_path / "waits").state == "open"
    assert json.loads((tmp_path / "waits/run.json").read_text())["status"] == "interrupted"


def test_an_error_of_the_sweep_stops_what_it_runs(runner):
    def tick():
        if (runner.folder / "waits/waits").exists():
            raise OSError("the disk of the sweep is full")

    assert refusal(runner.run, [planned("waits")], tick, error=UserError) == (
        f"{runner.folder}: the disk of the sweep is full (the same command continues after a fix)")
    [attempt] = runner.running
    assert attempt.handle.process.wait(30) == 0


def test_a_run_that_is_no_longer_the_planned_one_is_not_started(runner):
    def check(run):
        if run.id == "changed":
            raise UserError("the code has changed")

    runner.check = check
    runs = [planned("waits"), planned("finishes", "changed")]
    runner.launcher = LocalLauncher(2)
    assert refusal(runner.run, runs, error=UserError) == "the code has changed"
    assert launches(runner, "changed") == 0
    assert runner.running[0].handle.process.wait(30) in (0, -signal.SIGTERM)


# ---- what a directory says


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"status": "running"}', b'{"status": "finished", '
                                     b'"results": 3}', b'{"results": {"step": null}, "criterion": []}',
                                     b'{"results": {"step": "x", "step_time": [], "wall_time": NaN}}'])
def test_the_outcome_of_a_damaged_directory_is_open_or_finished(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/attempts.jsonl").write_bytes(b'{"state": "failed", "seconds": "x"}\nnonsense\n[1]\n\xff\n'
                                                b'{"seconds": {}}\n')
    assert read_outcome(tmp_path).state == ("finished" if b"finished" in content else "open")


def test_a_criterion_of_which_more_is_better_is_turned_round(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({
        "status": "finished", "criterion": {"metric": "accuracy", "more_is_better": True},
        "results": {"best_accuracy": 0.25, "accuracy": 0.2}}))
    assert read_outcome(tmp_path).value == -0.25


def test_the_last_error_is_found_among_other_lines(tmp_path):
    (tmp_path / "c").write_text("step 1\nerror: first\nerror: sec\x1bond\nnote\n")
    assert last_error(tmp_path / "c") == "sec?ond"
    (tmp_path / "c").write_text("step 1\nKilled\n\n")
    assert last_error(tmp_path / "c") == "Killed"
    assert last_error(tmp_path / "absent") == ""


def append_many(path, name):
    for i in range(100):
        append_line(path, {"name": name, "i": i, "text": "x" * 5000})


def test_lines_of_several_processes_are_whole(tmp_path):
    path = tmp_path / "lines.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=append_many, args=(path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((line["name"], line["i"]) for line in lines) == sorted((n, i) for n in "ab" for i in range(100))


# ---- pairs and looks


def outcomes_of(runs, *states):
    return {run.id: RunOutcome(state) for run, state in zip(runs, states, strict=True)}


def test_a_half_pair_says_so_and_no_run_at_all_is_no_half():
    runs = [planned("x", f"{seed}{variant}", variant, seed, f"seed {seed}") for seed in (1, 2, 3) for variant in "ab"]
    runs.append(planned("x", "horizon", "a", 1, None, "horizon"))
    outcomes = outcomes_of(runs, "finished", "diverged", "finished", "finished", "open", "open", "finished")
    assert incomplete_blocks(runs, outcomes) == ["seed 1 is not a whole block: b diverged"]


def test_every_look_at_new_results_is_recorded_once(tmp_path):
    runs = [planned("x", f"{seed}{variant}", variant, seed) for seed in (1, 2) for variant in "ab"]
    some = outcomes_of(runs, "finished", "finished", "finished", "failed")
    everything = outcomes_of(runs, *["finished"] * 4)
    assert [record_look(tmp_path, runs, outcomes) for outcomes in (some, some, everything, some)] == [1, 1, 2, 1]
    looks = read_looks(tmp_path)
    assert [look["look"] for look in looks] == [1, 2]
    assert "no verdict without a record of it" in refusal(record_look, tmp_path / "no/folder", runs, some,
                                                          error=UserError)
    assert looks[0]["seeds"] == {"base/a": 2, "base/b": 1} and looks[1]["runs"] == 4
    with open(tmp_path / "looks.jsonl", "a") as file:
        file.write('{"look": 3, "da\n')  # a look is one although its line was cut off
    assert record_look(tmp_path, runs, outcomes_of(runs, "finished", "open", "open", "open")) == 4
