"""tools.ablate: what a study is on the command line, and that it survives the death of everything in it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, environment

from blockgpt.errors import UserError
from blockgpt.experiments.sweeps.runner import read_attempts
from blockgpt.files import sha256_of
from tools import ablate


def command(folder, data_dir, *flags):
    return [sys.executable, "-m", "tools.ablate", *TINY, f"--data_dir={data_dir}", "--log_interval=20",
            f"--out_dir={folder}", "--no_probe", *map(str, flags)]


def start(folder, data_dir, *flags):
    log = open(folder / "log.txt", "ab")  # noqa: SIM115 (the process writes to it)
    return subprocess.Popen(command(folder, data_dir, *flags), cwd=ROOT, env=environment(), stdout=log,
                            stderr=subprocess.STDOUT, preexec_fn=lambda: signal.signal(signal.SIGINT,
                                                                                       signal.default_int_handler))


def run_dirs(folder):
    return sorted(path.parent for path in folder.glob("*/*/run.json") if path.parent.parent.name != "probes")


def wait_for(condition, seconds=120):
    """Wait until the condition is true and return it; the test fails if it never is."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def training_pids(folder):
    """Processes that train in one of the folder's runs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if any(word.endswith("train.py") for word in words) and any(str(folder) in word for word in words):
            found.append(int(process.name))
    return found


def training_under_way(folder):
    """Processes that train in one of the folder's runs, and have come as far as its first line of the log."""
    pids = training_pids(folder)
    found = [int((path / ".lock").read_text().split()[0]) for path in run_dirs(folder)
             if (path / ".lock").exists() and json.loads((path / "run.json").read_text())["status"] == "running"
             and (path / "metrics.jsonl").stat().st_size]
    return [pid for pid in found if pid in pids]


def results(folder):
    """{run: (status, digest of the weights, evaluations)}."""
    found = {}
    for path in run_dirs(folder):
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        found[path.name] = (json.loads((path / "run.json").read_text())["status"],
                            sha256_of(path / "model.safetensors"),
                            [(line["step"], line["val_loss"]) for line in lines if line["kind"] == "eval"])
    return found


def verdicts(folder):
    """The verdicts that a sweep has printed last, without the figures of time."""
    text = (folder / "log.txt").read_text()
    lines = text[text.rindex("\nagainst "):].split("\nnote:")[0].splitlines()
    return "\n".join(line for line in lines if "the tokens/s of the baseline" not in line)


def newly_saved(folder, before):
    """A run that has saved a checkpoint, is not finished, and is not among `before`."""
    return [path for path in run_dirs(folder) if path.name not in before and list(path.glob("checkpoints/step_*"))
            and not (path / "model.safetensors").exists()]


@pytest.mark.long
def test_a_study_that_is_killed_everywhere_ends_as_an_undisturbed_one(tmp_path, data_dir):
    study = ["--max_iters=600", "--eval_interval=100", "--checkpoint_interval=20", "--vary=norm_position=pre,post",
             "--seeds=3", "--workers=2"]
    folders = tmp_path / "undisturbed", tmp_path / "disturbed"
    for folder in folders:
        folder.mkdir()
    undisturbed, disturbed = folders
    assert start(undisturbed, data_dir, *study).wait(300) == 0

    sweep = start(disturbed, data_dir, *study)  # Ctrl-C
    stopped = wait_for(lambda: newly_saved(disturbed, ()))[0]
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait(60) == 130
    assert not training_pids(disturbed)
    assert json.loads((stopped / "run.json").read_text())["status"] == "interrupted"
    assert read_attempts(stopped)[-1]["state"] == "interrupted"

    sweep = start(disturbed, data_dir, *study)  # kill -9 of the sweep: its runs save and end
    wait_for(lambda: any(record["status"] == "running" and record.get("resumes") for record in
                         (json.loads((path / "run.json").read_text()) for path in run_dirs(disturbed))))
    sweep.kill()
    sweep.wait()
    wait_for(lambda: not training_pids(disturbed))

    sweeps = [start(disturbed, data_dir, *study) for _ in range(2)]  # two at once, and kill -9 of a run
    os.kill(wait_for(lambda: training_under_way(disturbed))[0], signal.SIGKILL)
    assert [sweep.wait(300) for sweep in sweeps] == [0, 0]
    assert results(disturbed).keys() == results(undisturbed).keys()
    for name, (status, weights, evaluations) in results(undisturbed).items():
        assert status == "finished"
        found = results(disturbed)[name]
        assert found[:2] == (status, weights)
        assert dict(found[2]) == dict(evaluations)
    assert verdicts(disturbed) == verdicts(undisturbed)
    assert " worse" in verdicts(undisturbed) or " inconclusive" in verdicts(undisturbed)


@pytest.mark.slow
def test_a_study_is_shown_run_and_not_run_again(tmp_path, data_dir, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, f"--data_dir={data_dir}", "--max_iters=12", "--vary=norm_position=pre,post", "--seeds=1"]
    assert ablate.main([*argv, "--dry_run"]) == 0
    shown = capfd.readouterr().out
    assert "pre (baseline)" in shown and "runs         2 = 2 judged; 2 variants, 1 sizes, 1 seeds; 0 of them" in shown
    assert "left         3,072 tokens, " in shown
    assert "none with 1 seeds: a verdict takes 3" in shown
    assert not run_dirs(tmp_path / "ablations")

    assert ablate.main([*argv, "--plot=a.svg", "--report=a b.html"]) == 0
    out = capfd.readouterr().out
    assert (tmp_path / "a.svg").exists()
    page = (tmp_path / "a b.html").read_text()
    assert f"python -m tools.ablate {' '.join(argv)} --plot=a.svg &#x27;--report=a b.html&#x27;" in page
    assert '<span class="badge none">no verdict</span>' in page and "norm_position" in page
    assert "pre seed 1: finished" in out and "post seed 1: finished" in out and "no verdict" in out
    directories = run_dirs(tmp_path / "ablations")
    assert len(directories) == 2
    written = {path: (path / "run.json").stat().st_mtime_ns for path in directories}
    record = json.loads((directories[0].parent / "study.json").read_text())
    assert {run["run"] for run in record["runs"]} == {path.name for path in directories}

    assert ablate.main([*argv, "--no_probe", "--budget=1e15"]) == 0
    assert "2 of them have finished" in capfd.readouterr().out
    assert written == {path: (path / "run.json").stat().st_mtime_ns for path in run_dirs(tmp_path / "ablations")}
    with pytest.raises(UserError, match="--budget: the study is expected to cost"):
        ablate.main([*argv, "--no_probe", "--budget=1e6"])
    with pytest.raises(UserError, match=r"variant pre: does not fit: needs .* \(it fits, .*--batch_size="):
        ablate.main([*argv, "--no_probe", "--batch_size=10000000"])


def test_a_signal_before_any_run_interrupts_and_one_during_runs_stops_them():
    class Runner:
        active, stops = False, 0

        def stop(self):
            self.stops += 1

    runner = Runner()
    with pytest.raises(KeyboardInterrupt), ablate.stop_on_signals([runner]):
        signal.raise_signal(signal.SIGTERM)
    runner.active = True
    with ablate.stop_on_signals([runner]) as received:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert runner.stops == 2 and received == [signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
