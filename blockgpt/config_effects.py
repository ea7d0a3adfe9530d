"""Keys that are set and do nothing, or do something else than they say: the notes at the start of a run. No torch.

`SITUATIONS` is the one place for keys without effect: each row has some keys, when they do nothing, and why. Every key
is in it, or in `ALWAYS_HAS_EFFECT` of tests/test_config_effects.py, or is one of the model (`ModelConfig.unused_keys`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

SPIKE_FREE_STEPS = 100  # `LossSpikeDetector.HORIZON`; importing it imports torch


class Start(NamedTuple):
    """A process that begins to train.

    Attributes:
        config: the `Config` of the run.
        device: the type of its device, such as cpu; None: not known yet.
        dtype: of the matrix products; None: not known yet.
        step: how many steps of the run are done.
    """

    config: Any
    device: str | None = None
    dtype: str | None = None
    step: int = 0

    def never(self, interval: int) -> bool:
        """Whether no multiple of `interval` is among the steps that are left."""
        left = self.step < self.config.max_iters
        return interval > 0 and left and (self.step // interval + 1) * interval > self.config.max_iters

    @property
    def save_interval(self) -> int:
        """Steps between checkpoints; 0: only at the end."""
        interval = self.config.checkpoint_interval
        return self.config.eval_interval if interval is None else interval

    @property
    def saves_once(self) -> bool:
        """Whether a new run has one checkpoint, at its end."""
        c = self.config
        best = c.keep_best and c.eval_interval < c.max_iters
        return not c.resuming and not best and not 0 < self.save_interval < c.max_iters

    @property
    def saves_each_evaluation(self) -> bool:
        c = self.config
        return c.eval_interval >= c.max_iters or (self.save_interval > 0 and c.eval_interval % self.save_interval == 0)

    @property
    def patience_is_out_of_reach(self) -> bool:
        """The first evaluation is the best so far, and a run stops early before its last step only."""
        c = self.config
        return not c.resuming and (c.patience + 1) * c.eval_interval >= c.max_iters


class Situation(NamedTuple):
    """Some keys, when they have no effect, and why; the reason may refer to the `Start` s."""

    keys: str
    applies: Callable[[Start], bool]
    reason: str


OPTIMIZATION = ("learning_rate lr_schedule warmup_iters lr_decay_iters min_lr weight_decay beta1 beta2 grad_clip "
                "skip_spikes spike_threshold ")
SAVES = "patience checkpoint_interval keep_last keep_best checkpoint_async save_timeout "
LOGS = "eval_interval log_interval gradient_log_interval profile memory_snapshot "

SITUATIONS = (  # the first row that applies gives the reason
    Situation("dry_run_gpus dry_run_gpu dry_run_mfu", lambda s: not s.config.dry_run, "dry_run is off"),
    Situation(f"{OPTIMIZATION}{SAVES}{LOGS} eval_tokens rank_timeout join_timeout compile tracker tracker_project",
              lambda s: s.config.dry_run, "dry_run does not train"),
    Situation(f"{OPTIMIZATION}{SAVES}{LOGS} max_iters max_epochs packing gradient_accumulation_steps mfu_peak dropout "
              "use_zero1 activation_checkpointing", lambda s: s.config.eval_only, "eval_only does not train"),
    Situation("device", lambda s: s.config.dry_run and s.config.dry_run_gpu is not None,
              "dry_run_gpu names the device"),
    # processes
    Situation("fsdp_reshard_after_forward fsdp_cpu_offload dp_replicate", lambda s: not s.config.use_fsdp,
              "use_fsdp is off"),
    Situation("rank_timeout save_timeout join_timeout", lambda s: s.config.processes == 1,
              "a single process has no peers"),
    Situation("use_zero1", lambda s: s.config.processes == 1, "a single process has nobody to share its state with"),
    Situation("fsdp_reshard_after_forward", lambda s: s.config.data_processes == 1,
              "a single data-parallel process has all weights"),
    # devices
    Situation("fsdp_cpu_offload", lambda s: s.device in ("cpu", "mps"), "device is {s.device}"),
    Situation("tf32", lambda s: s.dtype in ("bfloat16", "float16"), "dtype is {s.dtype}"),
    Situation("tf32", lambda s: s.device in ("cpu", "mps"), "device is {s.device}"),
    Situation("memory_snapshot", lambda s: s.device in ("cpu", "mps"),
              "device is {s.device}, and only CUDA's allocator has a history"),
    Situation("mfu_peak", lambda s: s.device in ("cpu", "mps") and isinstance(s.config.mfu_peak, str),
              "device is {s.device}, whose peak is neither dense nor sparse"),
    # the schedule of the learning rate
    Situation("min_lr lr_decay_iters", lambda s: s.config.lr_schedule == "constant", "lr_schedule is constant"),
    Situation("lr_schedule min_lr lr_decay_iters", lambda s: (s.config.warmup_iters or 0) >= s.config.max_iters,
              "the run ends during the warm-up"),
    Situation("warmup_iters", lambda s: s.config.lr_schedule == "constant"
              and s.config.warmup_iters is not None and s.step >= max(1, s.config.warmup_iters),
              "the warm-up is over at step {s.step}"),
    # steps
    Situation("eval_interval", lambda s: s.config.eval_interval > s.config.max_iters,
              "max_iters is {s.config.max_iters}, and the last step always has an evaluation"),
    Situation("checkpoint_interval", lambda s: s.save_interval > s.config.max_iters,
              "max_iters is {s.config.max_iters}, and the last step is always saved"),
    Situation("gradient_log_interval", lambda s: s.never(s.config.gradient_log_interval),
              "none of its steps is left, max_iters is {s.config.max_iters}"),
    Situation("log_interval", lambda s: s.config.log_interval > s.config.max_iters,
              "max_iters is {s.config.max_iters}, and the first and the last step are always logged"),
    Situation("profile", lambda s: any(s.config.profiled_steps()) and s.config.profiled_steps()[-1] <= s.step,
              "the run continues after step {s.step}"),
    Situation("patience", lambda s: s.config.patience > 0 and s.patience_is_out_of_reach,
              "the run has too few evaluations, one every {s.config.eval_interval} of {s.config.max_iters} steps"),
    Situation("skip_spikes spike_threshold", lambda s: s.config.max_iters <= SPIKE_FREE_STEPS,
              f"the first {SPIKE_FREE_STEPS} steps have no spikes"),
    # saves
    Situation("keep_best", lambda s: s.saves_each_evaluation, "every evaluation is followed by a save"),
    Situation("checkpoint_async keep_last", lambda s: s.saves_once, "the run has one checkpoint, at its end"),
    # other keys
    Situation("init_std zero_init_residual", lambda s: s.config.init_from is not None, "init_from gives the weights"),
    Situation("resume_force", lambda s: not s.config.resuming, "nothing is resumed"),
    Situation("tracker_project", lambda s: not {"wandb", "trackio"} & set(s.config.tracker.replace(" ", "").split(",")),
              "tracker is neither wandb nor trackio"),
)


def keys_without_effect(start: Start) -> dict[str, str]:
    """{key: reason} of the explicit keys that change nothing."""
    unused = dict(start.config.model.unused_keys())
    for situation in SITUATIONS:
        names = [name for name in situation.keys.split() if name in start.config.explicit and name not in unused]
        if names and situation.applies(start):
            unused |= dict.fromkeys(names, situation.reason.format(s=start))
    return {name: reason for name, reason in unused.items() if name in start.config.explicit}


def notes(start: Start) -> list[str]:
    """What a user may not expect of the keys that are set, one line each."""
    config, lines = start.config, list(start.config.remarks)
    trains = not config.dry_run and not config.eval_only
    warmup = config.warmup_iters or 0
    if trains and warmup >= config.max_iters:
        lines.append(f"warmup_iters={warmup} is not over before max_iters={config.max_iters}: the learning rate rises "
                     f"to {config.learning_rate * config.max_iters / warmup:.3g} of {config.learning_rate:.3g} "
                     "(--warmup_iters=None: a tenth of the steps)")
    beyond = [step for step, _ in config.phases() if step >= config.max_iters]
    if beyond:
        lines.append(f"dataset_schedule: the phase from step {beyond[0]} on is not reached, max_iters is "
                     f"{config.max_iters}; val_loss has the weights of the last phase")
    if trains and (steps := config.profiled_steps()) and steps[0] <= start.step < steps[-1]:
        lines.append(f"profile: the run continues after step {start.step}, and the trace begins there")
    by_reason: dict[str, list[str]] = {}
    for name, reason in keys_without_effect(start).items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        location = config.explicit[names[0]]
        one = f"--{names[0]} has" if location == f"--{names[0]}" else f"{location}: {names[0]} has"
        lines.append(f"{one if len(names) == 1 else ', '.join(names) + ' have'} no effect here: {reason}")
    return lines
