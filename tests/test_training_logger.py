"""The run directory and the console: the log is readable whatever ends the run."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoint_helpers import largest_file
from conftest import ROOT, TINY, environment, records, run_python

import training_logger
from blockgpt.checkpoints.manager import Progress, Resumption
from blockgpt.console import human_time
from blockgpt.errors import NonFiniteError, UserError
from blockgpt.progress import RunConsole
from blockgpt.training.faults import StepStatus
from model_builder import build_model
from model_config import ModelConfig
from training_logger import RunLog, run_directory, summarize_ranks

HEADER = {"arch_name": "x", "config": {"resume": "never", "eval_only": False}, "hardware": {"world_size": 1},
          "launches": [{"step": 0, "command": ["train.py"]}], "val_data": None}
MEMORY = {"allocated": 1, "peak": 2, "reserved": None}
SPEED = {"step_time": 0.1, "tokens_per_sec": 80.0, "tflops": 0.1, "mfu": None}

SHORT = (*TINY, "--run_name=run", "--max_iters=4", "--eval_interval=2", "--gradient_log_interval=2", "--dropout=0.1",
         "--arch_preset=llama", "--n_kv_head=1")


def log_step(log, step=1, loss=2.0, grad_norm=1.0, step_times=(0.1,), peaks=(2,), communication=None, metrics=None,
             **speed):
    """A training step into the log."""
    status = StepStatus(loss, [grad_norm] * len(step_times), [-1] * len(step_times), None, False, list(step_times),
                        list(peaks))
    log.step(step, 8, status, 1e-3, {**SPEED, **speed}, dict(MEMORY), {"text": 8}, communication, metrics)


def opened(run_dir, header, config, resumption=None, progress=None):
    """A `RunLog` that has its directory; that of a resumed run continues at step 0."""
    log = RunLog(run_dir, header, config, RunConsole(config.max_iters))
    if config.resuming:
        resumption, progress = resumption or Resumption(None), progress or Progress()
    assert log.open(resumption, progress) == str(log.dir)
    return log


@pytest.fixture(scope="module")
def plain(tmp_path_factory, data_dir):
    """A short run without a tracker: its directory and its output."""
    folder = tmp_path_factory.mktemp("plain")
    done = run_python(ROOT / "train.py", *SHORT, f"--data_dir={data_dir}", cwd=folder)
    assert done.returncode == 0 and done.stderr == ""
    return SimpleNamespace(dir=folder / "runs/run", output=done.stdout)


def configuration(tmp_path, run_name=None, **keys):
    return SimpleNamespace(**{"run_name": run_name, "out_dir": str(tmp_path), "resume": "never", "resuming": False,
                              "max_iters": 10, "patience": 3, "eval_only": False, "tracker": "none",
                              "model": SimpleNamespace(arch_preset="gpt2"), **keys})


@pytest.fixture
def new_log(tmp_path):
    """new_log(resumed=False, resumption=None, progress=None, **config) -> the log of a run in tmp_path/run."""
    def make(resumed=False, resumption=None, progress=None, **keys):
        config = configuration(tmp_path, "run", resuming=resumed, **keys)
        return opened(tmp_path / "run", HEADER, config, resumption, progress)
    return make


def strict(text):
    """JSON as the standard has it: no NaN, no Infinity."""
    def no_constant(name):
        raise ValueError(name)
    return json.loads(text, parse_constant=no_constant)


def run_json(log):
    return strict((log.dir / "run.json").read_text())


def lines(log):
    return [strict(line) for line in (log.dir / "metrics.jsonl").read_text().splitlines()]


# ---- the directory

def test_runs_started_in_the_same_second_get_directories_of_their_own(tmp_path):
    config = configuration(tmp_path)
    path = run_directory(config)
    assert re.fullmatch(r"\d{8}-\d{6}-gpt2", path.name)
    racing = [opened(path, HEADER, config) for _ in range(3)]  # each found the name free
    assert len({log.dir for log in racing}) == 3 and racing[0].dir == path
    assert all(run_json(log)["run_name"] == log.dir.name for log in racing)


def test_a_name_given_by_hand_is_never_shared(tmp_path, new_log):
    first = new_log()
    with pytest.raises(UserError, match="exists"):
        run_directory(configuration(tmp_path, "run"))
    with pytest.raises(UserError, match="exists"):
        new_log()  # the name was free a moment ago
    assert run_directory(configuration(tmp_path, "run", resume="must", resuming=True)) == first.dir
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match="is a link to nowhere"):
        run_directory(configuration(tmp_path, "dangling"))


def test_a_directory_that_cannot_be_created_is_an_error_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    config = configuration(tmp_path / "file", "run")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        opened(tmp_path / "file/run", HEADER, config)


def test_other_processes_write_nothing(tmp_path, capsys):
    log = RunLog(tmp_path / "run", HEADER, configuration(tmp_path, "run"), RunConsole(10, quiet=True))
    with log:
        log.begin(None, None, 0)
        log_step(log)
        log.evaluation(1, 8, {"val_loss": 1.0}, None)
        log.gradients(1, {})
        log.spike(1, 9.0, 7.0, True)
        log.saved(1, 0.5)
        log.info("x")
        log.warning("x")
        log.interrupted("x", 1)
        log.finished("x")
        log.ended("failed", "x")
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("before, recorded", [
    (lambda log: None, ("interrupted", "SIGINT at step 3")), (lambda log: log.finished(None), ("finished", None)),
    (lambda log: log.interrupted("SIGTERM", 2), ("interrupted", "SIGTERM at step 2"))])
def test_a_process_that_leaves_records_how_unless_the_run_has_ended(new_log, before, recorded):
    log = new_log()
    before(log)
    log.ended("interrupted", "SIGINT at step 3")
    assert (run_json(log)["status"], run_json(log)["status_reason"]) == recorded


def test_an_evaluation_that_leaves_does_not_change_how_its_run_ended(new_log):
    new_log().ended("failed", "x")
    for leave in (lambda log: log.ended("interrupted", "SIGINT"), lambda log: log.__exit__(ValueError, None, None)):
        log = new_log(resumed=True, eval_only=True)
        leave(log)
        assert (run_json(log)["status"], run_json(log)["status_reason"]) == ("failed", "x")


def test_a_process_can_leave_before_its_log_is_open(tmp_path):
    RunLog(tmp_path / "run", HEADER, configuration(tmp_path, "run"), RunConsole(10)).ended("interrupted", "SIGINT")
    assert not list(tmp_path.iterdir())


# ---- what it says

def test_values_that_are_not_finite_are_null(new_log, capsys):
    with new_log() as log:
        log_step(log, loss=float("nan"), grad_norm=float("inf"))
        log.gradients(1, {"blocks.0": {"grad_norm": float("-inf")}})
        log.evaluation(1, 8, {"val_loss": float("nan"), "val_bpb": float("inf")}, None)
    step, gradients, evaluation = lines(log)
    assert step["loss"] is None and step["grad_norm"] is None and step["lr"] == 1e-3
    assert gradients["layers"]["blocks.0"]["grad_norm"] is None
    assert evaluation["val_loss"] is None and run_json(log)["results"]["val_bpb"] is None
    assert "loss nan" in capsys.readouterr().out


def test_results_are_medians_without_the_first_step(new_log):
    with new_log() as log:
        for i, speed in enumerate((1.0, 50.0, 70.0, 60.0)):
            log_step(log, i + 1, tokens_per_sec=speed)
    results = run_json(log)["results"]
    assert results["tokens_per_sec"] == 60 and results["mfu"] is None and results["step"] == 4
    assert results["peak_memory"] == 2


def test_the_end_of_a_run_is_its_status(tmp_path, new_log):
    def status_after(error=None, resumed=True):
        log = new_log(resumed=resumed)
        if error is None:
            with log:
                assert run_json(log)["status"] == "running"
        else:
            with pytest.raises(type(error)), log:
                raise error
        return run_json(log)["status"], run_json(log)["status_reason"]

    assert status_after(resumed=False) == ("finished", None)
    assert status_after(NonFiniteError("step 3:\n  nan")) == ("failed", "NonFiniteError: step 3: nan")
    assert status_after(KeyboardInterrupt()) == ("interrupted", "KeyboardInterrupt:")
    assert status_after(SystemExit(1)) == ("failed", "SystemExit: 1")
    with new_log(resumed=True) as log:
        log.interrupted("SIGTERM", 3)
    assert (run_json(log)["status"], run_json(log)["status_reason"]) == ("interrupted", "SIGTERM at step 3")
    assert status_after() == ("finished", None)


def test_a_resumed_log_appends_after_an_incomplete_line_and_keeps_its_origin(tmp_path, new_log, monkeypatch):
    monkeypatch.setattr(training_logger.time, "time", lambda: 1000.0)
    log = new_log()
    monkeypatch.setattr(training_logger.time, "time", lambda: 1060.0)
    with log:
        log_step(log)
    created = run_json(log)["created_at"]
    with open(log.dir / "metrics.jsonl", "ab") as f:
        f.write(b'{"kind": "st')
    (log.dir / ".run.json.4711.tmp").touch()  # what a kill in the middle of a replacement leaves
    monkeypatch.setattr(training_logger, "utc_now", lambda: "2099-01-01T00:00:00Z")
    header = {**HEADER, "config": {"resume": "must", "eval_only": False, "max_iters": 10},
              "launches": [{"step": 0, "command": ["train.py", "--resume=must"]}]}
    log = opened(log.dir, header, configuration(tmp_path, "run", resume="must", resuming=True),
                 Resumption(None, {"max_iters": [5, 10]}), Progress(step=1, tokens=8))
    monkeypatch.setattr(training_logger.time, "time", lambda: 1065.0)
    with log:
        log_step(log, 2)
    whole, torn, resume, after = (log.dir / "metrics.jsonl").read_text().splitlines()
    assert strict(whole)["step"] == 1 and torn == '{"kind": "st' and strict(after)["step"] == 2
    entry = {"step": 1, "changed": {"max_iters": [5, 10]}, "forced": [], "world_size": 1}
    assert strict(resume) == {"kind": "resume", **entry} and run_json(log)["resumes"] == [entry]
    assert run_json(log)["launches"] == [*HEADER["launches"], {"step": 1, "command": ["train.py", "--resume=must"]}]
    record = run_json(log)
    assert record["created_at"] == created and record["updated_at"] == "2099-01-01T00:00:00Z"
    assert record["config"] == {"resume": "never", "eval_only": False, "max_iters": 10}
    assert record["results"]["wall_time"] == 65 and list(log.dir.glob(".*")) == [log.dir / ".lock"]


def test_evaluating_a_run_changes_neither_its_status_nor_its_config(new_log):
    with new_log() as log:
        log_step(log)
        log.interrupted("SIGTERM", 1)
    before = run_json(log)
    log = new_log(resumed=True, eval_only=True, max_iters=99)
    with log:
        log.evaluation(1, 8, {"val_loss": 1.5}, {"step": 1, "val_loss": 1.5})
    assert {**run_json(log), "updated_at": 0} == {**before, "updated_at": 0}
    step, evaluation = lines(log)
    assert (step["kind"], evaluation["kind"]) == ("step", "eval_only")  # which is not ranked
    assert (evaluation["val_loss"], evaluation["launch"]) == (1.5, HEADER["launches"][0])


def test_the_first_launch_of_a_run_of_an_earlier_version_is_kept(new_log):
    log = new_log()
    with log:
        pass
    former = {"command": ["train.py", "--old"], "git_commit": "abc", "versions": {"torch": "1"}, "hardware": {"a": 1}}
    old = {k: v for k, v in run_json(log).items() if k != "launches"} | former
    (log.dir / "run.json").write_text(json.dumps(old))
    for at in (3, 5):
        with new_log(resumed=True, progress=Progress(step=at)):
            pass
    first, *later = run_json(log)["launches"]
    assert first == {"step": 0, "started_at": old["created_at"], **former}
    assert later == [{"step": 3, "command": ["train.py"]}, {"step": 5, "command": ["train.py"]}]


def test_a_run_that_goes_back_keeps_no_results_of_what_it_abandons(new_log):
    with new_log() as log:
        for at, loss in ((1, 3.0), (2, 2.0)):
            log_step(log, at)
            log.spike(at, 9.0, 7.0, skipped=True)
            log.evaluation(at, 8 * at, {"val_loss": loss}, {"step": at, "val_loss": loss})
    assert run_json(log)["results"]["best_val_loss"] == 2.0
    log = new_log(resumed=True, progress=Progress(step=1, tokens=8, best={"step": 1, "val_loss": 3.0}))
    results = run_json(log)["results"]
    assert {k: results[k] for k in ("step", "tokens", "val_loss", "best_val_loss", "best_step", "spikes")} == {
        "step": 1, "tokens": 8, "val_loss": 3.0, "best_val_loss": 3.0, "best_step": 1, "spikes": 1}
    assert results["tokens_per_sec"] == 80.0 and "tokens_per_source" not in results
    assert sorted(records(log.dir)) == sorted(records(log.dir, "eval")) == [1]


def test_a_resume_that_goes_on_where_the_run_ended_keeps_its_results(new_log):
    with new_log() as log:
        log_step(log, 2)
        log.evaluation(2, 16, {"val_loss": 2.0}, {"step": 2, "val_loss": 2.0})
    before = run_json(log)["results"]
    assert run_json(new_log(resumed=True, progress=Progress(step=2, tokens=16)))["results"] == before


def test_a_log_that_cannot_be_written_is_a_warning(new_log, capsys):
    with new_log() as log:
        log_step(log)
        before = run_json(log)
        capsys.readouterr()
        with largest_file((log.dir / "metrics.jsonl").stat().st_size + 10):
            log_step(log, 2)
            log.evaluation(2, 16, {"val_loss": 1.0}, {"step": 2, "val_loss": 1.0})
            assert run_json(log) == before
        warnings = capsys.readouterr().err.splitlines()
        assert [w.split(":")[1].strip() for w in warnings] == ["metrics.jsonl", "metrics.jsonl", "run.json"]
        assert all(w.startswith("warning: ") and "File too large" in w for w in warnings)
        log_step(log, 3)  # there is space again: nothing was lost and nothing is torn
    assert [r["step"] for r in lines(log)] == [1, 2, 2, 3]
    assert run_json(log)["status"] == "finished" and run_json(log)["results"]["best_step"] == 2


def test_a_disk_full_at_the_end_does_not_hide_what_ended_the_run(new_log, capsys):
    log = new_log()
    with largest_file(10), pytest.raises(NonFiniteError), log:
        raise NonFiniteError("step 3")
    assert "warning: run.json: File too large" in capsys.readouterr().err


# ---- the console

@pytest.mark.slow
def test_a_console_on_a_full_disk_is_given_up_with_one_warning(tmp_path, data_dir):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    command = [sys.executable, ROOT / "train.py", *TINY, f"--data_dir={data_dir}", "--run_name=run", "--max_iters=3"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=tmp_path, env=environment(), text=True, stdout=full,
                              stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: the console cannot be written") and done.stderr.count("\n") == 1
    assert sorted(records(tmp_path / "runs/run")) == [1, 2, 3]


def on_a_terminal(command, columns, cwd, env):
    """Run a command on a terminal of its own, all three streams: (exit code, everything it wrote there)."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {k: v for k, v in env.items() if k not in ("COLUMNS", "LINES")}
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, env=env, stdin=terminal,
                               stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    output = b""
    try:
        while chunk := os.read(main, 65536):
            output += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(main)
    return process.wait(timeout=60), output.decode().replace("\r\n", "\n")


@pytest.mark.slow
def test_on_a_terminal_lines_fit_and_steps_are_rewritten_in_place(tmp_path, data_dir):
    code, output = on_a_terminal([ROOT / "train.py", *TINY, f"--data_dir={data_dir}", "--run_name=run", "--max_iters=6",
                                  "--eval_interval=4"], 72, tmp_path, environment())
    assert code == 0
    assert re.findall(r"\x1b\[(?!K|[0-9]+m)", output) == []
    output = re.sub("\x1b\\[[0-9]+m", "", output)  # without its colours
    printed = [text for line in output.split("\n") for text in line.split("\r\x1b[K")]
    assert max(len(text) for text in printed[:printed.index("next:")]) < 72  # commands to paste are below, not wrapped
    words = re.findall(r"^(loading|building|training|evaluating|saving|verifying)", "\n".join(printed), re.MULTILINE)
    assert list(dict.fromkeys(words)) == ["loading", "building", "training", "evaluating", "saving", "verifying"]
    ends = [line.split("\r\x1b[K")[-1] for line in output.split("\n")]  # what a line held when the next one began
    steps = [text for text in ends if text.startswith("step") and "loss " in text and "val_loss" not in text]
    assert [int(re.search(r"(\d+)/6", text)[1]) for text in steps] == [1, 2, 3, 4, 5, 6]  # each a twentieth of the run
    assert not set(words) & {end.partition(" ")[0] for end in ends}
    assert len([end for end in ends if "   val_loss" in end]) == 2
    assert "done: runs/run" in ends


@pytest.mark.slow
def test_the_header_prints_the_numbers_of_the_model_itself(plain):
    rows = {line[:22].strip(): line[23:] for line in plain.output.splitlines()}
    model = build_model(ModelConfig(**json.loads((plain.dir / "run.json").read_text())["model"]))
    total = sum(p.numel() for p in model.parameters())
    assert rows["parameters"] == (f"{total:,} · trainable {total:,} · "
                                  f"without embeddings {total - model.token_embedding.weight.numel():,}")
    ffn = model.blocks[0].ffn
    assert rows["sizes"].startswith(f"d_ff {ffn.down_proj.in_features} · head_dim 16 · kv heads 1 · vocabulary "
                                    f"{model.lm_head.out_features} · block 32 · bias no · head untied")
    assert rows["ffn_type"] == f"swiglu ({type(ffn).__name__})"
    assert rows["architecture"] == model.infer_config().arch_name()
    assert "\x1b" not in plain.output and "\r" not in plain.output  # not a terminal: no line is rewritten


def test_durations_read_naturally():
    assert [human_time(s) for s in (None, 0, 61, 3600, 90_061)] == ["…", "0m00s", "1m01s", "1h00m", "25h01m"]


# ---- several processes

def test_the_step_time_of_each_rank_is_logged_and_the_slowest_is_named(new_log, capsys):
    with new_log() as log:
        log_step(log, step_times=[0.1, 0.2, 0.1], peaks=[7, 9, 8])
        log_step(log, 2, step_times=[0.1, 0.101, 0.1], peaks=[0, 1, 2])
    one, two = lines(log)
    assert one["ranks"] == {"step_time": [0.1, 0.2, 0.1], "memory_peak": [7, 9, 8]} and one["slowest_rank"] == 1
    assert one["memory"] == {"allocated": 1, "peak": 9, "reserved": None}
    assert run_json(log)["results"]["peak_memory"] == two["memory"]["peak"] == 2
    printed = capsys.readouterr().out.splitlines()
    assert "rank 1 takes 2.00 × as long" in printed[0] and "rank" not in printed[1]


def test_the_communication_of_each_rank_and_the_straggler_are_logged(new_log, capsys):
    measured = [{"share": 0.5, "exposed": 0.4}, None, {"share": 0.1, "exposed": 0.0}]
    three = {"step_times": [1.0] * 3, "peaks": [0, 1, 2]}
    with new_log() as log:
        log_step(log, **three, communication=measured)
        log_step(log, 2, **three, communication=[None] * 3)
        log_step(log, 3, **three)
    one, *without = lines(log)
    assert one["communication"] == {"share": 0.3, "exposed": 0.2, "waited_for": 2}
    assert one["ranks"]["communication_exposed"] == [0.4, None, 0.0]
    for record in without:
        assert "communication" not in record and list(record["ranks"]) == ["step_time", "memory_peak"]
    assert run_json(log)["results"]["communication"] == one["communication"]
    assert "communication 30.0%, 20.0% exposed" in capsys.readouterr().out


def test_one_process_logs_no_ranks(new_log):
    with new_log() as log:
        log_step(log)
    assert lines(log) == [{"kind": "step", "step": 1, "tokens": 8, "loss": 2.0, "lr": 1e-3, "grad_norm": 1.0, **SPEED,
                           "memory": MEMORY, "tokens_per_source": {"text": 8}, "skipped": 0}]


def test_the_metrics_of_a_step_are_logged_and_printed(new_log, capsys):
    with new_log() as log:
        log_step(log, metrics={"accuracy": 0.25})
        log_step(log, step=2, metrics={})
    first, second = lines(log)
    assert first["metrics"] == {"accuracy": 0.25} and "metrics" not in second
    assert "   accuracy 0.2500\n" in capsys.readouterr().out


@pytest.mark.parametrize("reason, status_reason, printed", [
    (None, None, "done: "), ("x stays", "stopped early: x stays", "stopped early: x stays")])
def test_a_run_that_stopped_early_is_finished_with_the_reason(new_log, capsys, reason, status_reason, printed):
    with new_log() as log:
        log.finished(reason)
    assert (run_json(log)["status"], run_json(log)["status_reason"]) == ("finished", status_reason)
    assert printed in capsys.readouterr().out


def test_beyond_64_ranks_the_log_summarises_them():
    assert summarize_ranks([1.0] * 64) == [1.0] * 64
    assert summarize_ranks([3.0, None, 1.0, 2.0] * 25) == {"min": 1.0, "median": 2.0, "max": 3.0, "max_rank": 0}
    assert summarize_ranks([None] * 65) is None


# ---- spikes, saves, the best

def test_float16_overflows_are_counted_and_said_once(new_log, capsys):
    with new_log() as log:
        log.overflow(1, 65536.0)
        log.overflow(2, 32768.0)
        log_step(log, 2)
    assert [(r["kind"], r.get("loss_scale")) for r in lines(log)[:2]] == [("overflow", 65536), ("overflow", 32768)]
    assert lines(log)[2]["skipped"] == run_json(log)["results"]["skipped_steps"] == 2
    assert capsys.readouterr().err.count("overflows float16") == 1
    again = new_log(resumed=True, progress=Progress(step=1, skipped=1))
    assert run_json(again)["results"]["skipped_steps"] == 1


def test_spikes_saves_and_the_best_are_records_and_results(new_log, capsys):
    with new_log() as log:
        log.spike(3, 9.0, 7.5, skipped=True)
        log.spike(4, 9.0, 7.5, skipped=False)
        log.evaluation(4, 8, {"val_loss": 2.0, "val_bpb": 1.0}, {"step": 2, "val_loss": 1.5, "val_bpb": 0.5})
        log.saved(4, 0.25)
        log.saved(5, None)
    spike, other, _, save, background = lines(log)
    assert (spike["excess"], spike["skipped"], other["skipped"]) == (7.5, True, False)
    assert (save["seconds"], background["seconds"]) == (0.25, None)
    results = run_json(log)["results"]
    assert (results["spikes"], results["skipped_steps"], results["saved_step"]) == (2, 1, 5)
    assert (results["val_loss"], results["best_val_loss"], results["best_step"]) == (2.0, 1.5, 2)
    out, err = capsys.readouterr()
    assert "step      4   saved in 0.25 s" in out and "step      5   saved\n" in out
    assert "step 3: the loss of 9.0000 is a spike" in err and "skipped" in err.splitlines()[0]
    assert "skipped" not in err.splitlines()[1]
