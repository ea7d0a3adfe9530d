"""Trackers: whatever they do, a run trains the same and ends the same."""

import contextlib
import importlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, config_error, environment, records, run_python
from forked import run_train

from blockgpt.errors import ConfigError
from blockgpt.training import tracker as tracker_module
from blockgpt.training.tracker import WandbTracker, flatten, tracker_names, usual_names

FLAGS = (*TINY, "--run_name=run", "--max_iters=4", "--eval_interval=2", "--gradient_log_interval=2", "--dropout=0.1",
         "--arch_preset=llama", "--n_kv_head=1")
CONFIG = SimpleNamespace(tracker_project="p", eval_only=False)
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
        return WandbTracker(CONFIG, tmp_path, {"wandb_id": "1"}, warnings.append), warnings
    return make


def test_records_are_sent_in_order_with_flat_names(new_tracker):
    calls = []
    module = fake_wandb(log=calls.append, define_metric=lambda name, step_metric: calls.append((name, step_metric)),
                        summary=calls.append, finish=lambda exit_code: calls.append(exit_code))
    for status, exit_code in (("finished", 0), ("interrupted", 0), ("failed", 1)):
        calls.clear()
        tracker, warnings = new_tracker(module)
        tracker.log("step", {"step": 1, "tokens": 8, "loss": 2.0, "mfu": None})
        tracker.log("eval", {"step": 2, "tokens": 16, "val_loss": 3.0, "val_data": {"tokens": 5}})
        tracker.log("gradients", {"step": 2, "layers": {"a": [3, 4]}})
        tracker.finish({"status": status, "results": {"best": 1.0}})
        assert calls == [("*", "step"), {"step": 1, "tokens": 8, "train/loss": 2.0},
                         {"step": 2, "tokens": 16, "val/loss": 3.0},
                         {"step": 2, "tokens": 16, "gradients/layers/a/0": 3, "gradients/layers/a/1": 4},
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


@pytest.mark.slow
def test_a_tracker_that_hangs_does_not_hold_the_interpreters_exit(tmp_path):
    (tmp_path / "wandb.py").write_text(HANGING)
    code = ("import types, pathlib, blockgpt.training.tracker as t; "
            "tracker = t.WandbTracker(types.SimpleNamespace(tracker_project='p'), pathlib.Path('.'), "
            "{'wandb_id': '1'}, print); tracker.finish({'status': 'finished', 'results': {}})")
    started = time.monotonic()
    done = run_python("-c", code, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
                                                     "WANDB_FINISH_TIMEOUT": "1"})
    assert done.returncode == 0 and "not done after 1.25 s" in done.stdout and time.monotonic() - started < 40


def test_records_have_the_usual_names():
    step = {"step": 1, "tokens": 2, "loss": 3.0, "lr": 0.1, "grad_norm": None, "mfu": 0.5, "tokens_per_sec": 9,
            "tflops": 1, "step_time": 0.2, "memory": {"peak": 7, "reserved": None}, "tokens_per_source": {"text": 2},
            "metrics": {"accuracy": 0.5}, "other": 4, "name": "x"}
    assert usual_names("step", step) == {
        "train/loss": 3.0, "train/lr": 0.1, "perf/mfu": 0.5, "perf/tokens_per_sec": 9.0, "perf/tflops": 1.0,
        "perf/step_time": 0.2, "memory/peak": 7.0, "data/text": 2.0, "train/accuracy": 0.5, "step/other": 4.0}
    evaluation = {"step": 1, "tokens": 2, "val_loss": 3.0, "val_loss/text": 4.0, "accuracy": 1,
                  "val_data": {"tokens": 1}}
    assert usual_names("eval", evaluation) == {"val/loss": 3.0, "val/loss/text": 4.0, "val/accuracy": 1.0}
    assert usual_names("eval_only", evaluation)["eval_only/loss"] == 3.0
    assert usual_names("resume", {"step": 3, "changed": {"a": [1, 2]}, "world_size": 2}) == {"resume/world_size": 2.0}


@pytest.mark.parametrize("text, names", [
    ("none", []), ("wandb", ["wandb"]), ("wandb, tensorboard", ["wandb", "tensorboard"]),
    ("trackio,trackio", ["trackio"])])
def test_one_key_names_all_trackers(text, names):
    assert tracker_names(text) == names


def test_an_unknown_tracker_or_one_that_is_not_installed_is_refused_before_anything_begins(tmp_path, monkeypatch):
    assert config_error("--tracker=wand") == "--tracker: 'wand' is unknown (did you mean wandb?)"
    assert config_error("--tracker=wandb,none").startswith("--tracker: 'none' is unknown")
    assert config_error("--wandb_log") == "--wandb_log: was replaced by --tracker=wandb"
    assert config_error("--wandb_project=x") == "--wandb_project: was renamed to --tracker_project"
    for name, tracker in tracker_module.TRACKERS.items():
        monkeypatch.setitem(sys.modules, tracker.package, None)
        assert config_error(f"--tracker={name}") == (
            f"--tracker: {name} is not installed (pip install {tracker.package}, or --tracker=none)")
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb").mkdir()  # wandb makes such a folder: it is no package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match="wandb is not installed"):
        tracker_module.check_installed(["wandb"])


@pytest.fixture
def tracked(tmp_path, monkeypatch):
    """tracked(name, records, resumes, results) -> the warnings of a tracker that was given these records."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))

    def run(name, logged, resumes=(), results=None, eval_only=False):
        warnings = []
        record = {"wandb_id": "1", "resumes": list(resumes), "results": results or {}, "arch_name": "x"}
        config = SimpleNamespace(tracker_project="p", eval_only=eval_only)
        tracker = tracker_module.TRACKERS[name](config, tmp_path, record, warnings.append)
        for record_type, values in logged:
            tracker.log(record_type, values)
        tracker.finish(FINAL_RECORD)
        return warnings
    return run


def losses(steps):
    """Records of these steps; the loss is the step, 10 tokens each."""
    return [("step", {"step": step, "tokens": 10 * step, "loss": float(step)}) for step in steps]


@pytest.mark.slow
def test_tensorboard_has_the_run_by_steps_and_by_tokens_and_drops_what_a_resume_abandons(tmp_path, tracked):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read(axis, name="train/loss"):
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / axis)).Reload()
        return [(event.step, event.value) for event in events.Scalars(name)]

    assert tracked("tensorboard", [*losses([1, 2, 3, 4]), ("eval", {"step": 4, "tokens": 40, "val_loss": 9.0})]) == []
    assert read("steps") == [(1, 1), (2, 2), (3, 3), (4, 4)] and read("tokens") == [(10, 1), (20, 2), (30, 3), (40, 4)]
    assert read("steps", "val/loss") == [(4, 9.0)] and read("tokens", "val/loss") == [(40, 9.0)]
    assert tracked("tensorboard", losses([3]), resumes=[{"step": 2}], results={"tokens": 20}) == []
    assert read("steps") == [(1, 1), (2, 2), (3, 3)] and read("tokens") == [(10, 1), (20, 2), (30, 3)]
    assert tracked("tensorboard", [], resumes=[{"step": 2}], results={"tokens": 30}, eval_only=True) == []
    assert read("steps") == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.slow
def test_trackio_has_the_run_and_continues_it(tmp_path, tracked):
    pytest.importorskip("trackio")
    for steps in ([1, 2], [3]):
        assert tracked("trackio", losses(steps)) == []
    (database,) = (tmp_path / "trackio").glob("*.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert [(name, step) for name, step, _ in rows] == [(tmp_path.name, step) for step in (1, 2, 3)]
    assert json.loads(rows[2][2]) == {"tokens": 30, "train/loss": 3.0}


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
        return run_train([*FLAGS, f"--data_dir={data_dir}", "--tracker=wandb", *flags], tmp_path,
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
    for word in (b"train/loss", b"val/loss", b"perf/tokens_per_sec", b"gradients/layers/blocks.0/grad_norm",
                 b"arch_name", b"tokens"):
        assert word in data.read_bytes()
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == {"runs"}
    assert train_with_wandb("--resume=must", "--max_iters=5", WANDB_MODE="disabled").returncode == 0
    assert json.loads((run_dir / "run.json").read_text())["wandb_id"] == wandb_id


@pytest.mark.slow
def test_without_an_account_wandb_logs_offline_and_never_prompts(tmp_path, data_dir, untracked):
    pytest.importorskip("wandb")
    on_a_terminal = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    done = subprocess.run([sys.executable, "-c", on_a_terminal, sys.executable, ROOT / "train.py", *FLAGS,
                           f"--data_dir={data_dir}", "--tracker=wandb"], cwd=tmp_path,
                          env=without_account(tmp_path, NO_COLOR="1"), text=True, capture_output=True,
                          stdin=subprocess.DEVNULL, timeout=120)
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
    done = subprocess.run([sys.executable, ROOT / "train.py", *FLAGS, f"--data_dir={data_dir}", "--tracker=wandb"],
                          cwd=tmp_path, text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=50,
                          env=without_account(tmp_path, PYTHONPATH=f"{tmp_path / 'fake'}{os.pathsep}{ROOT}",
                                              WANDB_FINISH_TIMEOUT="1"))
    assert done.returncode == 0
    assert re.fullmatch(r"warning: wandb: not done after 1\.25 s, the run ends without it "
                        r"\(at least \d+ records were not sent\)\n", done.stderr)
    assert results(tmp_path / "runs/run") == untracked
