"""When a run saves, what it remembers of its best and last checkpoint, and what a resume takes over."""

import contextlib
import json
import re
from types import SimpleNamespace

import pytest
import torch
from checkpoint_helpers import largest_file

from blockgpt.checkpoints import checkpoint
from blockgpt.checkpoints import saver as saver_module
from blockgpt.checkpoints.manager import CheckpointManager, Progress
from blockgpt.errors import CheckpointError, SaveError
from blockgpt.training.criterion import Criterion
from blockgpt.training.launch import Runtime
from model_builder import build_model
from model_config import get_preset

SIZES = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=32)


class Log:
    def __init__(self):
        self.warnings, self.saves = [], []

    def warning(self, text):
        self.warnings.append(text)

    def saved(self, step, seconds):
        self.saves.append(step)


def make(run_dir, fingerprint="data", resuming=False, val_data="same", **keys):
    """(manager, log) of a small run in run_dir."""
    config = SimpleNamespace(**{"spike_threshold": 6.0, "resuming": resuming, "resume": "must", "resume_force": False,
                                "changed": {}, "forced": (), "keep_last": 2, "seed": 1,
                                "saves_in_background": lambda _: False, "eval_interval": 10,
                                "checkpoint_interval": None, "keep_best": False, "max_iters": 40, "patience": 0,
                                "init_from": None, "dropout": 0.0, "flat": lambda: {"seed": 1}, **keys})
    model = build_model(get_preset("llama", **SIZES, dropout=config.dropout))
    optimizer = torch.optim.AdamW(model.parameters())
    objective = SimpleNamespace(fingerprint=fingerprint, sequences_per_step=4, criterion=Criterion(),
                                val_data={"tokens": 8, "digest": val_data}, tokenizer={"name": "byte"})
    runtime = Runtime(0, 0, 1, torch.device("cpu"), torch.float32, False, False)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    manager = CheckpointManager(config, runtime, model, optimizer, scaler, objective)
    manager.restore(run_dir)
    log = Log()
    manager.open(run_dir, log)
    return manager, log


# Of 30 steps, each evaluation better than the one before: (keys, saved steps, the steps that remain).
INTERVALS = [
    ({}, [10, 20, 30], [20, 30]),
    ({"eval_interval": 5}, [5, 10, 15, 20, 25, 30], [25, 30]),
    ({"eval_interval": 1, "checkpoint_interval": 15}, [15, 30], [15, 30]),
    ({"eval_interval": 10, "checkpoint_interval": 15}, [15, 30], [15, 30]),
    ({"eval_interval": 10, "checkpoint_interval": 0}, [], []),
    ({"eval_interval": 10, "checkpoint_interval": 15, "keep_best": True}, [10, 15, 20, 30], [20, 30]),
    ({"eval_interval": 10, "checkpoint_interval": 0, "keep_best": True}, [10, 20, 30], [20, 30]),
    ({"eval_interval": 10, "checkpoint_interval": 4, "losses": {10: 3, 20: 1, 30: 2}},
     [4, 8, 12, 16, 20, 24, 28], [20, 24, 28]),
    ({"eval_interval": 2, "checkpoint_interval": 6, "losses": {2: 1, 12: 2}}, [6, 12, 18, 24, 30], [12, 24, 30]),
    ({"eval_interval": 2, "checkpoint_interval": 6, "keep_best": True, "losses": {2: 1, 12: 2}},
     [2, 6, 12, 18, 24, 30], [2, 24, 30]),
]


@pytest.mark.parametrize("keys, saved, remaining", INTERVALS, ids=str)
def test_the_saved_steps_and_the_remaining_ones_follow_the_intervals(tmp_path, keys, saved, remaining):
    losses = keys.pop("losses", None)
    manager, log = make(tmp_path, **keys)
    for step in range(1, 31):
        manager.progress.step, is_best = step, False
        if step % manager.config.eval_interval == 0:
            is_best = manager.progress.is_best({"val_loss": 9 - step / 10 if losses is None else losses.get(step, 4)})
        if manager.is_due(is_best):
            manager.save()
    assert log.saves == saved
    assert [step for step, _ in reversed(checkpoint.list_checkpoints(tmp_path))] == remaining
    if saved:  # the best that is there, which a resumed run knows too
        best = min(saved, key=lambda step: ((losses or {}).get(step, 4 if losses else 9 - step / 10)
                                            if step % manager.config.eval_interval == 0 else 99, step))
        assert checkpoint.find_best(tmp_path).name == f"step_{best:08d}"
        again, _ = make(tmp_path, resuming=True, **keys)
        assert again.progress.best_saved == manager.progress.best_saved
        assert again.progress.best_saved is None or again.progress.best_saved["step"] == best


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_best_checkpoint_that_could_not_be_saved_costs_no_older_one(tmp_path, asynchronous):
    manager, log = make(tmp_path, saves_in_background=lambda _: asynchronous, checkpoint_interval=1)
    for step, loss in enumerate((2.0, 1.0, 4.0, 3.0, 3.5), 1):
        manager.progress.step = step
        manager.progress.is_best({"val_loss": loss})
        with largest_file(1000) if step == 2 else contextlib.nullcontext():
            manager.save()
            manager.wait()
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [5, 4, 1] and log.saves == [1, 3, 4, 5]
    assert checkpoint.find_best(tmp_path).name == "step_00000001" and manager.progress.best["step"] == 2


def test_the_best_evaluation_has_the_lowest_loss_and_nan_is_never_best():
    progress = Progress()
    found = []
    for progress.step, loss in enumerate((3.0, 2.0, float("nan"), 2.5, 2.0, 1.0, float("inf")), 1):
        found.append(progress.is_best({"val_loss": loss, "val_bpb": loss / 2}))
    assert found == [True, True, False, False, False, True, False]
    assert progress.best == {"step": 6, "val_loss": 1.0, "val_bpb": 0.5}
    assert not Progress().is_best({"val_loss": float("nan")})


def test_with_another_criterion_the_best_evaluation_has_the_highest_value():
    progress = Progress(criterion=Criterion("accuracy", more_is_better=True))
    found = [progress.is_best({"val_loss": 1.0, "accuracy": value}) for value in (0.2, float("nan"), 0.1, 0.3)]
    assert found == [True, False, False, True] and progress.best["accuracy"] == 0.3


def test_a_run_without_improvement_for_patience_evaluations_is_finished_and_exported(tmp_path):
    manager, _ = make(tmp_path, patience=2)
    finished = []
    for manager.progress.step, loss in enumerate((3.0, 3.5, 2.0, 2.0, float("nan")), 1):
        manager.progress.is_best({"val_loss": loss})
        finished.append(manager.finished)
    assert finished == [False, False, False, False, True]
    assert manager.stopped_early == ("val_loss has not improved for 2 evaluations (patience); the best is 2.0000 at "
                                     "step 3")
    manager.save(final=True)
    assert checkpoint.read_export(tmp_path)[1]["step"] == 5
    assert make(tmp_path, resuming=True, patience=2)[0].finished  # the count is part of the checkpoint
    assert not make(tmp_path, resuming=True, patience=3)[0].finished
    ended, _ = make(tmp_path, resuming=True, patience=2, max_iters=5)
    assert ended.finished and ended.stopped_early is None
    diverged, _ = make(tmp_path / "nan", patience=1)
    diverged.progress.is_best({"val_loss": float("nan")})
    assert diverged.stopped_early.endswith("it was never finite")


def test_a_resumed_manager_has_the_progress_and_the_spike_averages_of_the_saved_one(tmp_path):
    manager, log = make(tmp_path)
    manager.progress.step, manager.progress.tokens, manager.progress.skipped = 7, 700, 2
    manager.progress.is_best({"val_loss": 1.5})
    manager.spikes.z_score(3.0)
    manager.save()
    assert log.saves == [7] and manager.last_saved == 7
    again, _ = make(tmp_path, resuming=True, changed={"dropout": [0.1, 0.2]}, forced=("dropout",))
    assert again.progress == manager.progress and again.spikes.state == manager.spikes.state
    assert again.last_saved == 7 and again.resumption.path.name == "step_00000007"
    assert again.resumption.changed == {"dropout": [0.1, 0.2]} and again.resumption.forced == ("dropout",)
    for p, q in zip(manager.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_resume_on_other_data_is_refused_unless_forced_and_recorded_if_forced(tmp_path):
    manager, _ = make(tmp_path)
    manager.save()
    with pytest.raises(CheckpointError, match="other data"):
        make(tmp_path, fingerprint="other", resuming=True)
    forced, _ = make(tmp_path, fingerprint="other", resuming=True, resume_force=True)
    assert forced.resumption.changed["data"] == ["data", "other"] and forced.resumption.forced == ("data",)


@pytest.mark.parametrize("ended", [True, False])
def test_what_a_forced_resume_saves_describes_what_the_run_now_is(tmp_path, ended):
    manager, _ = make(tmp_path, max_iters=4)
    manager.progress.step = 4
    manager.save(final=True)
    forced, _ = make(tmp_path, fingerprint="other", resuming=True, resume_force=True, max_iters=4, dropout=0.5)
    assert forced.model.config.dropout == 0.5
    if ended:  # at the step where it began
        forced.save(final=True)
        assert checkpoint.read_export(tmp_path)[1]["model"]["dropout"] == 0.5
        state = checkpoint.read_state(checkpoint.find_newest(tmp_path))
        assert state["data"] == "other" and state["description"] == forced.description
    else:  # killed: it had recorded in run.json what it is
        (tmp_path / "run.json").write_text(json.dumps({"data": {"fingerprint": "other"}}))
    again, _ = make(tmp_path, fingerprint="other", resuming=True, dropout=0.5)
    assert again.resumption.forced == () and again.resumption.changed == {}
    with pytest.raises(CheckpointError, match="other data"):
        make(tmp_path, fingerprint="a third", resuming=True)


def test_without_a_checkpoint_auto_starts_at_zero_and_must_is_an_error(tmp_path):
    for log in ({}, {"run.json": "{}"}, {"run.json": '{"status": "failed", "results": {"step": 7}}',
                                         "metrics.jsonl": '{"kind": "step", "step": 7}\n{"kind": "sa'}):
        for name, text in log.items():
            (tmp_path / name).write_text(text)
        auto, _ = make(tmp_path, resuming=True, resume="auto")
        assert auto.progress == Progress() and auto.resumption.path is None and auto.last_saved is None
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        make(tmp_path, resuming=True)


@pytest.mark.parametrize("name, text, step", [
    ("run.json", '{"status": "failed", "results": {"step": 7, "saved_step": 5}}', 5),
    ("run.json", '{"status": "finished", "results": {"step": 7}}', 7),
    ("run.json", '{"status": "interrupted", "results": {"step": 7}}', 7),
    ("metrics.jsonl", '{"kind": "save", "step": 5, "seconds": 1}\n{"kind": "step", "step": 7}\n', 5)])
def test_auto_does_not_start_again_where_the_log_says_that_a_checkpoint_was_saved(tmp_path, name, text, step):
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"has no checkpoint, but its log says that step {step} was saved"):
        make(tmp_path, resuming=True, resume="auto")


def test_a_failed_save_is_a_warning_and_a_failed_final_one_an_error_that_names_the_last_good_one(tmp_path, monkeypatch):
    manager, log = make(tmp_path)
    manager.progress.step = 3
    manager.save()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manager.saver, "save", full)
    manager.progress.step = 4
    manager.save()
    assert len(log.warnings) == 1 and "step 4 failed" in log.warnings[0] and manager.last_saved == 3
    with pytest.raises(SaveError, match=r"step 4 failed: .*last good checkpoint: step 3"):
        manager.save(final=True)


def test_a_background_save_counts_once_it_is_polled(tmp_path):
    manager, log = make(tmp_path, saves_in_background=lambda _: True)
    manager.progress.step = 5
    manager.save()
    assert log.saves == [] and manager.last_saved is None
    manager.wait()
    assert log.saves == [5] and manager.last_saved == 5 and not manager.save_finished
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [5]


def broken(*_):
    raise ZeroDivisionError("a bug")


def test_the_last_background_save_is_reported_however_the_run_ends(tmp_path, monkeypatch):
    for i, (bug, error, warnings, raised) in enumerate([
            (False, None, [], None), (True, None, [], ZeroDivisionError), (False, ValueError, [], ValueError),
            (True, ValueError, ["the last checkpoint failed: ZeroDivisionError: a bug"], ValueError)]):
        (tmp_path / str(i)).mkdir()
        manager, log = make(tmp_path / str(i), saves_in_background=lambda _: True)
        manager.progress.step = 5
        with monkeypatch.context() as patch:
            if bug:
                patch.setattr(saver_module, "commit_checkpoint", broken)
            with pytest.raises(raised) if raised else contextlib.nullcontext():  # noqa: SIM117
                with manager:
                    manager.save()
                    if error:
                        raise error
        assert log.warnings == warnings and log.saves == ([] if bug else [5]) and manager.saver.thread is None


def test_a_bug_in_a_background_save_is_raised_before_the_next_save_and_the_final_one(tmp_path, monkeypatch):
    for final in (False, True):
        manager, _ = make(tmp_path, saves_in_background=lambda _: True)
        with monkeypatch.context() as patch:
            patch.setattr(saver_module, "commit_checkpoint", broken)
            manager.save()
            manager.saver.join()
        with pytest.raises(ZeroDivisionError):
            manager.save(final)


def test_a_last_background_save_that_failed_is_a_warning(tmp_path):
    manager, log = make(tmp_path, saves_in_background=lambda _: True)
    manager.progress.step = 5
    with largest_file(1000), manager:
        manager.save()
    assert len(log.warnings) == 1 and "the checkpoint of step 5 failed: " in log.warnings[0]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_background_save_without_memory_is_a_failed_save_and_says_what_needs_less(tmp_path, monkeypatch, error):
    def out_of_memory(*_, **__):
        raise error

    manager, log = make(tmp_path, saves_in_background=lambda _: True)
    manager.progress.step = 5
    monkeypatch.setattr(saver_module, "commit_checkpoint", out_of_memory)
    with manager:
        manager.save()
    assert len(log.warnings) == 1 and re.search(
        r"the checkpoint of step 5 failed: out of memory \(--checkpoint_async=False ", log.warnings[0])


def test_the_last_save_of_training_exports_the_weights(tmp_path):
    manager, _ = make(tmp_path, max_iters=2)
    manager.progress.step = 1
    manager.save(final=True)
    assert not (tmp_path / "model.safetensors").exists()  # stopped by a signal: there is more to train
    manager.progress.step = 2
    manager.save(final=True)
    tensors, description = checkpoint.read_export(tmp_path)
    assert description["step"] == 2 and tensors.keys() == dict(manager.model.named_parameters()).keys()


def test_the_best_of_evaluations_on_other_data_is_forgotten(tmp_path):
    manager, _ = make(tmp_path)
    manager.progress.step = 10
    manager.progress.is_best({"val_loss": 1.0})
    manager.progress.is_best({"val_loss": 2.0})
    manager.save(final=True)
    same, _ = make(tmp_path, resuming=True)
    assert same.progress.best["val_loss"] == 1.0 and same.progress.evaluations_since_best == 1
    other, _ = make(tmp_path, resuming=True, val_data="other")
    assert other.progress.best is None and other.progress.evaluations_since_best == 0
