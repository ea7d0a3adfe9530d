"""train.py as a user runs it: repeatable, resumable, interruptible; its exit code and log are true."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, environment, records, run_python

from blockgpt.files import FolderLock
from compare_architectures import load_run

LOSSES = ("loss", "grad_norm", "lr", "tokens")


def curve(run_dir):
    """{step: what must be equal to the last bit}."""
    return {s: tuple(r[k] for k in LOSSES) for s, r in records(run_dir).items()}


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    pytest.param(["--arch_preset=llama"], marks=pytest.mark.long),
    ["--arch_preset=gpt2", "--dropout=0.2", "--gradient_accumulation_steps=2"],
    ["--arch_preset=gpt2_openai", "--dtype=bfloat16", "--dropout=0.1", "--loss_chunk=50"],  # of 128 tokens
], ids=["llama", "gpt2-dropout-accumulation", "gpt2_openai-bf16"])
def test_runs_repeat_and_resume_bit_for_bit(tmp_path, train, flags):
    schedule = ["--lr_decay_iters=60", "--warmup_iters=6", "--eval_interval=15", "--learning_rate=3e-3", *flags]
    for name in ("once", "twice"):
        assert train(name, "--max_iters=60", *schedule).returncode == 0
    assert train("cut", "--max_iters=30", *schedule).returncode == 0
    before = (tmp_path / "runs/cut/metrics.jsonl").read_bytes()
    resumed = train("cut", "--max_iters=60", "--resume=must")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stdout

    runs = tmp_path / "runs"
    assert len(curve(runs / "once")) == 60
    assert curve(runs / "once") == curve(runs / "twice") == curve(runs / "cut")
    evals = [{s: (r["val_loss"], r["val_bpb"]) for s, r in records(runs / n, "eval").items()}
             for n in ("once", "twice", "cut")]
    assert evals[0] == evals[1] == evals[2] and sorted(evals[0]) == [15, 30, 45, 60]
    assert (runs / "cut/metrics.jsonl").read_bytes().startswith(before)
    assert (runs / "cut/model.safetensors").read_bytes() == (runs / "once/model.safetensors").read_bytes()
    assert evals[0][60][0] < evals[0][15][0] < 5.8  # and it learned


@pytest.mark.slow
def test_gradient_accumulation_is_the_larger_batch(tmp_path, train):
    train("whole", "--max_iters=10", "--batch_size=8")
    train("split", "--max_iters=10", "--batch_size=2", "--gradient_accumulation_steps=4")
    a, b = (records(tmp_path / "runs" / n) for n in ("whole", "split"))
    for step in a:  # the same sequences and the same mean over tokens, summed in another order
        assert a[step]["loss"] == pytest.approx(b[step]["loss"], rel=2e-5)
        assert a[step]["tokens"] == b[step]["tokens"]


def test_the_run_directory_records_what_was_built_and_how_it_went(tmp_path, train):
    done = train("full", "--max_iters=20", "--eval_interval=10", "--gradient_log_interval=5", "--arch_preset=llama",
                 "--rope_theta=500", "--min_lr=0", "--grad_clip=0.1")
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "runs/full/run.json").read_text())
    assert run["status"] == "finished" and run["schema_version"] == 1
    assert run["arch_name"] == "2L-2H-32D-RoPE-RMS-SwiGLU-PreNorm-theta500"
    assert run["config"]["rope_theta"] == 500 and run["model"]["vocab_size"] == 320
    assert run["parameters"]["total"] == sum(run["parameters"][k] for k in ("non_embedding",)) + 320 * 32
    assert run["flops_per_token"]["train"] == 3 * sum(run["flops_per_token"]["forward"].values())
    assert run["hardware"]["peak_flops"] == 1e12 and run["data"]["tokens_per_step"] == 4 * 32
    results = run["results"]
    assert results["step"] == 20 and results["tokens"] == 20 * 4 * 32
    assert results["best_val_loss"] == min(r["val_loss"] for r in records(tmp_path / "runs/full", "eval").values())
    assert results["val_bpb"] > results["val_loss"] / 0.6932  # an end-of-text token carries no byte
    step = records(tmp_path / "runs/full")[20]
    assert step["mfu"] == pytest.approx(run["flops_per_token"]["train"] * step["tokens_per_sec"] / 1e12)
    gradients = records(tmp_path / "runs/full", "gradients")
    assert sorted(gradients) == [5, 10, 15, 20]
    assert set(gradients[5]["layers"]) == {"token_embedding", "blocks.0", "blocks.1", "final_norm", "lm_head"}
    norms = [layer["grad_norm"] for layer in gradients[20]["layers"].values()]
    assert sum(n**2 for n in norms) ** 0.5 == pytest.approx(step["grad_norm"], rel=1e-4)  # before clipping
    assert step["grad_norm"] > 2 * run["config"]["grad_clip"]
    for text in ("RoPE-RMS-SwiGLU-PreNorm", "swiglu (SwiGLU)", "parameters", "FLOPs per token", "MFU divides by",
                 "1 TFLOP/s", "training tokens", "tok/s", "left"):
        assert text in done.stdout
    assert (tmp_path / "runs/full/config.json").exists()


@pytest.mark.slow
def test_a_resume_says_what_raising_max_iters_does_to_the_rate_and_that_the_threads_are_others(tmp_path, train):
    train("longer", "--max_iters=10", "--learning_rate=1e-3")
    keep = train("longer", "--resume=must", "--max_iters=11", "--lr_decay_iters=10",
                 env={"OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"})  # in a process of its own
    raised = train("longer", "--resume=must", "--max_iters=20", "--lr_decay_iters=None")
    assert "the learning rate of step" not in keep.stdout
    assert "  threads: 1 -> 2 (sums in another order)\n" in keep.stdout
    steps = records(tmp_path / "runs/longer")
    assert steps[11]["lr"] == pytest.approx(1e-4)
    (line,) = [line for line in raised.stdout.splitlines() if "the learning rate of step 12 is" in line]
    now, before = re.search(r"is ([0-9.e-]+), it was to be ([0-9.e-]+)", line).groups()
    assert float(now) == pytest.approx(steps[12]["lr"], rel=1e-2) and float(before) == 1e-4
    assert "  threads: 2 -> 1" in raised.stdout
    launches = json.loads((tmp_path / "runs/longer/run.json").read_text())["launches"]
    assert [launch["hardware"]["threads"] for launch in launches] == [1, 2, 1]
    assert [launch["omp_num_threads"] for launch in launches] == ["1", "2", "1"]


def test_keys_without_effect_are_reported(train):
    done = train("idle", "--max_iters=1", "--rope_theta=5", "--tracker_project=x", "--lr_schedule=constant",
                 "--min_lr=0")
    notes = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
    assert [n.split()[1] for n in notes] == ["--rope_theta", "--min_lr", "--tracker_project"]


def test_eval_only_trains_nothing(tmp_path, train):
    train("base", "--max_iters=5")
    before = (tmp_path / "runs/base/model.safetensors").read_bytes()
    done = train("base", "--resume=must", "--eval_only")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/base/model.safetensors").read_bytes() == before
    last = [json.loads(line) for line in (tmp_path / "runs/base/metrics.jsonl").read_text().splitlines()][-3:]
    assert [r["kind"] for r in last] == ["eval", "save", "eval_only"] and last[0]["val_loss"] == last[2]["val_loss"]


def test_evaluating_a_finished_run_on_other_data_changes_neither_its_results_nor_its_rank(tmp_path, train):
    train("base", "--max_iters=5", "--eval_interval=2")
    run_dir = tmp_path / "runs/base"
    record, ranked = json.loads((run_dir / "run.json").read_text()), load_run(run_dir)
    evals = records(run_dir, "eval")
    assert {r["val_data"]["digest"] for r in evals.values()} == {record["val_data"]["digest"]}
    assert record["val_data"]["tokens"] == 512
    done = train("base", "--resume=must", "--eval_only", "--eval_tokens=64")
    assert done.returncode == 0, done.stderr
    evaluation = records(run_dir, "eval_only")[5]
    assert evaluation["val_data"]["tokens"] == 64 and evaluation["val_loss"] != evals[5]["val_loss"]
    assert evaluation["val_data"]["digest"] != record["val_data"]["digest"]
    assert "--eval_only" in evaluation["launch"]["command"]
    assert {**json.loads((run_dir / "run.json").read_text()), "updated_at": 0} == {**record, "updated_at": 0}
    assert load_run(run_dir) == ranked


def test_what_an_abandoned_end_logged_is_not_read_after_a_roll_back(tmp_path, train):
    train("back", "--max_iters=6", "--eval_interval=3")
    run_dir = tmp_path / "runs/back"
    for path in (run_dir / "checkpoints").glob("step_00000006"):
        shutil.rmtree(path)
    log = run_dir / "metrics.jsonl"
    log.write_text("".join(json.dumps(r | {"val_loss": 0.5} if r["kind"] == "eval" and r["step"] == 6 else r) + "\n"
                           for r in map(json.loads, log.read_text().splitlines())))
    assert load_run(run_dir)["val_loss"] == 0.5
    assert train("back", "--resume=must", "--max_iters=5", "--lr_decay_iters=6").returncode == 0
    assert sorted(records(run_dir)) == [1, 2, 3, 4, 5] and sorted(records(run_dir, "eval")) == [3, 5]
    assert load_run(run_dir)["val_loss"] > 0.5
    first, second = json.loads((run_dir / "run.json").read_text())["launches"]
    assert first["step"] == 0 and second["step"] == 3
    assert "--max_iters=6" in first["command"] and "--max_iters=5" in second["command"]
    assert set(first) == {"step", "started_at", "command", "omp_num_threads", "git_commit", "versions", "hardware"}


def test_a_run_stops_early_without_improvement_and_continues_with_more_patience(tmp_path, train):
    flags = ["--max_iters=12", "--eval_interval=2", "--learning_rate=1e-12", "--min_lr=0", "--patience=2"]
    done = train("early", *flags)
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs/early"
    run = json.loads((run_dir / "run.json").read_text())
    assert run["criterion"] == {"metric": "val_loss", "more_is_better": False}
    assert run["status"] == "finished" and run["results"]["step"] == 6 and run["results"]["best_step"] == 2
    assert run["status_reason"].startswith("stopped early: val_loss has not improved for 2 evaluations (patience)")
    assert (run_dir / "model.safetensors").exists() and (run_dir / "checkpoints/step_00000006").is_dir()
    again = train("early", "--resume=must")
    assert again.returncode == 0 and "no steps left (raise patience to continue)" in again.stdout
    more = train("early", "--resume=must", "--patience=3")
    assert more.returncode == 0 and max(records(run_dir)) == 8


def test_a_new_run_never_overwrites_another(tmp_path, train):
    train("mine", "--max_iters=2")
    before = {p: p.read_bytes() for p in (tmp_path / "runs/mine").rglob("*") if p.is_file()}
    again = train("mine", "--max_iters=2")
    assert again.returncode == 2 and "exists" in again.stderr and again.stderr.count("\n") == 1
    assert before == {p: p.read_bytes() for p in (tmp_path / "runs/mine").rglob("*") if p.is_file()}


@pytest.mark.parametrize("key", ["--n_layer=3", "--arch_preset=gpt2", "--seed=5", "--batch_size=8", "--d_ff=7"])
def test_a_resumed_run_refuses_to_become_another(tmp_path, train, key):
    train("mine", "--max_iters=2")
    done = train("mine", "--max_iters=4", "--resume=must", key)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {key.split('=')[0]}: ")


def test_a_forced_resume_prints_and_records_what_changed(tmp_path, train):
    train("mine", "--max_iters=2", "--dropout=0.1")
    done = train("mine", "--max_iters=4", "--resume=must", "--dropout=0.2", "--seed=5", "--resume_force")
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines() if " -> " in line]
    assert sorted(lines) == ["dropout: 0.1 -> 0.2 (forced)", "max_iters: 2 -> 4", "seed: 1337 -> 5 (forced)"]
    assert train("mine", "--max_iters=6", "--resume=auto").returncode == 0
    run = json.loads((tmp_path / "runs/mine/run.json").read_text())
    first, second = run["resumes"]
    assert first == {"step": 2, "forced": ["dropout", "seed"], "world_size": 1,
                     "changed": {"seed": [1337, 5], "max_iters": [2, 4], "dropout": [0.1, 0.2]}}
    assert second == {"step": 4, "forced": [], "world_size": 1, "changed": {"max_iters": [4, 6]}}
    saved = json.loads((tmp_path / "runs/mine/checkpoints/step_00000006/state.json").read_text())
    assert saved["seed"] == 5 and saved["sequences"] == 6 * 4 and saved["config"]["dropout"] == 0.2


def test_auto_starts_then_continues_and_equals_an_uninterrupted_run(tmp_path, train):
    schedule = ["--lr_decay_iters=20", "--warmup_iters=2", "--eval_interval=5"]
    for steps in (10, 20):
        done = train("auto", f"--max_iters={steps}", "--resume=auto", "--checkpoint_async", *schedule)
        assert done.returncode == 0, done.stderr
        assert ("resumed from" in done.stdout) == (steps == 20)
    train("whole", "--max_iters=20", *schedule)
    assert curve(tmp_path / "runs/auto") == curve(tmp_path / "runs/whole")
    runs = tmp_path / "runs"
    assert (runs / "auto/model.safetensors").read_bytes() == (runs / "whole/model.safetensors").read_bytes()


def test_a_finished_run_that_is_resumed_exports_its_weights_again(tmp_path, train):
    train("done", "--max_iters=2")
    export = tmp_path / "runs/done/model.safetensors"
    before = export.read_bytes()
    export.unlink()
    done = train("done", "--resume=must")
    assert done.returncode == 0 and "no steps left (raise it to continue)" in done.stdout
    assert export.read_bytes() == before


def forget_saves(run_dir):
    """Turn a finished run into one that was killed before its first save."""
    shutil.rmtree(run_dir / "checkpoints")
    for name in ("model.safetensors", "config.json"):
        (run_dir / name).unlink()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(line for line in lines if '"kind": "save"' not in line))
    run = json.loads((run_dir / "run.json").read_text())
    del run["results"]["saved_step"]
    (run_dir / "run.json").write_text(json.dumps({**run, "status": "running"}))


def test_auto_starts_in_the_directory_of_a_run_killed_before_its_first_save(tmp_path, train):
    train("early", "--max_iters=4")
    expected = curve(tmp_path / "runs/early")
    forget_saves(tmp_path / "runs/early")
    (tmp_path / "runs/early/checkpoints/.step_00000002.tmp").mkdir(parents=True)
    before = (tmp_path / "runs/early/metrics.jsonl").read_bytes()
    done = train("early", "--resume=auto")
    assert done.returncode == 0 and "no checkpoint yet, starting at step 0" in done.stdout, done.stderr
    assert (tmp_path / "runs/early/metrics.jsonl").read_bytes().startswith(before)
    assert curve(tmp_path / "runs/early") == expected
    assert [p.name for p in (tmp_path / "runs/early/checkpoints").iterdir()] == ["step_00000004"]
    (tmp_path / "runs/bare").mkdir()
    assert train("bare", "--resume=auto", "--max_iters=4").returncode == 0
    assert curve(tmp_path / "runs/bare") == expected


def files_of(run_dir):
    return {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file() and p.name != ".lock"}


def test_auto_overwrites_nothing_where_no_checkpoint_is_usable(tmp_path, train):
    train("mine", "--max_iters=2")
    (tmp_path / "runs/mine/checkpoints/step_00000002/index.json").write_text("{}")
    before = files_of(tmp_path / "runs/mine")
    done = train("mine", "--resume=auto", "--max_iters=4")
    assert done.returncode == 3 and "no usable checkpoint" in done.stderr
    assert done.stderr.startswith("warning: skipped: ") and done.stderr.count("\n") == 2
    assert before == files_of(tmp_path / "runs/mine")


def close(path, mode=0):
    path.chmod(mode)


def unmount(path):
    shutil.rmtree(path)
    path.symlink_to("/no/such/disk")


@pytest.mark.grid(4)
@pytest.mark.parametrize("name, make, code, reason", [
    ("checkpoints", shutil.rmtree, 3, "has no checkpoint, but its log says that step 2 was saved"),
    ("checkpoints", unmount, 2, "checkpoints: is a link to /no/such/disk, which does not exist"),
    ("checkpoints", close, 2, "checkpoints: cannot be read: Permission denied"),
    ("checkpoints", lambda path: close(path, 0o444), 2, "manifest.json: cannot be read|step_00000002: cannot be read"),
    ("checkpoints/step_00000002", close, 2, "step_00000002.*: cannot be read: Permission denied"),
    ("checkpoints/step_00000002/state.json", close, 2, "state.json: cannot be read: Permission denied"),
    (".", close, 2, "runs/mine/.*: cannot be read"), ("run.json", close, 2, "run.json cannot be read"),
    ("run.json", Path.unlink, 2, "run.json is missing, though the folder has checkpoints or a log"),
    ("metrics.jsonl", close, 2, "cannot be written: Permission denied")])
def test_auto_never_starts_again_where_it_cannot_tell(tmp_path, train, name, make, code, reason):
    run_dir = tmp_path / "runs/mine"
    train("mine", "--max_iters=2")
    make(run_dir / name)
    done = train("mine", "--resume=auto", "--max_iters=4", unprivileged=True)
    assert done.returncode == code and re.search(reason, done.stderr), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 4  # two steps, an evaluation, a save


def test_auto_never_replaces_an_export_of_a_run_whose_records_say_nothing(tmp_path, train):
    run_dir = tmp_path / "runs/mine"
    train("mine", "--max_iters=2")
    shutil.rmtree(run_dir / "checkpoints")
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**record, "status": "running", "results": {}}))
    (run_dir / "metrics.jsonl").write_text("")
    done = train("mine", "--resume=auto", "--max_iters=4")
    assert done.returncode == 3 and done.stderr.startswith("error: runs/mine: has an export, model.safetensors, but no")


@pytest.mark.slow
def test_a_second_process_is_refused_in_one_line_and_changes_nothing(tmp_path, train):
    train("mine", "--max_iters=2")
    with FolderLock(tmp_path / "runs/mine", "trains in it"):
        before = files_of(tmp_path / "runs/mine")
        for flag in ("--resume=auto", "--resume=must", "--eval_only"):
            done = train("mine", "--resume=must", "--max_iters=4", flag)
            assert done.returncode == 2 and done.stderr.count("\n") == 1
            assert done.stderr.startswith(f"error: runs/mine: process {os.getpid()} on ")
        assert files_of(tmp_path / "runs/mine") == before
    assert train("mine", "--resume=must", "--max_iters=4").returncode == 0


def test_resume_without_a_usable_checkpoint_is_exit_3(tmp_path, train):
    train("mine", "--max_iters=4", "--eval_interval=2")
    checkpoints = sorted((tmp_path / "runs/mine/checkpoints").iterdir())
    damaged = checkpoints[-1] / "model-00000.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    done = train("mine", "--max_iters=6", "--resume=must")
    if len(checkpoints) > 1:  # the best, an earlier one, is used
        assert done.returncode == 0 and "warning: skipped: " in done.stderr
    for path in (tmp_path / "runs/mine/checkpoints").iterdir():
        (path / "manifest.json").write_text("{}")
    done = train("mine", "--max_iters=8", "--resume=must")
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("error: ") and "no usable checkpoint" in done.stderr


def test_nonfinite_stops_before_the_update_and_keeps_the_last_good_checkpoint(tmp_path, train):
    done = train("hot", "--max_iters=60", "--learning_rate=1e30", "--warmup_iters=20", "--grad_clip=0",
                 "--eval_interval=1", "--arch_preset=llama")
    assert done.returncode == 5
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: step ") and "lower learning_rate" in error
    run = json.loads((tmp_path / "runs/hot/run.json").read_text())
    assert run["status"] == "failed" and "NonFiniteError" in run["status_reason"]
    failed = int(error.split()[2].rstrip(":"))
    saved = sorted((tmp_path / "runs/hot/checkpoints").iterdir())
    assert saved[-1].name <= f"step_{failed - 1:08d}"
    assert max(records(tmp_path / "runs/hot")) == failed - 1


@pytest.mark.slow
def test_spikes_are_logged_and_skipped_and_their_averages_survive_a_resume(tmp_path, train):
    flags = ["--max_iters=140", "--eval_interval=120", "--spike_threshold=0.2", "--skip_spikes", "--learning_rate=1e-5"]
    whole = train("whole", *flags)
    assert whole.returncode == 0, whole.stderr
    spikes = records(tmp_path / "runs/whole", "spike")
    assert spikes and min(spikes) > 100 and all(r["skipped"] and r["excess"] > 0.2 for r in spikes.values())
    assert all(f"step {step}: the loss of " in whole.stderr for step in spikes)
    results = json.loads((tmp_path / "runs/whole/run.json").read_text())["results"]
    assert results["spikes"] == results["skipped_steps"] == len(spikes)
    assert train("cut", *flags, "--max_iters=120", "--lr_decay_iters=140", "--warmup_iters=14").returncode == 0
    assert train("cut", "--resume=must", "--max_iters=140").returncode == 0
    assert curve(tmp_path / "runs/whole") == curve(tmp_path / "runs/cut")  # the running mean continues too
    assert spikes.keys() == records(tmp_path / "runs/cut", "spike").keys()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
def test_a_signal_saves_and_the_resumed_run_equals_an_uninterrupted_one(tmp_path, train, data_dir, sent):
    flags = ["--max_iters=300", "--eval_interval=100", "--dropout=0.1"]
    assert train("whole", *flags).returncode == 0
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *TINY, f"--data_dir={data_dir}", "--run_name=cut",
                                *flags], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment())
    for line in process.stdout:
        if line.startswith("step     40/"):
            process.send_signal(sent)
            break
    rest = process.stdout.read()
    assert process.wait() == 0 and f"interrupted by {sent.name}" in rest
    run = json.loads((tmp_path / "runs/cut/run.json").read_text())
    assert run["status"] == "interrupted" and 40 <= run["results"]["step"] < 300
    assert train("cut", "--resume=must").returncode == 0
    assert curve(tmp_path / "runs/whole") == curve(tmp_path / "runs/cut")
    assert json.loads((tmp_path / "runs/cut/run.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_a_killed_run_leaves_a_readable_log_and_resumes(tmp_path, train, data_dir):
    flags = ["--max_iters=200", "--eval_interval=20"]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *TINY, f"--data_dir={data_dir}", "--run_name=cut",
                                *flags], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment())
    for line in process.stdout:
        if line.startswith("step     50/"):
            process.kill()
            break
    process.wait()
    process.stdout.close()
    with open(tmp_path / "runs/cut/metrics.jsonl", "ab") as f:  # what a kill in the middle of a write leaves
        f.write(b'{"kind": "step", "st')
    assert json.loads((tmp_path / "runs/cut/run.json").read_text())["status"] == "running"
    table = run_python(ROOT / "compare_architectures.py", "runs/cut", cwd=tmp_path)
    assert table.returncode == 0 and "cut" in table.stdout
    assert train("cut", "--resume=must").returncode == 0
    assert train("whole", *flags).returncode == 0
    text = (tmp_path / "runs/cut/metrics.jsonl").read_text()
    torn = '{"kind": "step", "st\n'
    assert text.count(torn) == 1
    (tmp_path / "runs/cut/metrics.jsonl").write_text(text.replace(torn, ""))
    assert curve(tmp_path / "runs/whole") == curve(tmp_path / "runs/cut")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, train, data_dir):
    flags = ["--max_iters=20", "--eval_interval=10", "--gradient_accumulation_steps=4"]
    assert train("one", *flags).returncode == 0
    done = run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py", *TINY,
                      f"--data_dir={data_dir}", "--run_name=two", *flags, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    one, two = (records(tmp_path / "runs" / n) for n in ("one", "two"))
    assert one.keys() == two.keys()
    for step in one:
        assert one[step]["loss"] == pytest.approx(two[step]["loss"], rel=1e-4)
    a, b = (records(tmp_path / "runs" / n, "eval") for n in ("one", "two"))
    assert a[20]["val_loss"] == pytest.approx(b[20]["val_loss"], rel=1e-4)
    assert json.loads((tmp_path / "runs/two/run.json").read_text())["hardware"]["world_size"] == 2


LATE = """
import os, time
if os.environ.get("RANK") == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
    time.sleep(3)  # the other rank finds in the store what this one's predecessor has left there
"""


@pytest.mark.long
def test_a_run_that_torchrun_restarts_continues_by_itself(tmp_path, train, data_dir):
    flags = ["--max_iters=300", "--eval_interval=25", "--gradient_accumulation_steps=2"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    rest = [ROOT / "train.py", *TINY, f"--data_dir={data_dir}", *flags]
    assert run_python(*command, *rest, "--run_name=whole", cwd=tmp_path).returncode == 0
    (tmp_path / "sitecustomize.py").write_text(LATE)
    process = subprocess.Popen([sys.executable, *command, "--max-restarts=2", *rest, "--run_name=cut"], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"))
    for line in process.stdout:
        if line.startswith("step     60/"):
            ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(ranks[1]), signal.SIGKILL)
            break
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "resumed from" in out and "lost rank 1" in err
    assert curve(tmp_path / "runs/whole") == curve(tmp_path / "runs/cut")
    assert json.loads((tmp_path / "runs/cut/run.json").read_text())["status"] == "finished"


@pytest.mark.long
def test_two_nodes_continue_after_a_worker_of_one_was_killed(tmp_path, data_dir):
    """Only that node counts a restart; the other only has to join again."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=2",
               "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", ROOT / "train.py", *TINY, "--use_fsdp=True",
               f"--data_dir={data_dir}", "--max_iters=300", "--eval_interval=25", "--gradient_accumulation_steps=2"]
    nodes = [subprocess.Popen(command, cwd=tmp_path, stdout=(tmp_path / f"{i}.out").open("w"), stderr=subprocess.STDOUT,
                              env=environment()) for i in range(2)]
    try:
        until = time.monotonic() + 120
        while not list(tmp_path.glob("runs/*/checkpoints/step_00000050")):
            assert time.monotonic() < until and nodes[1].poll() is None
            time.sleep(0.05)
        (worker,) = subprocess.run(["pgrep", "-P", str(nodes[1].pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(worker), signal.SIGKILL)
        assert [node.wait(120) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    assert "resumed from" in "".join((tmp_path / f"{i}.out").read_text() for i in range(2))
    (run,) = (tmp_path / "runs").iterdir()  # without a --run_name to be found by
    assert sorted(records(run)) == list(range(1, 301))


def test_help_lists_every_key_without_loading_torch():
    from configurator import KEYS

    started = time.perf_counter()
    done = run_python(ROOT / "train.py", "--help")
    assert done.returncode == 0 and time.perf_counter() - started < 60
    for key, field in KEYS.items():
        assert f"--{key}=" in done.stdout and field.metadata["help"].split()[0] in done.stdout


def test_train_is_one_page_and_its_loop_one_screen():
    source = (ROOT / "train.py").read_text()
    loop = source[source.index("for step in range("):source.index("if checkpoints.finished:\n            log.finished")]
    assert len(source.splitlines()) < 200 and len(loop.splitlines()) <= 55
    assert "class " not in source and "open(" not in source.replace("log.open", "").replace("checkpoints.open(", "")


def test_presets_in_config_are_the_presets():
    from configurator import load_config
    from model_config import PRESETS

    for name in PRESETS:
        assert load_config([f"config/arch_{name}.py"]).model.arch_preset == name
    for path in sorted((ROOT / "config").glob("*.py")):
        if path.name != "finetune_hf.py":  # it names a checkpoint on the hub: tests/huggingface/test_source.py
            load_config([str(path)])
