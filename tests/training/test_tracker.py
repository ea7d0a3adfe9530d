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

# ---- Weights & Biases: never the run's problem

def losses(run_dir):
    numbers = ("loss", "grad_norm", "val_loss", "layers")
    return [{step: [record.get(n) for n in numbers] for step, record in records(run_dir, kind).items()}
            for kind in ("step", "eval", "gradients")]


def clean(tmp_path, **variables):
    """An environment with no account and a home of its own."""
    kept = {k: v for k, v in environment().items() if not k.startswith("WANDB_") and k != "NETRC"}
    return {**kept, "HOME": str(tmp_path), **variables}


def train_with_wandb(tmp_path, data_dir, **variables):
    return subprocess.run([sys.executable, ROOT / "train.py", *SHORT, f"--data_dir={data_dir}", "--wandb_log"],
                          cwd=tmp_path, env=clean(tmp_path, **variables), text=True, capture_output=True,
                          stdin=subprocess.DEVNULL, timeout=120)


def test_wandb_offline_gets_the_log_and_changes_no_bit(tmp_path, data_dir, plain):
    pytest.importorskip("wandb")
    done = train_with_wandb(tmp_path, data_dir, WANDB_MODE="offline")
    assert done.returncode == 0 and done.stderr == ""
    run_dir = tmp_path / "runs/run"
    assert losses(run_dir) == losses(plain.dir)
    (data,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    assert json.loads((run_dir / "run.json").read_text())["wandb_id"] == data.stem.removeprefix("run-")
    for word in (b"step/loss", b"eval/val_loss", b"gradients/layers/blocks.0/grad_norm", b"arch_name"):
        assert word in data.read_bytes()
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == {"runs"}


def test_without_the_package_training_is_the_same_and_says_so(tmp_path, data_dir, plain):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/wandb.py").write_text("raise ImportError(\"No module named 'wandb'\")")
    done = train_with_wandb(tmp_path, data_dir, PYTHONPATH=f"{tmp_path / 'broken'}{os.pathsep}{ROOT}")
    assert done.returncode == 0
    assert done.stderr == ("warning: wandb cannot be imported (No module named 'wandb'), logging without it "
                           "(pip install wandb)\n")
    assert losses(tmp_path / "runs/run") == losses(plain.dir)


@pytest.mark.parametrize("broken", ["login", "init", "log", "summary", "finish"])
def test_whatever_wandb_raises_costs_one_warning(new_log, capsys, monkeypatch, broken):
    def calls(name):
        def call(*_, **__):
            if name == broken:
                raise RuntimeError("it\nfails")
        return call

    summary = SimpleNamespace(update=calls("summary"))
    run = SimpleNamespace(id="1", log=calls("log"), finish=calls("finish"), summary=summary)
    wandb = SimpleNamespace(login=lambda **_: calls("login")() is None, init=lambda **_: calls("init")() or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with new_log(wandb_log=True) as log:
        for step in (1, 2):
            log.step(**{**STEP, "step": step})
            log.evaluation(step, 8, val_loss=1.0)
    assert capsys.readouterr().err == "warning: wandb: RuntimeError: it; logging goes on without it\n"
    assert len(lines(log)) == 4 and run_json(log)["status"] == "finished"


def test_without_an_account_wandb_logs_offline_and_asks_nobody(tmp_path, data_dir, plain):
    pytest.importorskip("wandb")
    code, output = on_a_terminal([ROOT / "train.py", *SHORT, f"--data_dir={data_dir}", "--wandb_log"], 120, tmp_path,
                                 clean(tmp_path))
    assert code == 0
    (said,) = re.findall(".*wandb.*", output)
    assert said == "warning: wandb: not logged in, logging offline (wandb login; wandb sync)"
    assert list((tmp_path / "runs/run").glob("wandb/offline-run-*/run-*.wandb"))
    assert losses(tmp_path / "runs/run") == losses(plain.dir)


def test_an_account_without_a_network_costs_one_warning(tmp_path, data_dir, plain):
    pytest.importorskip("wandb")
    done = train_with_wandb(tmp_path, data_dir, WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9",
                            WANDB_INIT_TIMEOUT="1")
    assert done.returncode == 0
    assert done.stderr.startswith("warning: wandb: CommError: ") and done.stderr.count("\n") == 1
    assert losses(tmp_path / "runs/run") == losses(plain.dir)


def test_a_resumed_run_goes_on_under_its_wandb_id_and_a_fresh_one_gets_another(new_log, monkeypatch):
    calls = []

    def init(**arguments):
        calls.append(arguments)
        return SimpleNamespace(summary={}, finish=lambda **_: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, login=lambda **_: True))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for resumed in (False, True):
        with new_log(resumed=resumed, wandb_log=True) as log:
            pass
    name = run_json(log)["wandb_id"]
    assert re.fullmatch("[0-9a-f]{8}", name)
    assert [(c["id"], c["resume"], c["mode"]) for c in calls] == [(name, "allow", None)] * 2
    assert all(c["dir"] == str(log.dir) and c["config"]["wandb_id"] == name for c in calls)


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
        if os.environ["HOW"] == "leaves":
            raise SystemExit(7)
        raise RuntimeError("no")
def login(**_):
    return True
def init(**_):
    act("init")
    return Run()
act("import")
"""


@pytest.mark.parametrize("where, how", [("init", "hangs"), ("log", "hangs"), ("finish", "hangs"), ("init", "leaves")])
def test_a_tracker_that_hangs_or_leaves_changes_neither_losses_nor_the_exit_code(tmp_path, data_dir, plain, where, how):
    (tmp_path / "stuck").mkdir()
    (tmp_path / "stuck/wandb.py").write_text(STUCK)
    started = time.monotonic()
    done = train_with_wandb(tmp_path, data_dir, PYTHONPATH=f"{tmp_path / 'stuck'}{os.pathsep}{ROOT}", WHERE=where,
                            HOW=how, WANDB_FINISH_TIMEOUT="1")
    assert done.returncode == 0 and time.monotonic() - started < 60
    assert done.stderr.startswith("warning: wandb: ") and done.stderr.count("\n") == 1
    assert ("not done after 1.25 s, the run ends without it" in done.stderr) == (how == "hangs")
    assert ("records at least did not get there" in done.stderr) == (where in ("init", "log") and how == "hangs")
    assert losses(tmp_path / "runs/run") == losses(plain.dir)


def test_a_tracker_that_is_too_slow_loses_records_and_says_how_many(new_log, capsys, monkeypatch):
    got, go_on = [], threading.Event()

    def init(**_):
        go_on.wait(60)
        return SimpleNamespace(summary={}, finish=lambda **_: None, log=lambda numbers, step: got.append(step))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, login=lambda **_: True))
    monkeypatch.setattr(tracker_module, "TRACKER_QUEUE", 3)
    with new_log(wandb_log=True) as log:
        for step in range(1, 8):
            log.step(**{**STEP, "step": step})
        go_on.set()
    assert got == [1, 2, 3] and [r["step"] for r in lines(log)] == list(range(1, 8))
    assert capsys.readouterr().err == "warning: wandb: too slow: 4 records were not sent (metrics.jsonl has them all)\n"


def test_a_tracker_that_hangs_is_left_without_its_word_at_the_interpreters_end(tmp_path):
    (tmp_path / "wandb.py").write_text(STUCK + "import atexit\nhook = atexit.register(time.sleep, 60)\n"
                                       "def teardown():\n    atexit.unregister(hook)\n    time.sleep(60)\n")
    code = ("import types, pathlib, training_logger as t; "
            "tracker = t.WandbTracker(types.SimpleNamespace(wandb_project='p'), pathlib.Path('.'), {'wandb_id': '1'}, "
            "print); tracker.finish({'status': 'finished', 'results': {}})")
    started = time.monotonic()
    done = run_python("-c", code, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "WHERE": "init",
                                                     "HOW": "hangs", "WANDB_FINISH_TIMEOUT": "3"})
    assert done.returncode == 0 and "not done after 3.75 s" in done.stdout and time.monotonic() - started < 40

