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

from blockgpt.experiments.runner import read_attempts
from blockgpt.files import sha256_of


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


def results(folder):
    """{run: (status, digest of the weights, evaluations)}."""
    found = {}
    for path in run_dirs(folder):
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        found[path.name] = (json.loads((path / "run.json").read_text())["status"],
                            sha256_of(path / "model.safetensors"),
                            [(line["step"], line["val_loss"]) for line in lines if line["kind"] == "eval"])
    return found


def newly_saved(folder, before):
    """A run that has saved a checkpoint, is not finished, and is not among `before`."""
    return [path for path in run_dirs(folder) if path.name not in before and list(path.glob("checkpoints/step_*"))
            and not (path / "model.safetensors").exists()]


@pytest.mark.long
def test_a_study_that_is_killed_everywhere_ends_as_an_undisturbed_one(tmp_path, data_dir):
    study = ["--max_iters=600", "--eval_interval=100", "--checkpoint_interval=20", "--vary=norm_position=pre,post",
             "--seeds=2", "--workers=2"]
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
    pid = wait_for(lambda: training_pids(disturbed))[0]
    time.sleep(3)
    with_pid = Path(f"/proc/{pid}/cmdline")
    if with_pid.exists():
        os.kill(pid, signal.SIGKILL)
    assert [sweep.wait(300) for sweep in sweeps] == [0, 0]
    assert results(disturbed).keys() == results(undisturbed).keys()
    for name, (status, weights, evaluations) in results(undisturbed).items():
        assert status == "finished"
        found = results(disturbed)[name]
        assert found[:2] == (status, weights)
        assert dict(found[2]) == dict(evaluations)
    print((disturbed / "log.txt").read_text())
