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
    run = SimpleNamespace(log=functions.get("log", lambda metrics, step: None),
                          finish=functions.get("finish", lambda exit_code: None),
                          summary=SimpleNamespace(update=functions.get("summary", lambda values: None)))
    return SimpleNamespace(login=functions.get("login", lambda **_: True),
                           init=functions.get("init", lambda **_: run))


@pytest.fixture
def new_tracker(tmp_path, monkeypatch):
    """new_tracker(module) -> (a tracker that imports `module` as wandb, the list of its warnings)."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in tracker_module.WANDB_SETTINGS:
        monkeypatch.setenv(name, os.environ.get(name, tracker_module.WANDB_SETTINGS[name]))

    def make(module):
        monkeypatch.setitem(sys.modules, "wandb", module)
        warnings = []
        return WandbTracker(SimpleNamespace(wandb_project="p"), tmp_path, {"wandb_id": "1"}, warnings.append), warnings
    return make


def test_records_are_sent_in_order_with_flat_names(new_tracker):
    calls = []
    module = fake_wandb(log=lambda metrics, step: calls.append((step, metrics)),
                        summary=calls.append, finish=lambda exit_code: calls.append(exit_code))
    for status, exit_code in (("finished", 0), ("interrupted", 0), ("failed", 1)):
        calls.clear()
        tracker, warnings = new_tracker(module)
        tracker.log("step", {"step": 1, "loss": 2.0})
        tracker.log("eval", {"step": 2, "layers": {"a": [3, 4]}})
        tracker.finish({"status": status, "results": {"best": 1.0}})
        assert calls == [(1, {"step/loss": 2.0}), (2, {"eval/layers/a/0": 3, "eval/layers/a/1": 4}),
                         {"status": status, "best": 1.0}, exit_code]
        assert not warnings
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2, {"e": 3}]}) == {"a/b": 1, "d/0": 2, "d/1/e": 3}


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


def test_a_slow_tracker_drops_records_and_reports_how_many(new_tracker, monkeypatch):
    sent, blocked = [], threading.Event()

    def log(metrics, step):
        sent.append(step)

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


STUCK = """
import os, time
class Run:
    def __init__(self):
        self.summary = {}
    def log(self, *_, **__):
        act("log")
    def finish(self, **_):
        act("finish")
def act(where):
    if where == os.environ["WHERE"]:
        while os.environ["HOW"] == "hangs":
            time.sleep(1)
        raise SystemExit(7)
def login(**_):
    return True
def init(**_):
    act("init")
    return Run()
"""


def test_a_tracker_that_hangs_does_not_hold_the_interpreters_exit(tmp_path):
    (tmp_path / "wandb.py").write_text(STUCK + "import atexit\nhook = atexit.register(time.sleep, 60)\n"
                                       "def teardown():\n    atexit.unregister(hook)\n    time.sleep(60)\n")
    code = ("import types, pathlib, blockgpt.training.tracker as t; "
            "tracker = t.WandbTracker(types.SimpleNamespace(wandb_project='p'), pathlib.Path('.'), {'wandb_id': '1'}, "
            "print); tracker.finish({'status': 'finished', 'results': {}})")
    started = time.monotonic()
    done = run_python("-c", code, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "WHERE": "init",
                                                     "HOW": "hangs", "WANDB_FINISH_TIMEOUT": "1"})
    assert done.returncode == 0 and "not done after 1.25 s" in done.stdout and time.monotonic() - started < 40


# ---- train.py

def without_account(tmp_path, **variables):
    """The variables of a process that finds no wandb account, with a home directory in tmp_path."""
    inherited = {k: v for k, v in environment().items() if not k.startswith("WANDB_") and k != "NETRC"}
    return {**inherited, "HOME": str(tmp_path), **variables}


def results(run_dir):
    """What a run computed, without its times: by record type, {step: values}."""
    keys = ("loss", "grad_norm", "val_loss", "layers")
    return [{step: [record.get(key) for key in keys] for step, record in records(run_dir, kind).items()}
            for kind in ("step", "eval", "gradients")]


@pytest.fixture(scope="module")
def untracked(tmp_path_factory, data_dir):
    """The results of the run without a tracker."""
    folder = tmp_path_factory.mktemp("untracked")
    done = run_train([*FLAGS, f"--data_dir={data_dir}"], folder, environment(), folder / "output")
    assert done.returncode == 0 and done.stderr == ""
    return results(folder / "runs/run")


@pytest.fixture
def train_with_wandb(tmp_path, data_dir):
    """train_with_wandb(**variables) -> the finished process of the run in tmp_path/runs/run.

    module: source text of a module that is imported as wandb, in place of the package.
    """
    def run(module=None, **variables):
        if module is not None:
            (tmp_path / ".fake").mkdir()
            (tmp_path / ".fake/wandb.py").write_text(module)
            variables["PYTHONPATH"] = f"{tmp_path / '.fake'}{os.pathsep}{ROOT}"
        return subprocess.run([sys.executable, ROOT / "train.py", *FLAGS, f"--data_dir={data_dir}", "--wandb_log"],
                              cwd=tmp_path, env=without_account(tmp_path, **variables), text=True, capture_output=True,
                              stdin=subprocess.DEVNULL, timeout=120)
    return run


@pytest.mark.slow
def test_wandb_offline_has_all_records_and_changes_no_result(tmp_path, train_with_wandb, untracked):
    pytest.importorskip("wandb")
    done = train_with_wandb(WANDB_MODE="offline")
    assert done.returncode == 0 and done.stderr == ""
    run_dir = tmp_path / "runs/run"
    assert results(run_dir) == untracked
    (data,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    assert json.loads((run_dir / "run.json").read_text())["wandb_id"] == data.stem.removeprefix("run-")
    for word in (b"step/loss", b"eval/val_loss", b"gradients/layers/blocks.0/grad_norm", b"arch_name"):
        assert word in data.read_bytes()
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == {"runs"}


@pytest.mark.slow
def test_without_the_package_the_run_is_the_same_and_warns(tmp_path, train_with_wandb, untracked):
    done = train_with_wandb("raise ImportError(\"No module named 'wandb'\")")
    assert done.returncode == 0
    assert done.stderr == ("warning: wandb cannot be imported (No module named 'wandb'), continuing without it "
                           "(pip install wandb)\n")
    assert results(tmp_path / "runs/run") == untracked


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
@pytest.mark.parametrize("where, how", [("init", "hangs"), ("log", "hangs"), ("finish", "hangs"), ("init", "exits")])
def test_a_tracker_that_hangs_or_exits_changes_neither_results_nor_the_exit_code(tmp_path, train_with_wandb, untracked,
                                                                                 where, how):
    started = time.monotonic()
    done = train_with_wandb(STUCK, WHERE=where, HOW=how, WANDB_FINISH_TIMEOUT="1")
    assert done.returncode == 0 and time.monotonic() - started < 60
    assert done.stderr.startswith("warning: wandb: ") and done.stderr.count("\n") == 1
    assert ("not done after 1.25 s, the run ends without it" in done.stderr) == (how == "hangs")
    assert ("records were not sent" in done.stderr) == (where in ("init", "log") and how == "hangs")
    assert results(tmp_path / "runs/run") == untracked


@pytest.mark.slow
def test_a_resumed_run_keeps_its_wandb_id_and_passes_it_on(tmp_path, data_dir):
    (tmp_path / ".fake").mkdir()
    (tmp_path / ".fake/wandb.py").write_text(
        "import json\n"
        "def init(**arguments):\n"
        "    with open('calls.jsonl', 'a') as f:\n"
        "        f.write(json.dumps(arguments) + '\\n')\n"
        "    raise RuntimeError('no tracker')\n"
        "def login(**_):\n"
        "    return True\n")
    for flags in ("--max_iters=1", "--eval_interval=1"), ("--max_iters=2", "--resume=must"):
        done = subprocess.run([sys.executable, ROOT / "train.py", *TINY, "--run_name=run", f"--data_dir={data_dir}",
                               "--wandb_log", *flags], cwd=tmp_path, text=True, capture_output=True, timeout=120,
                              env=without_account(tmp_path, PYTHONPATH=f"{tmp_path / '.fake'}{os.pathsep}{ROOT}"))
        assert done.returncode == 0, done.stderr
    wandb_id = json.loads((tmp_path / "runs/run/run.json").read_text())["wandb_id"]
    assert re.fullmatch("[0-9a-f]{8}", wandb_id)
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert [(c["id"], c["resume"], c["mode"], c["name"], c["dir"]) for c in calls] == [
        (wandb_id, "allow", None, "run", "runs/run")] * 2
    assert all(c["config"]["wandb_id"] == wandb_id for c in calls)
