"""When a run saves, what it remembers of its best and last checkpoint, and what a resume takes over."""

from types import SimpleNamespace

import pytest
import torch

from blockgpt.checkpoints import checkpoint
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
                                "changed": {}, "forced": (), "keep_last": 2, "checkpoint_async": False, "seed": 1,
                                "eval_interval": 10, "checkpoint_interval": None, "max_iters": 40, "patience": 0,
                                "init_from": None, "flat": lambda: {"seed": 1}, **keys})
    model = build_model(get_preset("llama", **SIZES))
    optimizer = torch.optim.AdamW(model.parameters())
    objective = SimpleNamespace(fingerprint=fingerprint, sequences_per_step=4, criterion=Criterion(),
                                val_data={"tokens": 8, "digest": val_data})
    runtime = Runtime(0, 0, 1, torch.device("cpu"), torch.float32, False, False)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    manager = CheckpointManager(config, runtime, model, optimizer, scaler, objective,
                                {"model": model.config.flat(), "tokenizer": {"name": "byte"}})
    manager.restore(run_dir)
    log = Log()
    manager.open(run_dir, log)
    return manager, log


@pytest.mark.parametrize("keys, best, expected", [
    ({}, (), [10, 20, 30]), ({"checkpoint_interval": 15}, (), [15, 30]), ({"checkpoint_interval": 0}, (10,), []),
    ({"checkpoint_interval": 15}, (7, 20), [7, 15, 20, 30]),
])
def test_the_steps_that_are_saved_follow_the_interval_and_the_best(tmp_path, keys, best, expected):
    manager, _ = make(tmp_path, **keys)
    due = []
    for manager.progress.step in range(1, 31):
        if manager.is_due(is_best=manager.progress.step in best):
            due.append(manager.progress.step)
    assert due == expected


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


def test_without_a_checkpoint_auto_starts_at_zero_and_must_is_an_error(tmp_path):
    auto, _ = make(tmp_path, resuming=True, resume="auto")
    assert auto.progress == Progress() and auto.resumption.path is None and auto.last_saved is None
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        make(tmp_path, resuming=True)


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
    manager, log = make(tmp_path, checkpoint_async=True)
    manager.progress.step = 5
    manager.save()
    assert log.saves == [] and manager.last_saved is None
    manager.wait()
    assert log.saves == [5] and manager.last_saved == 5 and not manager.save_finished
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [5]


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
