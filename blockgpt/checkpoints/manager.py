"""The checkpoints of one run, for the training loop: resume from the newest, save, track the best and the last.

train.py handles no files: it calls `CheckpointManager.restore` once before the loop, and `save` after the steps for
which `is_due` is true. Files and formats belong to checkpoint.py, saver.py and files.py.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from blockgpt.checkpoints import checkpoint
from blockgpt.checkpoints.initial_weights import load_initial_weights
from blockgpt.checkpoints.resume import last_recorded_save, recorded_data
from blockgpt.checkpoints.saver import CheckpointSaver
from blockgpt.data.tokenizer import describe_tokenizer
from blockgpt.errors import CheckpointError, PeerLostError, SaveError, first_line
from blockgpt.files import exists
from blockgpt.training.criterion import Criterion
from blockgpt.training.diagnostics import LossSpikeDetector
from blockgpt.training.launch import Runtime
from blockgpt.training.objectives import Objective


class CheckpointLog(Protocol):
    """What a `CheckpointManager` needs of the run's log."""

    def warning(self, text: str) -> None: ...
    def saved(self, step: int, seconds: float | None) -> None: ...


@dataclass
class Progress:
    """Progress of a run: what changes from step to step, in addition to weights and optimizer state."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # that these steps were trained on, over all processes
    skipped: int = 0  # updates left out because of a loss spike
    best: dict[str, Any] | None = None  # {"step", metrics} of the best evaluation by the criterion
    evaluated: dict[str, Any] | None = None  # of the last one, if it was finite
    best_saved: dict[str, Any] | None = None  # of the best one at whose step there is a checkpoint
    evaluations_since_best: int = 0
    criterion: Criterion = field(default_factory=Criterion)

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Whether an evaluation of the current step is the best so far; it is then remembered."""
        evaluation = {"step": self.step, **metrics}
        self.evaluated = evaluation if all(map(math.isfinite, metrics.values())) else None
        if not self.is_better(evaluation, self.best):
            self.evaluations_since_best += 1
            return False
        self.best, self.evaluations_since_best = evaluation, 0
        return True

    def is_better(self, evaluation: dict[str, Any], best: dict[str, Any] | None) -> bool:
        """Whether an evaluation is better than `best` by the criterion."""
        metric = self.criterion.metric
        return self.criterion.is_better(evaluation[metric], None if best is None else best[metric])


@dataclass
class Resumption:
    """Where a resumed run continues.

    Attributes:
        path: the checkpoint; None if the run ended before its first save.
        changed: {key: [before, now]} of the config, the data and the number of processes.
        forced: the keys of `changed` that only resume_force allows.
    """

    path: Path | None
    changed: dict[str, list[Any]] = field(default_factory=dict)
    forced: tuple[str, ...] = ()


class CheckpointManager:
    """Resumes and saves one run, all ranks together. A context manager: at its end no save is under way.

    Attributes:
        progress: the run's `Progress`, updated by the training loop.
        spikes: the `LossSpikeDetector`, whose averages are part of a checkpoint.
        resumption: how the run was resumed; None for a new run.
        initial_weights: where init_from's weights came from, {path, step, sha256, tokenizer}; None without init_from.
        last_saved: step of the newest checkpoint that is known to be good, or None.
    """

    def __init__(self, config: Any, runtime: Runtime, model: Any, optimizer: torch.optim.Optimizer,
                 scaler: torch.amp.GradScaler, objective: Objective) -> None:
        """model: a GPT, before `parallel.wrap`."""
        self.config, self.runtime, self.objective = config, runtime, objective
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.progress, self.spikes = Progress(criterion=objective.criterion), LossSpikeDetector(config.spike_threshold)
        self.resumption: Resumption | None = None
        self.initial_weights: dict[str, Any] | None = None
        self.last_saved: int | None = None
        self.replaced_best: dict[str, Any] | None = None  # best_saved before the save that is under way

    @property
    def description(self) -> dict[str, Any]:
        """What sample.py needs to rebuild the model: {"model": its config as built, "tokenizer": its meta}."""
        return {"model": self.model.infer_config().flat(), "tokenizer": self.objective.tokenizer}

    def restore(self, run_dir: Path) -> Progress:
        """Fill model, optimizer and loss scaler from the run's newest usable checkpoint, if the run is resumed.

        A run that never had one gets the weights that init_from names.

        Raises:
            CheckpointError: there is no usable checkpoint, or it was made on other data.
        """
        config, runtime = self.config, self.runtime
        if not config.resuming:
            return self._begin()
        path = checkpoint.find_newest(run_dir, runtime, or_none=config.resume == "auto")
        self.resumption = Resumption(path, dict(config.changed), config.forced)
        if path is None:
            if saved := runtime.on_rank_zero(lambda: last_recorded_save(run_dir)):
                raise CheckpointError(f"{run_dir}: has no checkpoint, but its log says that step {saved} was saved "
                                      f"(restore {run_dir}/checkpoints, or start a new run with another --run_name)")
            if runtime.on_rank_zero(lambda: exists(run_dir / "model.safetensors")):
                raise CheckpointError(f"{run_dir}: has an export, model.safetensors, but no checkpoint (restore "
                                      f"{run_dir}/checkpoints, or start a new run with another --run_name)")
            return self._begin()
        state = checkpoint.load(path, self.model, self.optimizer, runtime)
        changed = self.resumption.changed
        fingerprint = self.objective.fingerprint
        # A forced resume that ended before its first save has recorded the other data in run.json alone.
        if state["data"] != fingerprint and runtime.on_rank_zero(lambda: recorded_data(run_dir)) != fingerprint:
            if not config.resume_force:
                raise CheckpointError(f"{path}: was made on other data than its dataset contains now (--resume_force "
                                      "continues on the new data)")
            changed["data"] = [state["data"], fingerprint]
            self.resumption.forced += ("data",)
        if state["world_size"] != runtime.world_size:
            changed["world_size"] = [state["world_size"], runtime.world_size]
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(
            state["step"], state["tokens"], state["skipped"], state.get("best_evaluation", state["best"]),
            state.get("evaluated"), state["best"], state.get("evaluations_since_best", 0), self.objective.criterion)
        self.spikes = LossSpikeDetector(config.spike_threshold, state["spikes"])
        self.initial_weights = state.get("initial_weights")
        if state.get("val_data", self.objective.val_data) != self.objective.val_data:
            # They were measured on other data.
            self.progress.best = self.progress.best_saved = self.progress.evaluated = None
            self.progress.evaluations_since_best = 0
        self.last_saved = self.progress.step
        return self.progress

    def _begin(self) -> Progress:
        if self.config.init_from is not None:
            self.initial_weights = load_initial_weights(self.config.init_from, self.model, self.runtime)
        return self.progress

    def open(self, run_dir: Path, log: CheckpointLog) -> "CheckpointManager":
        """Prepare for saves into `run_dir`; removes what killed saves left there. Called once, by all ranks.

        Returns:
            This manager, as the context manager of the saves.
        """
        self.run_dir, self.log = run_dir, log
        before, now = (self.initial_weights or {}).get("tokenizer"), self.description["tokenizer"]
        if before and before != now and not self.last_saved:
            log.warning(f"the weights were trained with another tokenizer ({describe_tokenizer(before)}) than this "
                        f"data's ({describe_tokenizer(now)})")
        self.runtime.on_rank_zero(lambda: checkpoint.clean(run_dir))
        self.saver = CheckpointSaver(run_dir, self.runtime, self.config.keep_last,
                                     self.config.saves_in_background(self.runtime.device.type))
        return self

    @property
    def stopped_early(self) -> str | None:
        """Why the run is finished although steps are left; None if it is not."""
        progress, patience, metric = self.progress, self.config.patience, self.objective.criterion.metric
        if not patience or progress.evaluations_since_best < patience or progress.step >= self.config.max_iters:
            return None
        best = (f"the best is {progress.best[metric]:.4f} at step {progress.best['step']}" if progress.best
                else "it was never finite")
        return f"{metric} has not improved for {progress.evaluations_since_best} evaluations (patience); {best}"

    @property
    def finished(self) -> bool:
        """Whether no step is left: max_iters is reached, or the run has stopped early."""
        return self.progress.step >= self.config.max_iters or self.stopped_early is not None

    def is_due(self, is_best: bool) -> bool:
        """Whether to save after the current step. The last step is saved in any case."""
        interval = (self.config.eval_interval if self.config.checkpoint_interval is None
                    else self.config.checkpoint_interval)
        return bool(interval and self.progress.step % interval == 0) or (self.config.keep_best and is_best)

    def save(self, final: bool = False) -> None:
        """Write a checkpoint; when the run is finished the weights alone, too. A failure is a warning.

        Args:
            final: no step follows. Background saves are waited for, and a failure raises.

        Raises:
            SaveError: a final save failed.
        """
        step, started = self.progress.step, time.perf_counter()
        self.wait()  # its outcome decides which checkpoint is the best
        evaluated, self.replaced_best = self.progress.evaluated, self.progress.best_saved
        if evaluated and evaluated["step"] == step and self.progress.is_better(evaluated, self.progress.best_saved):
            self.progress.best_saved = evaluated
        try:
            path = self.saver.save(self.model, self.optimizer, self._state(), wait=final)
            if path:
                self._saved(step, None, time.perf_counter() - started)
            if final and self.finished:
                assert path is not None  # a save that is waited for returns its directory
                self.runtime.activity("export")
                checkpoint.export(self.run_dir, path, {**self.description, "step": step}, self.runtime)
        except OSError as error:
            if final:
                last = "none" if self.last_saved is None else f"step {self.last_saved}"
                raise SaveError(f"{self.run_dir}: the checkpoint of step {step} failed: {error} (last good "
                                f"checkpoint: {last})") from None
            self._saved(step, str(error))

    @property
    def save_finished(self) -> bool:
        """Whether a background save of this rank has finished since the last `poll`."""
        return self.saver.ended

    def poll(self) -> None:
        """Report the background save that has finished on all ranks; raise the programming error that ended it."""
        if outcome := self.saver.poll():
            self._saved(*outcome)

    def wait(self) -> None:
        """`poll`, after a background save that is under way has ended."""
        self.saver.join()
        self.poll()

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        """Report the last background save too. Ctrl-C and a lost process do not wait for it."""
        if isinstance(error, PeerLostError) or (error is not None and not isinstance(error, Exception)):
            return
        try:
            self.wait()
        except Exception as save_error:
            if error is None:
                raise
            self.log.warning(f"the last checkpoint failed: {type(save_error).__name__}: {first_line(save_error)}")

    def _saved(self, step: int, problem: str | None, seconds: float | None = None) -> None:
        if problem:
            if self.progress.best_saved is not None and self.progress.best_saved["step"] == step:
                self.progress.best_saved = self.replaced_best
            self.log.warning(f"the checkpoint of step {step} failed: {problem}; training continues")
        else:
            self.last_saved = step
            self.log.saved(step, seconds)

    def _state(self) -> dict[str, Any]:
        """state.json's content: see checkpoint.py."""
        progress = self.progress
        return {"step": progress.step, "tokens": progress.tokens, "best": progress.best_saved,
                "best_evaluation": progress.best, "evaluated": progress.evaluated, "skipped": progress.skipped,
                "evaluations_since_best": progress.evaluations_since_best, "spikes": self.spikes.state,
                "scaler": self.scaler.state_dict() or None, "data": self.objective.fingerprint,
                "description": self.description, "config": self.config.flat(), "seed": self.config.seed,
                "initial_weights": self.initial_weights, "val_data": self.objective.val_data,
                "sequences": progress.step * self.objective.sequences_per_step}
