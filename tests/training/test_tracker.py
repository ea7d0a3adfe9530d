"""Weights & Biases: whatever it does, a run trains the same and ends the same."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, environment, records, run_python
from forked import run_train

from blockgpt.training import tracker as tracker_module
from blockgpt.training.tracker import WandbTracker, flatten

FLAGS = (*TINY, "--run_name=run", "--max_iters=4", "--eval_interval=2", "--gradient_log_interval=2", "--dropout=0.1",
         "--arch_preset=llama", "--n_kv_head=1")
FINAL_RECORD = {"status": "finished", "results": {}}


# ---- the tracker alone, with a module in place of wandb

def fake_wandb(**functions):
    """A module with wandb's functions that the tracker calls, and those of `functions` in place of the default ones."""
    run = SimpleNamespace(log=functions.get("log", lambda metrics: None),
                          define_metric=functions.get("define_metric", lambda name, step_metric: None),
                          finish=functions.get("finish", lambda exit_code: None),
                          summary=SimpleNamespace(update=functions.get("summary", lambda values: None)))
    return SimpleNamespace(login=functions.get("login", lambda **_: True),
                           init=functions.get("init", lambda **_: run))


@pytest.fixture
def new_tracker(tmp_path, monkeypatch):
    """new_tracker(module) -> (a tracker that imports `module` as wandb, the list of its warnings)."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in tracker_module.WANDB_SETTINGS.items():
        monkeypatch.setenv(name, value)

    def make(module):
        monkeypatch.setitem(sys.modules, "wandb", module)
        warnings = []
        return WandbTracker(SimpleNamespace(wandb_project="p"), tmp_path, {"wandb_id": "1"}, warnings.append), warnings
    return make


def test_records_are_sent_in_order_with_flat_names(new_tracker):
    calls = []
    module = fake_wandb(log=calls.append, define_metric=lambda name, step_metric: calls.append((name, step_metric)),
                        summary=calls.append, finish=lambda exit_code: calls.append(exit_code))
    for status, exit_code in (("finished", 0), ("interrupted", 0), ("failed", 1)):
        calls.clear()
        tracker, warnings = new_tracker(module)
        tracker.log("step", {"step": 1, "loss": 2.0})
        tracker.log("eval", {"step": 2, "layers": {"a": [3, 4]}})
        tracker.finish({"status": status, "results": {"best": 1.0}})
        assert calls == [("*", "step"), {"step": 1, "step/loss": 2.0},
                         {"step": 2, "eval/layers/a/0": 3, "eval/layers/a/1": 4},
                         {"status": status, "best": 1.0}, exit_code]
        assert not warnings
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2, {"e": 3}]}) == {"a/b": 1, "d/0": 2, "d/1/e": 3}


def test_wandb_continues_a_run_by_its_id(new_tracker, tmp_path, monkeypatch):
    calls = []
    module = fake_wandb(init=lambda **arguments: calls.append(arguments) or fake_wandb().init())
    new_tracker(module)[0].finish(FINAL_RECORD)
    monkeypatch.setenv("WANDB_MODE", "offline")
    new_tracker(module)[0].finish(FINAL_RECORD)
    arguments = {"project": "p", "name": tmp_path.name, "dir": str(tmp_path), "id": "1", "resume": "allow",
                 "config": {"wandb_id": "1"}, "allow_val_change": True}
    assert calls == [{**arguments, "mode": None}, {**arguments, "mode": "offline"}]


@pytest.mark.parametrize("failing", ["login", "init", "log", "summary", "finish"])
def test_an_error_of_wandb_is_one_warning(new_tracker, failing):
    def fail(*_, **__):
        raise RuntimeError("it\nfails")

    tracker, warnings = new_tracker(fake_wandb(**{failing: fail}))
    for step in (1, 2):
        tracker.log("step", {"step": step})
        tracker.log("eval", {"step": step})
    tracker.finish(FINAL_RECORD)
    assert warnings == ["wandb: RuntimeError: it; continuing without it"]


def test_without_the_package_there_is_one_warning(new_tracker):
    tracker, warnings = new_tracker(None)  # which is how sys.modules says that a module cannot be imported
    tracker.finish(FINAL_RECORD)
    assert warnings == ["wandb cannot be imported (import of wandb halted; None in sys.modules), continuing without it "
                        "(pip install wandb)"]


def test_an_exit_of_wandb_is_one_warning(new_tracker):
    def exit_process(**_):
        raise SystemExit(7)

    tracker, warnings = new_tracker(fake_wandb(init=exit_process))
    tracker.finish(FINAL_RECORD)
    assert warnings == ["wandb: SystemExit: 7; continuing without it"]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_the_run_ends_without_a_tracker_that_hangs(new_tracker, monkeypatch, where):
    released = threading.Event()

    def hang(*_, **__):
        released.wait(60)

    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "0.2")
    tracker, warnings = new_tracker(fake_wandb(**{where: hang}))
    for step in (1, 2):
        tracker.log("step", {"step": step})
    started = time.monotonic()
    tracker.finish(FINAL_RECORD)
    assert time.monotonic() - started < 10
    lost = {"init": " (at least 2 records were not sent)", "log": " (at least 1 records were not sent)", "finish": ""}
    assert warnings == [f"wandb: not done after 0.25 s, the run ends without it{lost[where]}"]
    released.set()
    tracker.thread.join(10)
    assert len(warnings) == 1


def test_a_slow_tracker_drops_records_and_reports_how_many(new_tracker, monkeypatch):
    sent, blocked = [], threading.Event()

    def log(metrics):
        sent.append(metrics["step"])

    def init(**_):
        blocked.wait(60)
        return fake_wandb(log=log).init()

    monkeypatch.setattr(tracker_module, "QUEUE_SIZE", 3)
    tracker, warnings = new_tracker(fake_wandb(init=init))
    for step in range(1, 8):
        tracker.log("step", {"step": step})
    blocked.set()
    tracker.finish(FINAL_RECORD)
    assert sent == [1, 2, 3]
    assert warnings == ["wandb: too slow: 4 records were not sent (metrics.jsonl has them all)"]


@pytest.mark.parametrize("value, seconds", [("2", 2.5), ("-1", 75), ("inf", 75), ("nan", 75), ("soon", 75)])
def test_the_finish_timeout_follows_wandbs_own_if_that_is_valid(monkeypatch, value, seconds):
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", value)
    assert WandbTracker._finish_timeout() == seconds


HANGING = """
import atexit, time
hook = atexit.register(time.sleep, 60)
def login(**_):
    return True
def init(**_):
    time.sleep(60)
def teardown():
    atexit.unregister(hook)
    time.sleep(60)
"""


def test_a_tracker_that_hangs_does_not_hold_the_interpreters_exit(tmp_path):
    (tmp_path / "wandb.py").write_text(HANGING)
    code = ("import types, pathlib, blockgpt.training.tracker as t; "
            "tracker = t.WandbTracker(types.SimpleNamespace(wandb_project='p'), pathlib.Path('.'), {'wandb_id': '1'}, "
            "print); tracker.finish({'status': 'finished', 'results': {}})")
    started = time.monotonic()
    done = run_python("-c", code, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
                                                     "WANDB_FINISH_TIMEOUT": "1"})
    assert done.returncode == 0 and "not done after 1.25 s" in done.stdout and time.monotonic() - started < 40


# ---- train.py

def without_account(tmp_path, **variables):
    """The variables of a process that finds no wandb account, with a home directory in tmp_path."""
    inherited = {k: v for k, v in environment().items() if not k.startswith("WANDB_") and k != "NETRC"}
    return {**inherited, "HOME": str(tmp_path), **variables}


def results(run_dir):
    """What a run computed, without its times: by record type, {step: values}."""
    keys = ("loss", "grad_norm", "val_loss", "layers")
    return [{step: [record.get(key) for key in keys] for step, record in records(run_dir, record_type).items()}
            for record_type in ("step", "eval", "gradients")]


@pytest.fixture(scope="module")
def untracked(tmp_path_factory, data_dir):
    """The results of the run without a tracker."""
    folder = tmp_path_factory.mktemp("untracked")
    done = run_train([*FLAGS, f"--data_dir={data_dir}"], folder, environment(), folder / "output")
    assert done.returncode == 0 and done.stderr == ""
    return results(folder / "runs/run")


@pytest.fixture
def train_with_wandb(tmp_path, tmp_path_factory, data_dir):
    """train_with_wandb(*flags, **variables) -> the finished process of the run in tmp_path/runs/run."""
    output = tmp_path_factory.mktemp("output") / "train"

    def run(*flags, **variables):
        return run_train([*FLAGS, f"--data_dir={data_dir}", "--wandb_log", *flags], tmp_path,
                         without_account(tmp_path, **variables), output)
    return run


@pytest.mark.slow
def test_wandb_offline_has_all_records_and_changes_no_result(tmp_path, train_with_wandb, untracked):
    pytest.importorskip("wandb")
    done = train_with_wandb(WANDB_MODE="offline")
    assert done.returncode == 0 and done.stderr == ""
    run_dir = tmp_path / "runs/run"
    assert results(run_dir) == untracked
    (data,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    wandb_id = json.loads((run_dir / "run.json").read_text())["wandb_id"]
    assert re.fullmatch("[0-9a-f]{8}", wandb_id) and data.name == f"run-{wandb_id}.wandb"
    for word in (b"step/loss", b"eval/val_loss", b"gradients/layers/blocks.0/grad_norm", b"arch_name"):
        assert word in data.read_bytes()
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == {"runs"}
    assert train_with_wandb("--resume=must", "--max_iters=5", WANDB_MODE="disabled").returncode == 0
    assert json.loads((run_dir / "run.json").read_text())["wandb_id"] == wandb_id


@pytest.mark.slow
def test_without_an_account_wandb_logs_offline_and_never_prompts(tmp_path, data_dir, untracked):
    pytest.importorskip("wandb")
    on_a_terminal = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    done = subprocess.run([sys.executable, "-c", on_a_terminal, sys.executable, ROOT / "train.py", *FLAGS,
                           f"--data_dir={data_dir}", "--wandb_log"], cwd=tmp_path, env=without_account(tmp_path),
                          text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0, done.stderr
    (warning,) = re.findall("warning: wandb.*", done.stdout)
    assert warning.strip() == "warning: wandb: not logged in, logging offline (wandb login; wandb sync)"
    assert list((tmp_path / "runs/run").glob("wandb/offline-run-*/run-*.wandb"))
    assert results(tmp_path / "runs/run") == untracked


@pytest.mark.slow
def test_an_account_without_a_network_is_one_warning(tmp_path, train_with_wandb, untracked):
    pytest.importorskip("wandb")
    done = train_with_wandb(WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_INIT_TIMEOUT="1")
    assert done.returncode == 0
    assert done.stderr.startswith("warning: wandb: CommError: ") and done.stderr.count("\n") == 1
    assert results(tmp_path / "runs/run") == untracked


@pytest.mark.slow
def test_a_tracker_that_hangs_changes_neither_results_nor_the_exit_code(tmp_path, data_dir, untracked):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/wandb.py").write_text(HANGING)
    done = subprocess.run([sys.executable, ROOT / "train.py", *FLAGS, f"--data_dir={data_dir}", "--wandb_log"],
                          cwd=tmp_path, text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=50,
                          env=without_account(tmp_path, PYTHONPATH=f"{tmp_path / 'fake'}{os.pathsep}{ROOT}",
                                              WANDB_FINISH_TIMEOUT="1"))
    assert done.returncode == 0
    assert re.fullmatch(r"warning: wandb: not done after 1\.25 s, the run ends without it "
                        r"\(at least \d+ records were not sent\)\n", done.stderr)
    assert results(tmp_path / "runs/run") == untracked
