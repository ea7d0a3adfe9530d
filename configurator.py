"""Parses config files and --key=value flags into one typed and validated `Config`.

Precedence: defaults < the preset that `arch_preset` names < config files, left to right < command line.
A resumed run starts from its recorded keys instead of the defaults. Every mistake is one line that says where the key
was set, the key, what is wrong and how to fix it. To add a key, add one line to `Config`.
"""

import argparse
import dataclasses
import functools
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import model_config
from blockgpt import config_effects
from blockgpt.checkpoints.resume import (
    FORMER_INIT_FROM,
    FORMER_VALUES,
    check_resumable,
    initial_architecture,
    recorded_config,
    run_exists,
)
from blockgpt.config_aliases import ALIASES, NOT_KEYS
from blockgpt.config_effects import Start
from blockgpt.config_fields import (
    BOOLEANS,
    Field,
    KeyParser,
    check_fields,
    check_folder_name,
    coerce,
    key,
    key_types,
    located,
    parse_value,
    read_config_file,
    with_location,
)
from blockgpt.errors import ConfigError, UserError, nearest, short_repr
from blockgpt.huggingface.hub import checkpoint_directory, is_checkpoint_name
from blockgpt.training.tracker import check_installed, tracker_names
from model_config import LazyModule, ModelConfig

if TYPE_CHECKING:
    from blockgpt.training import objectives
    from blockgpt.training.launch import Runtime
else:  # importing it imports torch
    objectives = LazyModule("blockgpt.training.objectives")

ROOT = Path(__file__).resolve().parent


class ObjectiveOption(NamedTuple):
    """One value of the key `objective`.

    load_class: returns the class, an `Objective`; calling it imports torch.
    help: one line for tables.
    """

    load_class: "Callable[[], type[objectives.Objective]]"
    help: str


OBJECTIVES = {
    "language_modeling": ObjectiveOption(lambda: objectives.LanguageModeling, "predict the next token"),
}

# `ModelConfig` alone is GPT-2's 124M; a run that sets no size must start at once on a laptop.
LAPTOP_SIZE = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256}


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. `model` is the architecture."""

    model: ModelConfig
    explicit: dict[str, str]  # key -> the file or flag that set it
    changed: dict[str, list[Any]] = field(default_factory=dict)  # key -> [value of the resumed run, value now]
    resuming: bool = False  # whether this process continues an existing run
    forced: tuple[str, ...] = ()  # those of `changed` that only resume_force allows
    remarks: tuple[str, ...] = ()  # what was decided because of the command line and the processes, one line each

    run_name: str | None = key(None, "name of the run directory, <out_dir>/<run_name>; None: date, time and preset",
                               group="run", example="mine")
    out_dir: str = key("runs", "folder of the run directories", group="run", example="elsewhere")
    resume: str = key("never", "never; auto: continue run_name from its newest usable checkpoint, or start it if "
                      "it does not exist; must: continue it, or fail. torchrun's restarts resume automatically",
                      group="run", choices=("never", "auto", "must"))
    init_from: str | None = key(None, "start from the weights of another run: runs/NAME, its best checkpoint, or "
                                "runs/NAME@step; or of a checkpoint of transformers: hf:FOLDER, hf:Org/Name@REVISION; "
                                "its architecture and size are the defaults",
                                group="run", example="runs/other@100")
    resume_force: bool = key(False, "resume even if changed keys make the run another experiment; the log records them",
                             group="run")
    eval_only: bool = key(False, "evaluate once and stop", group="run")
    objective: str = key("language_modeling", "what the model learns", group="run", choices=OBJECTIVES)
    seed: int = key(1337, "seed of weights, batches and dropout", group="run", minimum=0, maximum=2**63 - 1, example=7)

    dataset: str | dict[str, float] = key(
        "pycode", "a folder under data_dir, written by its prepare.py, or several with their mixture weights: "
        "{'fineweb': 0.7, 'pycode': 0.3}", group="data", example={"fineweb": 0.7, "pycode": 0.3})
    dataset_schedule: list[Any] | None = key(
        None, "mixture weights by phase, instead of dataset: [(0, {…}), (20_000, {…})]; each phase begins at its step",
        group="data", example=[[0, {"fineweb": 1}], [100, {"pycode": 1}]])
    max_epochs: float | dict[str, float] | None = key(
        None, "maximum epochs of a dataset, for all or as {name: epochs}; a run that would need more is refused",
        group="data", example=4.0)
    packing: str = key("stream", "stream: windows cut from the concatenated text; documents: whole documents in each "
                       "window", group="data", choices=("stream", "documents"))
    tokenizer: str | None = key(None, "tokenizer of a folder of bare token files, such as nanoGPT's: gpt2, … or a file;"
                                " other datasets name it in their meta.json", group="data", example="gpt2")
    data_dir: str | None = key(None, "folder of the datasets; None: data/ next to train.py", group="data",
                               example="datasets")
    batch_size: int = key(16, "sequences per micro-batch on each process", group="data", minimum=1, example=8)
    gradient_accumulation_steps: int = key(1, "micro-batches per step, over all processes; if not set, one for each "
                                           "process", group="data", minimum=1, example=4)

    max_iters: int = key(2000, "optimizer steps of the whole run", group="optimization", minimum=1, example=500)
    learning_rate: float = key(1e-3, "peak, after the warm-up", group="optimization", above=0.0, example=3e-4)
    lr_schedule: str = key("cosine", "after the warm-up", group="optimization", choices=("cosine", "constant"))
    warmup_iters: int | None = key(None, "steps of linear warm-up; None: a tenth of max_iters, at most 100",
                                   group="optimization", minimum=0, example=20)
    lr_decay_iters: int | None = key(None, "step at which min_lr is reached; None: max_iters",
                                     group="optimization", minimum=1, example=1000)
    min_lr: float | None = key(None, "floor of the decay; None: learning_rate / 10", group="optimization",
                               minimum=0.0, example=1e-5)
    weight_decay: float = key(0.1, "of AdamW, on matrices only", group="optimization", minimum=0.0, example=0.01)
    beta1: float = key(0.9, "of AdamW", group="optimization", minimum=0.0, below=1.0, example=0.8)
    beta2: float = key(0.99, "of AdamW", group="optimization", minimum=0.0, below=1.0, example=0.95)
    grad_clip: float = key(1.0, "largest gradient norm; 0: no clipping", group="optimization", minimum=0.0, example=0.5)

    eval_interval: int = key(250, "steps between evaluations; the last step always has one", group="evaluation",
                             minimum=1, example=100)
    eval_tokens: int = key(65536, "validation tokens, spread evenly over the split; 0: all of it",
                           group="evaluation", minimum=0, example=1024)
    patience: int = key(0, "evaluations in a row without improvement after which the run is finished; 0: no limit",
                        group="evaluation", minimum=0, example=3)
    checkpoint_interval: int | None = key(None, "steps between checkpoints; None: eval_interval; 0: only at the end",
                                          group="evaluation", minimum=0, example=50)

    use_zero1: bool = key(False, "ZeRO-1: shard the optimizer state over the processes", group="parallel")
    use_fsdp: bool = key(False, "FSDP: shard weights, gradients and optimizer state, block by block", group="parallel")
    fsdp_reshard_after_forward: bool = key(True, "free a block's gathered weights between forward and backward pass",
                                           group="parallel")
    fsdp_cpu_offload: bool = key(False, "keep the shards in host memory", group="parallel")
    dp_replicate: int = key(1, "replicas of the model, each sharded within its group of processes (hybrid sharding); "
                            "usually the number of nodes", group="parallel", minimum=1, example=2)
    tensor_parallel: int = key(1, "neighbouring processes that split each matrix, for models too wide for one process",
                               group="parallel", minimum=1, example=2)
    activation_checkpointing: str = key("none", "what the backward pass recomputes to save memory: full: each block; "
                                        "selective: all but matrix products and attention",
                                        group="parallel", choices=("none", "full", "selective"))
    rank_timeout: float = key(300.0, "seconds without progress after which another process counts as lost (half an hour"
                              " for the first step and evaluation, which may compile)", group="parallel", above=0.0,
                              example=60.0)
    save_timeout: float = key(1800.0, "the same during a save", group="parallel", above=0.0, example=600.0)
    join_timeout: float = key(100.0, "seconds for all processes to meet at the start", group="parallel", above=0.0,
                              example=600.0)
    skip_spikes: bool = key(False, "skip the update of a step whose loss is a spike", group="optimization")
    spike_threshold: float = key(6.0, "standard deviations above its running mean at which a loss is a spike",
                                 group="optimization", above=0.0, example=4.0)

    keep_last: int = key(2, "number of newest checkpoints to keep, in addition to the best one", group="evaluation",
                         minimum=2, example=3)
    keep_best: bool = key(False, "save after each evaluation that is the best so far, too, not only at "
                          "checkpoint_interval", group="evaluation")
    checkpoint_async: bool | None = key(None, "write checkpoints in the background, from a copy in memory; None: on "
                                        "CUDA", group="evaluation")

    device: str = key("auto", "auto: cuda, else mps, else cpu; or cpu, cuda, cuda:1, mps", group="system",
                      example="cpu")
    dtype: str = key("auto", "of the matrix products; auto: bfloat16 on CUDA devices that support it, else float32",
                     group="system", choices=("auto", "float32", "bfloat16", "float16"))
    tf32: bool = key(True, "TensorFloat-32 products on CUDA where dtype is float32", group="system")
    compile: bool | None = key(None, "torch.compile; None: on CUDA, but not under tensor_parallel", group="system")
    mfu_peak: str | float = key("dense", "peak that MFU is relative to: dense, sparse (2:4), or TFLOP/s as a number",
                                group="system", example=312.0)

    dry_run: bool = key(False, "print what the run needs and costs, and stop: exit code 0 if it fits, 1 if not",
                        group="dry run")
    dry_run_gpus: int = key(1, "processes of the estimated run, one per GPU; if not set: those of torchrun",
                            group="dry run", minimum=1, maximum=1_000_000, example=8)
    dry_run_gpu: str | None = key(None, "name of the GPU, such as B200; None: the one here, else this machine's memory",
                                  group="dry run", example="B200")
    dry_run_mfu: float = key(0.4, "fraction of the peak that the estimated time assumes", group="dry run", above=0.0,
                             maximum=1.0, example=0.5)

    log_interval: int = key(10, "steps between lines of the log", group="logging", minimum=1, example=1)
    gradient_log_interval: int = key(0, "steps between per-layer gradient statistics; 0: never", group="logging",
                                     minimum=0, example=100)
    profile: str | None = key(None, "START:STOP: trace the steps from START to before STOP (torch.profiler) into "
                              "the run directory", group="logging", example="10:13")
    memory_snapshot: bool = key(False, "record CUDA's allocator and write memory_snapshot.pickle at the end or when "
                                "out of memory, for pytorch.org/memory_viz", group="logging")
    tracker: str = key("none", "send the log to wandb, tensorboard or trackio too; several: wandb,tensorboard",
                       group="logging", example="tensorboard")
    tracker_project: str = key("blockgpt", "project of the run in wandb and trackio", group="logging", example="mine")

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_parallel()
        if self.dry_run and self.eval_only:
            raise ConfigError("dry_run", "is incompatible with eval_only: it estimates training (drop one of them)")
        if self.lr_decay_iters is not None and self.lr_decay_iters < (self.warmup_iters or 0):
            raise ConfigError("lr_decay_iters", f"{self.lr_decay_iters} ends before warmup_iters={self.warmup_iters} "
                                                "(raise it, or lower warmup_iters)")
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ConfigError("min_lr", f"{self.min_lr:g} is above learning_rate={self.learning_rate:g} (lower it)")
        if self.resume != "never" and not self.run_name:
            raise ConfigError("resume", f"{self.resume!r} needs --run_name=NAME, the run to continue")
        if self.init_from in FORMER_INIT_FROM:
            raise ConfigError("init_from", f"{self.init_from!r} was replaced by resume='must' (init_from names another "
                                           "run to start from)")
        check_folder_name("run_name", self.run_name or "x")
        self.check_sources()
        self.profiled_steps()
        tracker_names(self.tracker)
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", self.device):
            raise ConfigError("device", f"{short_repr(self.device)} is unknown (one of auto, cpu, cuda, cuda:1, mps)")
        if self.mfu_peak not in ("dense", "sparse") and (isinstance(self.mfu_peak, str) or self.mfu_peak <= 0):
            raise ConfigError("mfu_peak", f"{short_repr(self.mfu_peak)} is not dense, sparse, or TFLOP/s above 0")

    @property
    def processes(self) -> int:
        """The number of processes that train together, or would in a dry run."""
        return self.dry_run_gpus if self.dry_run and "dry_run_gpus" in self.explicit else world_size()

    @property
    def data_processes(self) -> int:
        """The number of data-parallel ranks (dp_size): tensor-parallel neighbours read the same micro-batches."""
        return self.processes // self.tensor_parallel

    def check_parallel(self) -> None:
        """Raise `ConfigError` unless the processes can divide the work as the keys ask."""
        if self.use_zero1 and self.use_fsdp:
            raise ConfigError("use_zero1", "True is incompatible with use_fsdp=True, which shards the optimizer state "
                                           "too (--use_zero1=False or --use_fsdp=False)")
        if self.processes % self.tensor_parallel:
            raise ConfigError("tensor_parallel", f"{self.tensor_parallel} does not divide the {self.processes} "
                                                 "processes of the run (--tensor_parallel=1 does)")
        if self.tensor_parallel > 1:
            self.check_tensor_parallel()
        dp_size = self.data_processes
        if self.gradient_accumulation_steps % dp_size:
            raise ConfigError("gradient_accumulation_steps", f"{self.gradient_accumulation_steps} cannot be divided "
                              f"over {dp_size} processes: it counts over all of them "
                              f"({divisible_steps(self.batch_size, self.gradient_accumulation_steps, dp_size)})")
        if dp_size % self.dp_replicate:
            raise ConfigError("dp_replicate", f"{self.dp_replicate} does not divide the {dp_size} data-parallel "
                                              "processes (--dp_replicate=1 does)")
        if self.dtype == "float16" and (self.use_fsdp or self.tensor_parallel > 1):
            raise ConfigError("dtype", "'float16' needs scaled gradients, which cannot be sharded (bfloat16 and "
                                       "float32 can)")

    def check_tensor_parallel(self) -> None:
        """Raise `ConfigError` unless tensor_parallel > 1 fits the model and the other keys."""
        size, model = self.tensor_parallel, self.model.resolve()
        for name in ("n_head", "n_kv_head", "d_ff"):
            if getattr(model, name) % size:
                raise ConfigError("tensor_parallel", f"{size} does not divide {name}={getattr(model, name)}")
        if self.use_zero1:
            raise ConfigError("tensor_parallel", f"{size} is incompatible with use_zero1=True (--use_fsdp instead)")
        if self.processes > size and not self.use_fsdp:
            raise ConfigError("tensor_parallel", f"{size} of {self.processes} processes makes {self.processes // size} "
                                                 "groups, which only use_fsdp=True can train together")
        if self.compile:
            raise ConfigError("compile", "True is incompatible with tensor_parallel: a compiled backward pass does not "
                                         "return sharded gradients (--compile=False)")
        if self.model.kernels == "triton":
            raise ConfigError("kernels", "'triton' is incompatible with tensor_parallel, whose norms work on sharded "
                                         "tensors (--kernels=auto)")
        if self.model.attention_backend == "flex":
            raise ConfigError("attention_backend", "'flex' is incompatible with tensor_parallel (use sdpa or manual)")

    def saves_in_background(self, device_type: str | None) -> bool:
        """Whether training goes on while a checkpoint is written. On "cuda" the copy costs no memory of the device."""
        return device_type == "cuda" if self.checkpoint_async is None else self.checkpoint_async

    def profiled_steps(self) -> range:
        """The steps to profile, counted from 1 like the log's; an empty range if there are none."""
        if self.profile is None:
            return range(0)
        if not re.fullmatch("[0-9]{1,12}:[0-9]{1,12}", self.profile):
            raise ConfigError("profile", f"{short_repr(self.profile)} is not START:STOP (10:13 is steps 10, 11, 12)")
        first, stop = map(int, self.profile.split(":"))
        if not 1 <= first < stop:
            raise ConfigError("profile", f"{self.profile} has no step (START is at least 1, STOP is above START)")
        if stop - 1 > self.max_iters:
            raise ConfigError("profile", f"{self.profile} ends with step {stop - 1}, beyond max_iters={self.max_iters}")
        return range(first, stop)

    def check_sources(self) -> None:
        """Raise `ConfigError` unless dataset, dataset_schedule and max_epochs are well-formed."""
        if self.dataset_schedule is not None and "dataset" in self.explicit:
            raise ConfigError("dataset", "is incompatible with dataset_schedule, which replaces it (drop one of them)")
        name = "dataset" if self.dataset_schedule is None else "dataset_schedule"
        for phase in self.dataset_schedule or ():
            if type(phase) is not list or [type(entry) for entry in phase] not in ([int, dict], [int, str]):
                raise ConfigError(name, f"{short_repr(phase)} is not a phase: (step, {{name: weight, …}})")
        steps = [step for step, _ in self.phases()]
        if not steps or steps[0] != 0 or sorted(set(steps)) != steps or steps[-1] > 10**12:
            raise ConfigError(name, f"the phases begin at steps {steps}: the first must be 0, the rest increasing")
        for _, weights in self.phases():
            check_mixture(name, weights)
        epochs = self.max_epochs
        limits: list[Any] = list(epochs.values()) if isinstance(epochs, dict) else [] if epochs is None else [epochs]
        for limit in limits:
            if type(limit) not in (int, float) or not 0 < limit < float("inf"):
                raise ConfigError("max_epochs", f"{short_repr(limit)} is not a number above 0")

    def phases(self) -> list[tuple[int, dict[str, float]]]:
        """[(first step, {dataset: mixture weight})] of the run; the first phase begins at step 0."""
        phases: list[Any] = [[0, self.dataset]] if self.dataset_schedule is None else self.dataset_schedule
        return [(step, sources if isinstance(sources, dict) else {sources: 1}) for step, sources in phases]

    def build_objective(self, runtime: "Runtime") -> "objectives.Objective":
        """The objective of the run, with its data; raises what would stop the run at its start."""
        objective = OBJECTIVES[self.objective].load_class()(self, runtime)
        if self.init_from and is_checkpoint_name(self.init_from) and not self.resuming:
            from blockgpt.huggingface.source import check_tokenizer  # it needs numpy, which --help does not

            name, datasets = self.init_from, list(self.phases()[0][1])
            runtime.on_rank_zero(lambda: check_tokenizer(name, checkpoint_directory(name), objective.tokenizer,
                                                         datasets, self.data_dir))
        return objective

    def companion_models(self) -> list[ModelConfig]:
        """The models of the objective's frozen companions, such as a teacher."""
        return [source_model_config(run) for run in OBJECTIVES[self.objective].load_class().companion_runs(self)]

    def for_vocabulary(self, n: int) -> "Config":
        """The config for a dataset of n token ids: vocab_size as it was set, else n rounded up to a multiple of 64.

        Raises:
            UserError: vocab_size was set and is smaller than n.
        """
        if "vocab_size" not in self.explicit:
            return dataclasses.replace(self, model=dataclasses.replace(self.model, vocab_size=-(-n // 64) * 64))
        if self.model.vocab_size < n:
            datasets = " + ".join(self.phases()[0][1])
            inherits = self.init_from is not None and self.explicit["vocab_size"] == self.explicit.get("init_from")
            fix = "init_from a run with a larger vocabulary" if inherits else "drop the key to fit the data"
            raise ConfigError("vocab_size", f"{self.model.vocab_size} is too small for {datasets}, which has {n} token "
                                            f"ids ({fix})").at(self.explicit["vocab_size"])
        return self

    def flat(self) -> dict[str, Any]:
        """Every key with its value, as the run log records it and a config file would set it."""
        keys = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata}
        return {**keys, **self.model.flat()}

    def start(self, device: str | None = None, dtype: str | None = None, step: int = 0) -> Start:
        """The start of a process of this run, for `notes` and `keys_without_effect` of blockgpt/config_effects.py.

        Args:
            device: the type of the device that it uses; None: that which the keys name, if they do.
            dtype: of its matrix products; the same.
            step: how many steps are done.
        """
        if device is None:
            device = ("cuda" if self.dry_run and self.dry_run_gpu else None if self.device == "auto"
                      else self.device.partition(":")[0])
        return Start(self, device, dtype or (None if self.dtype == "auto" else self.dtype), step)

    def keys_without_effect(self, device: str | None = None, dtype: str | None = None, step: int = 0) -> dict[str, str]:
        """{key: reason} of the explicit keys that change nothing; the arguments are those of `start`."""
        return config_effects.keys_without_effect(self.start(device, dtype, step))

    def notes(self, device: str | None = None, dtype: str | None = None, step: int = 0) -> list[str]:
        """What a user may not expect of the keys that are set, one line each; the arguments are those of `start`."""
        return config_effects.notes(self.start(device, dtype, step))


def divisible_steps(batch_size: int, steps: int, processes: int) -> str:
    """The flags that divide a step over the processes, in place of gradient_accumulation_steps=steps."""
    sequences, above = batch_size * steps, -(-steps // processes) * processes
    same = next((n for n in range(above, sequences + 1, processes) if sequences % n == 0), None)
    below = f"{above - processes} or " if above > processes else ""
    flags = f"--gradient_accumulation_steps={below}{above}"
    return flags if same is None else (f"{flags}; with the same sequences per step: --batch_size={sequences // same} "
                                       f"--gradient_accumulation_steps={same}")


def check_mixture(key: str, weights: Mapping[Any, Any]) -> None:
    """Raise `ConfigError` for the key unless `weights` is {name of a dataset: mixture weight}."""
    for source, weight in weights.items():
        if type(source) is not str or not source or not source.isprintable():
            raise ConfigError(key, f"{short_repr(source)} is not the name of a dataset")
        check_folder_name(key, source)
        if type(weight) not in (int, float) or not 0 <= weight < float("inf"):
            raise ConfigError(key, f"the weight of {source} is {short_repr(weight)}, not a number of at least 0")
    if not any(weights.values()):
        raise ConfigError(key, f"{short_repr(weights)} has no weight above 0")


def key_fields() -> dict[str, Field]:
    """{key: dataclass field} of every configuration key, in the order of the help."""
    fields = {f.name: f for cls in (ModelConfig, Config) for f in dataclasses.fields(cls) if f.metadata}
    order = ("architecture", "size", "run", "data", "optimization", "evaluation", "parallel", "system", "dry run",
             "logging")
    return {n: f for group in order for n, f in fields.items() if f.metadata["group"] == group}


KEYS = key_fields()
TYPES = key_types(ModelConfig) | key_types(Config)
PATHS = {"out_dir", "init_from", "data_dir", "tokenizer"}  # keys that are paths, or may be
# Keys of earlier versions: {old name: new name}. Recorded runs that have them are read as they are.
RENAMED_KEYS = {"fsdp_replicas": "dp_replicate", "keep_checkpoints": "keep_last", "peer_timeout": "rank_timeout",
                "wandb_log": "tracker", "wandb_project": "tracker_project"}


def world_size() -> int:
    """The number of processes that train together, from torchrun's variables."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not re.fullmatch("[1-9][0-9]{0,6}", size):
        raise UserError(f"WORLD_SIZE: {short_repr(size)} is not a number of processes (torchrun sets it, or unset it)")
    for name in ("RANK", "LOCAL_RANK"):
        rank = os.environ.get(name, "0")
        if not re.fullmatch("[0-9]{1,7}", rank) or int(rank) >= int(size):
            raise UserError(f"{name}: {short_repr(rank)} is not a rank of WORLD_SIZE={size} processes (torchrun sets "
                            f"both, or unset {name})")
    return int(size)


def load_config(argv: Sequence[str], restarted: str | None = None) -> Config:
    """The `Config` that the command line describes. `--help` prints every key and exits with code 0.

    Args:
        argv: the command line without the program's name.
        restarted: name of the run that torchrun has restarted; it continues as with --resume=auto.

    Raises:
        UserError: any mistake on the command line, in a config file, or in the record of the run to resume.
    """
    given, explicit, remarks = read_arguments(argv)
    if restarted:
        given["run_name"], given["resume"] = restarted, "auto"
        explicit.setdefault("run_name", "torchrun")
    recorded: dict[str, Any] = {}
    default_location: str | Path = "defaults"
    resuming = False
    if given.get("run_name"):
        run_dir = Path(given.get("out_dir", Config.out_dir), given["run_name"])
        resuming = given.get("resume") == "must" or (given.get("resume") == "auto" and run_exists(run_dir))
    if resuming:
        default_location = run_dir / "run.json"
        recorded = recorded_config(default_location, explicit["run_name"], KEYS, TYPES, RENAMED_KEYS)
        # The run keeps its vocab_size, whatever the dataset needs now.
        explicit.setdefault("vocab_size", explicit["run_name"])
    inherited: dict[str, Any] = {}
    if given.get("init_from") and not resuming and given["init_from"] not in FORMER_INIT_FROM:
        location = explicit["init_from"]
        inherited = initial_architecture(given["init_from"], location, given, KEYS, TYPES, RENAMED_KEYS)
        if is_checkpoint_name(given["init_from"]):
            from blockgpt.huggingface.source import checkpoint_notes

            remarks += checkpoint_notes(given["init_from"])
        explicit.setdefault("vocab_size", location)
        default_location = location
    try:
        config = make_config({**recorded, **inherited, **given}, explicit, remarks)
        if inherited and is_checkpoint_name(given["init_from"]):
            from blockgpt.huggingface.source import check_unchanged

            preset = model_config.PRESETS[given.get("arch_preset", "custom")][1]
            check_unchanged(given["init_from"], given, config.model.resolve().flat(),
                            ModelConfig(**inherited).resolve().flat(), preset)
    except ConfigError as error:
        raise with_location(error, explicit, default_location) from None
    with located(explicit.get("tracker", default_location)):
        check_installed(tracker_names(config.tracker) if not config.dry_run else [])
    forced = check_resumable(config, given, recorded, KEYS)
    now = config.flat()
    changed = {k: [recorded[k], now[k]] for k in now if k in recorded and recorded[k] != now[k]}
    return dataclasses.replace(config, changed=changed, forced=forced, resuming=resuming)


def make_config(given: Mapping[str, Any], explicit: dict[str, str], remarks: tuple[str, ...] = ()) -> Config:
    """The Config of `given` {key: value} over its preset and the defaults; `explicit` {key: location} of those set."""
    architecture = {f.name for f in dataclasses.fields(ModelConfig)}
    values = {**LAPTOP_SIZE, **given}
    model = model_config.apply_preset({k: v for k, v in values.items() if k in architecture})
    if "activation" in explicit and model.activation and len(model.implied().get("activation", "ab")) == 1:
        raise model.incompatible_key("activation")  # even if the value is the same: the user expects an effect
    settings = {k: v for k, v in values.items() if k not in architecture}
    if "gradient_accumulation_steps" not in settings:
        processes = (settings.get("dry_run") and settings.get("dry_run_gpus")) or world_size()
        settings["gradient_accumulation_steps"] = steps = max(1, processes // settings.get("tensor_parallel", 1))
        if steps > 1:
            remarks = (*remarks, f"gradient_accumulation_steps is {steps}, one micro-batch for each data-parallel "
                                 "process")
    return Config(model=model, explicit=explicit, remarks=remarks, **settings)


def source_model_config(init_from: str) -> ModelConfig:
    """The model of the run whose weights `init_from` names; `UserError` if there is none."""
    values = initial_architecture(init_from, "init_from", {}, KEYS, TYPES, RENAMED_KEYS)
    with located("init_from"):
        return ModelConfig(**values)


NEAR_KEY = 0.7  # a key that is less like the word would do something else


def unknown_key(location: str, name: str, text: str | None = None) -> UserError:
    """The `UserError` for a key that does not exist, or no longer under this name.

    Args:
        location: where it was set.
        name: the key.
        text: its value, if it is a flag that has one.
    """
    is_flag = location == f"--{name}"
    plain = name.replace("-", "_").lower()
    if plain in FORMER_VALUES:
        message = f"was replaced by {'--' * is_flag}{RENAMED_KEYS[plain]}={FORMER_VALUES[plain][True]}"
    elif plain in RENAMED_KEYS:
        message = f"was renamed to {'--' * is_flag}{RENAMED_KEYS[plain]}"
    elif plain in NOT_KEYS:
        message = f"no such key: {NOT_KEYS[plain]}"
    else:
        target, _, setting = ALIASES.get(plain, nearest(plain, KEYS, NEAR_KEY) or "").partition("=")
        if setting and BOOLEANS.get((text or "").lower()) is False:  # not what the alias stands for
            text = setting = ""
        hint = target
        if target and is_flag:
            hint = flag_text(target, setting or text)
        elif setting:
            hint = f"{target} = {setting!r}"
        message = f"no such key (did you mean {hint}?)" if target else "no such key (--help lists all keys)"
        message += "" if is_flag else f", or _{name} for a variable of your own"
    return ConfigError(name, message).at(location)


def flag_text(name: str, text: str | None) -> str:
    """The flag that sets a key to what `text` says, with … for a value that it does not take."""
    try:
        coerce(KEYS[name], TYPES[name], parse_value(KEYS[name], TYPES[name], text or ""))
        return shlex.quote(f"--{name}={text}")
    except ConfigError:
        return f"--{name}" if bool in TYPES[name] and not text else f"--{name}=…"


# Flags and files


def read_arguments(argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, str], tuple[str, ...]]:
    """The command line, with flags over files wherever they appear, and later ones over earlier ones.

    Returns:
        {key: value}, {key: the file or flag that set it}, and a line for each flag that a later one replaces.
    """
    files, flags = split_arguments(argv)
    given: dict[str, Any] = {}
    explicit: dict[str, str] = {}
    for path in map(os.path.expanduser, files):
        for name, value in read_config_file(path, ROOT).items():
            if name not in KEYS:
                raise unknown_key(path, name)
            with located(path):
                given[name], explicit[name] = coerce(KEYS[name], TYPES[name], value), path
    replaced = []
    for name, texts in flags.items():
        with located(f"--{name}"):  # a wrong value is refused even if a later one overrides it
            values = [coerce(KEYS[name], TYPES[name], parse_value(KEYS[name], TYPES[name], text)) for text in texts]
        given[name], explicit[name] = values[-1], f"--{name}"
        replaced += [f"--{name} is given more than once: {short_repr(values[-1])} counts, not {short_repr(value)}"
                     for value in values[:-1] if value != values[-1]]
    for name in PATHS & given.keys():  # a shell leaves the ~ of --out_dir=~/runs
        given[name] = os.path.expanduser(given[name]) if type(given[name]) is str else given[name]
    return given, explicit, tuple(replaced)


def split_arguments(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """argv -> ([config files], {key: [the text of each of its flags]})."""
    flags, words = key_parser().parse_flags(argv)
    files = []
    for i, word in enumerate(words):
        if word.startswith("-") or not word.endswith(".py"):
            name, equals, text = word.lstrip("-–—").partition("=")  # also – and —, which editors write for --
            following = next((w for w in words[i + 1:i + 2] if not w.startswith("-")), None)
            if word.startswith("--") and name:
                raise unknown_key(f"--{name}", name, text if equals else following)
            hint = f" (did you mean {flag_text(known, text)}?)" if (known := name.replace("-", "_")) in KEYS else ""
            raise UserError(f"{short_repr(word)}: neither a config file (*.py) nor --key=value{hint}")
        files.append(word)
    return files, flags


@functools.cache
def key_parser() -> KeyParser:
    """The parser of the command line."""
    parser = KeyParser(
        KEYS, TYPES, {**LAPTOP_SIZE, "vocab_size": None},
        prog="python train.py", usage="%(prog)s [config/*.py ...] [--key=value ...]",
        description="Later files override earlier ones, later flags earlier ones (a note says so), and flags override "
                    "files; an explicit key overrides the preset. A boolean needs no value: --compile, --no_compile. "
                    "Dashes may stand for underscores. Keys that default to None are derived, as their line says. "
                    "--list_presets prints the presets.")
    parser.add_argument("--list_presets", action=ListPresets, nargs=0, default=argparse.SUPPRESS,
                        help=argparse.SUPPRESS)
    return parser


class ListPresets(argparse.Action):
    """`--list_presets` prints the presets and exits."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        model_config.list_presets()
        parser.exit()


def help_text() -> str:
    """Every key by group: its default, what it means, its choices."""
    return key_parser().format_help()
