"""Config files and --key=value flags in, one typed and validated `Config` out.

Precedence: defaults < the preset that `arch_preset` names < config files, left to right < command line.
A resumed run starts from its own recorded keys in place of the defaults. Every mistake is one line that
names where the key was set, the key, what is wrong and the way out. To add a key: one line in `Config`.
"""

import ast
import dataclasses
import json
import os
import re
import sys
import textwrap
import traceback
import types
from dataclasses import dataclass, field
from pathlib import Path

import model_config
from blockgpt.config_fields import check_fields, check_value, key, key_types
from blockgpt.errors import ConfigError, UserError, did_you_mean, short_repr
from model_config import ModelConfig

ROOT = Path(__file__).resolve().parent

# `ModelConfig` alone is GPT-2's 124M; a run that names no size must start at once on a laptop.
LAPTOP_SIZE = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256}


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. `model` is the architecture; `explicit` says where a key was set by hand."""

    model: ModelConfig
    explicit: dict  # key -> the file or flag that set it
    changed: dict = field(default_factory=dict)  # key -> [what the resumed run had, what it has now]
    resuming: bool = False  # whether this process continues an existing run
    forced: tuple = ()  # those of `changed` that resume_force let through

    run_name: str | None = key(None, "names runs/<run_name>; None: date, time and preset", group="run")
    out_dir: str = key("runs", "where run directories are made", group="run")
    resume: str = key("never", "never; auto: continue run_name from its newest usable checkpoint, or start it if it does "
                      "not exist; must: continue it, or fail. torchrun's restarts resume automatically",
                      group="run", choices=("never", "auto", "must"))
    resume_force: bool = key(False, "resume though a change makes the run another experiment; the log records it",
                             group="run")
    eval_only: bool = key(False, "evaluate once and stop", group="run")
    seed: int = key(1337, "of weights, batches and dropout", group="run", minimum=0, maximum=2**63 - 1)

    dataset: str | dict = key("pycode", "a folder under data_dir, made by its prepare.py, or several with their shares "
                              "of the tokens: {'fineweb': 0.7, 'pycode': 0.3}", group="data")
    dataset_schedule: list | None = key(None, "shares by phase, instead of dataset: [(0, {…}), (20_000, {…})], each "
                                        "from its step on", group="data")
    max_epochs: float | dict | None = key(None, "how often a dataset may be read, for all or as {name: number}; a run "
                                          "that would read one more often is refused", group="data")
    packing: str = key("stream", "stream: windows cut from the running text; documents: whole documents in each",
                       group="data", choices=("stream", "documents"))
    tokenizer: str | None = key(None, "of a folder of bare token files, such as nanoGPT's: gpt2, … or a file; of "
                                "others it must be theirs", group="data")
    data_dir: str | None = key(None, "where datasets stand; None: data/ beside train.py", group="data")
    batch_size: int = key(16, "sequences per micro-batch, on each process", group="data", minimum=1)
    gradient_accumulation_steps: int = key(1, "micro-batches per step, over all processes", group="data", minimum=1)

    max_iters: int = key(2000, "optimizer steps of the whole run", group="optimization", minimum=1)
    learning_rate: float = key(1e-3, "peak, after the warm-up", group="optimization", above=0.0)
    lr_schedule: str = key("cosine", "after the warm-up", group="optimization", choices=("cosine", "constant"))
    warmup_iters: int | None = key(None, "steps of linear warm-up; None: a tenth of max_iters, at most 100",
                                   group="optimization", minimum=0)
    lr_decay_iters: int | None = key(None, "step at which min_lr is reached; None: max_iters",
                                     group="optimization", minimum=1)
    min_lr: float | None = key(None, "floor of the decay; None: learning_rate / 10", group="optimization",
                               minimum=0.0)
    weight_decay: float = key(0.1, "AdamW's, on matrices only", group="optimization", minimum=0.0)
    beta1: float = key(0.9, "AdamW's", group="optimization", minimum=0.0, below=1.0)
    beta2: float = key(0.99, "AdamW's", group="optimization", minimum=0.0, below=1.0)
    grad_clip: float = key(1.0, "largest gradient norm; 0: no clipping", group="optimization", minimum=0.0)

    eval_interval: int = key(250, "steps between evaluations; the last step always has one", group="evaluation",
                             minimum=1)
    eval_tokens: int = key(65536, "validation tokens, spread evenly over the split; 0: all of it",
                           group="evaluation", minimum=0)
    checkpoint_interval: int | None = key(None, "steps between checkpoints; None: eval_interval; 0: only at the end",
                                          group="evaluation", minimum=0)

    use_zero1: bool = key(False, "ZeRO-1: the optimizer's state shared out over the processes", group="parallel")
    use_fsdp: bool = key(False, "FSDP: weights, gradients and optimizer state shared out, block by block",
                         group="parallel")
    fsdp_reshard_after_forward: bool = key(True, "free a block's gathered weights between forward and backward pass",
                                           group="parallel")
    fsdp_cpu_offload: bool = key(False, "keep what is shared out in the memory of the host", group="parallel")
    dp_replicate: int = key(1, "whole copies of the model, each shared out within its group of processes (hybrid "
                             "sharding): the number of nodes, say", group="parallel", minimum=1)
    tensor_parallel: int = key(1, "neighbouring processes that split each matrix, for models too wide for one",
                               group="parallel", minimum=1)
    activation_checkpointing: str = key("none", "what the backward pass computes again to save memory: full: each "
                                        "block, selective: all of it but matrix products and attention",
                                        group="parallel", choices=("none", "full", "selective"))
    rank_timeout: float = key(300.0, "seconds without progress after which another process must be lost (the first "
                              "step and evaluation, which may compile, have half an hour)", group="parallel", above=0.0)
    save_timeout: float = key(1800.0, "the same in a save", group="parallel", above=0.0)
    skip_spikes: bool = key(False, "leave out the update of a step whose loss is a spike", group="optimization")
    spike_threshold: float = key(6.0, "standard deviations above its running mean from which a loss is a spike",
                                 group="optimization", above=0.0)

    keep_last: int = key(2, "newest checkpoints that stay, beside the best", group="evaluation", minimum=2)
    checkpoint_async: bool = key(False, "write checkpoints while training goes on, from a copy in memory",
                                 group="evaluation")

    device: str = key("auto", "auto: cuda, else mps, else cpu; or cpu, cuda, cuda:1, mps", group="system")
    dtype: str = key("auto", "of the matrix products; auto: bfloat16 on CUDA where it has it, else float32",
                     group="system", choices=("auto", "float32", "bfloat16", "float16"))
    tf32: bool = key(True, "TensorFloat-32 products on CUDA where dtype is float32", group="system")
    compile: bool | None = key(None, "torch.compile; None: on CUDA, but not under tensor_parallel", group="system")
    mfu_peak: str | float = key("dense", "what MFU divides by: dense, sparse (2:4), or TFLOP/s as a number",
                                group="system")

    dry_run: bool = key(False, "print what the run needs and costs, and stop: exit code 0 if it fits, 1 if not",
                        group="dry run")
    dry_run_gpus: int = key(1, "processes, one a GPU, to tell of; if not set: those of torchrun", group="dry run",
                            minimum=1, maximum=1_000_000)
    dry_run_gpu: str | None = key(None, "a GPU's name, such as B200; None: the one here, else this machine's memory",
                                  group="dry run")
    dry_run_mfu: float = key(0.4, "share of the peak to reckon the time with", group="dry run", above=0.0, maximum=1.0)

    log_interval: int = key(10, "steps between lines of the log", group="logging", minimum=1)
    gradient_log_interval: int = key(0, "steps between per-layer gradient statistics; 0: never", group="logging",
                                     minimum=0)
    profile: str | None = key(None, "START:STOP: trace the steps from START to before STOP (torch.profiler) into "
                              "the run directory", group="logging")
    memory_snapshot: bool = key(False, "record CUDA's allocator and leave memory_snapshot.pickle at the end or when "
                                "out of memory, for pytorch.org/memory_viz", group="logging")
    wandb_log: bool = key(False, "send the log to Weights & Biases too", group="logging")
    wandb_project: str = key("blockgpt", "project there", group="logging")

    def __post_init__(self):
        check_fields(self)
        self.check_parallel()
        if self.dry_run and self.eval_only:
            raise ConfigError("dry_run", "tells of training, and eval_only trains nothing (drop one of them)")
        if self.lr_decay_iters is not None and self.lr_decay_iters < (self.warmup_iters or 0):
            raise ConfigError("lr_decay_iters", f"{self.lr_decay_iters} ends before warmup_iters={self.warmup_iters} "
                                                "(raise it, or lower warmup_iters)")
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ConfigError("min_lr", f"{self.min_lr:g} is above learning_rate={self.learning_rate:g}")
        if self.resume != "never" and not self.run_name:
            raise ConfigError("resume", f"{self.resume} needs --run_name=NAME, the run to continue")
        check_folder_name("run_name", self.run_name or "x")
        self.check_sources()
        self.profiled_steps()
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", self.device):
            raise ConfigError("device", f"{short_repr(self.device)} is unknown (one of auto, cpu, cuda, cuda:1, mps)")
        if isinstance(self.mfu_peak, str) and self.mfu_peak not in ("dense", "sparse"):
            raise ConfigError("mfu_peak", f"{short_repr(self.mfu_peak)} is unknown (dense, sparse, or TFLOP/s as a number)")
        if not isinstance(self.mfu_peak, str) and self.mfu_peak <= 0:
            raise ConfigError("mfu_peak", f"{self.mfu_peak} is out of range, must be above 0")

    @property
    def processes(self):
        """How many train together, or would."""
        return self.dry_run_gpus if self.dry_run and "dry_run_gpus" in self.explicit else world_size()

    @property
    def data_processes(self):
        """How many shares a step's micro-batches have: tensor-parallel neighbours read the same."""
        return self.processes // self.tensor_parallel

    def check_parallel(self):
        """Raise `ConfigError` unless the processes can share the work as the keys ask."""
        processes, tensor = self.processes, self.tensor_parallel
        if self.use_zero1 and self.use_fsdp:
            raise ConfigError("use_zero1", "True has no place beside use_fsdp=True, which shares out the optimizer's "
                                           "state too (--use_zero1=False or --use_fsdp=False)")
        if processes % tensor:
            raise ConfigError("tensor_parallel", f"{tensor} does not divide the {processes} processes of the run "
                                                 "(--tensor_parallel=1 does)")
        if tensor > 1:
            for name in ("n_head", "n_kv_head", "d_ff"):
                if getattr(self.model.resolve(), name) % tensor:
                    raise ConfigError("tensor_parallel", f"{tensor} does not divide "
                                                         f"{name}={getattr(self.model.resolve(), name)}")
            if self.use_zero1:
                raise ConfigError("tensor_parallel", f"{tensor} has no place beside use_zero1=True (use_fsdp has)")
            if processes > tensor and not self.use_fsdp:
                raise ConfigError("tensor_parallel", f"{tensor} of {processes} processes leaves {processes // tensor} "
                                                     "such groups, which only use_fsdp=True can join")
            if self.compile:
                raise ConfigError("compile", "True does not go with tensor_parallel: a compiled backward pass does not "
                                             "hand on gradients that are parted (drop it)")
            if self.model.attention_backend == "flex":
                raise ConfigError("attention_backend", "'flex' is not split by tensor_parallel (sdpa and manual are)")
        shares = self.data_processes
        if self.gradient_accumulation_steps % shares:
            raise ConfigError("gradient_accumulation_steps", f"{self.gradient_accumulation_steps} cannot be shared by "
                              f"{shares} processes (a multiple of {shares}: it counts over all of them)")
        if shares % self.dp_replicate:
            raise ConfigError("dp_replicate", f"{self.dp_replicate} does not divide the {shares} processes that "
                                               "share the data")
        if self.dtype == "float16" and (self.use_fsdp or tensor > 1):
            raise ConfigError("dtype", "'float16' with its scaled gradients cannot be shared out (bfloat16 and float32 "
                                       "can)")

    def profiled_steps(self):
        """The steps that `profile` asks for, counted from 1 like the log's: a range, empty without it."""
        if self.profile is None:
            return range(0)
        if not re.fullmatch("[0-9]{1,12}:[0-9]{1,12}", self.profile):
            raise ConfigError("profile", f"{short_repr(self.profile)} is not START:STOP (10:13 is the steps 10, 11, 12)")
        start, stop = map(int, self.profile.split(":"))
        if not 1 <= start < stop:
            raise ConfigError("profile", f"{self.profile} holds no step (START from 1 on, STOP above it)")
        if stop - 1 > self.max_iters:
            raise ConfigError("profile", f"{self.profile} goes up to step {stop - 1}, beyond "
                                         f"max_iters={self.max_iters}")
        return range(start, stop)

    def check_sources(self):
        """Raise `ConfigError` unless dataset and dataset_schedule name folders with shares that can be."""
        if self.dataset_schedule is not None and "dataset" in self.explicit:
            raise ConfigError("dataset", "has no place beside dataset_schedule, which says it all (drop one of them)")
        name = "dataset" if self.dataset_schedule is None else "dataset_schedule"
        for phase in self.dataset_schedule or ():
            if type(phase) is not list or [type(part) for part in phase] not in ([int, dict], [int, str]):
                raise ConfigError(name, f"{short_repr(phase)} is not a phase: (step, {{name: share, …}})")
        steps = [step for step, _ in self.phases()]
        if not steps or steps[0] != 0 or sorted(set(steps)) != steps or steps[-1] > 10**12:
            raise ConfigError(name, f"the phases start at the steps {steps}, not at 0 and then later and later")
        for _, shares in self.phases():
            for source, share in shares.items():
                if type(source) is not str or not source or not source.isprintable():
                    raise ConfigError(name, f"{short_repr(source)} is not the name of a dataset")
                check_folder_name(name, source)
                if type(share) not in (int, float) or not 0 <= share < float("inf"):
                    raise ConfigError(name, f"the share of {source} is {short_repr(share)}, not a number from 0 on")
            if not any(shares.values()):
                raise ConfigError(name, f"{short_repr(shares)} leaves nothing to read (a share above 0)")
        most = self.max_epochs
        for number in most.values() if isinstance(most, dict) else () if most is None else (most,):
            if type(number) not in (int, float) or not 0 < number < float("inf"):
                raise ConfigError("max_epochs", f"{short_repr(number)} is not a number above 0")

    def phases(self):
        """[(first step, {dataset: share of the tokens})] of the run, the first from step 0."""
        phases = [[0, self.dataset]] if self.dataset_schedule is None else self.dataset_schedule
        return [(step, sources if isinstance(sources, dict) else {sources: 1}) for step, sources in phases]

    def for_vocabulary(self, n):
        """The config with room for a dataset of n token ids: as set by hand, else n rounded up to a multiple of 64."""
        if "vocab_size" not in self.explicit:
            return dataclasses.replace(self, model=dataclasses.replace(self.model, vocab_size=-(-n // 64) * 64))
        if self.model.vocab_size < n:
            raise UserError(f"{self.explicit['vocab_size']}: vocab_size: {self.model.vocab_size} is too small for "
                            f"{' + '.join(self.phases()[0][1])}, which has {n} token ids (drop the key to fit the "
                            "data)")
        return self

    def flat(self):
        """Every key with its value, as the run log keeps it and a config file would set it."""
        keys = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata}
        return {**keys, **self.model.flat()}

    def keys_without_effect(self):
        """{key: reason} of the keys set by hand that change nothing in this combination."""
        unused = dict(self.model.unused_keys())
        if not self.dry_run:
            unused |= {k: "dry_run is off" for k in ("dry_run_gpus", "dry_run_gpu", "dry_run_mfu")}
        elif self.dry_run_gpu is not None:
            unused["device"] = "dry_run_gpu names the device"
        if not self.use_fsdp:
            fsdp = ("fsdp_reshard_after_forward", "fsdp_cpu_offload", "dp_replicate")
            unused |= dict.fromkeys(fsdp, "use_fsdp is off")
        elif self.device in ("cpu", "mps"):
            unused["fsdp_cpu_offload"] = f"device is {self.device}"
        if self.processes == 1:
            unused |= dict.fromkeys(("rank_timeout", "save_timeout"), "one process has no peers")
        if self.resume == "never":
            unused["resume_force"] = "nothing is resumed"
        if not self.wandb_log:
            unused["wandb_project"] = "wandb_log is off"
        if self.lr_schedule == "constant":
            unused |= dict.fromkeys(("min_lr", "lr_decay_iters"), "lr_schedule is constant")
        if (self.warmup_iters or 0) >= self.max_iters:
            unused |= dict.fromkeys(("lr_schedule", "min_lr", "lr_decay_iters"), "the run ends before the warm-up does")
        if self.eval_only:
            training = [f.name for f in dataclasses.fields(self) if f.metadata.get("group") == "optimization"]
            training += ["max_epochs", "packing", "gradient_accumulation_steps", "eval_interval", "checkpoint_interval",
                         "keep_last", "checkpoint_async", "log_interval", "gradient_log_interval", "mfu_peak",
                         "profile", "memory_snapshot"]
            unused |= dict.fromkeys((*training, "dropout"), "eval_only trains nothing")
        if self.dtype in ("bfloat16", "float16"):
            unused["tf32"] = f"dtype is {self.dtype}"
        if self.device in ("cpu", "mps") and "device" not in unused:
            unused["tf32"] = f"device is {self.device}"
            unused["memory_snapshot"] = f"device is {self.device}, and only CUDA's allocator keeps a history"
            if isinstance(self.mfu_peak, str):
                unused["mfu_peak"] = f"device is {self.device}, whose peak is neither dense nor sparse"
        return {k: reason for k, reason in unused.items() if k in self.explicit}


def check_folder_name(key, value):
    """`ConfigError` for the key if `value` is not the name of a folder."""
    if set(value) & set("/\\") or value.startswith(".") or value != value.strip() or len(value.encode()) > 255:
        raise ConfigError(key, f"{short_repr(value)} is not the name of a folder (no slash, no dot in front, no "
                               "space around it, at most 255 bytes)")


def key_fields():
    """{key: dataclass field} of every configuration key, in the order of the help."""
    fields = {f.name: f for cls in (ModelConfig, Config) for f in dataclasses.fields(cls) if f.metadata}
    order = ("architecture", "size", "run", "data", "optimization", "evaluation", "parallel", "system", "dry run",
             "logging")
    return {n: f for group in order for n, f in fields.items() if f.metadata["group"] == group}


# Keys of earlier versions: {old name: new name}. Recorded runs that have them are read as they are.
RENAMED_KEYS = {"fsdp_replicas": "dp_replicate", "keep_checkpoints": "keep_last", "peer_timeout": "rank_timeout",
                "init_from": "resume"}
KEYS = key_fields()
TYPES = key_types(ModelConfig) | key_types(Config)


def world_size():
    """The number of processes that train together, from torchrun's variables."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not re.fullmatch("[1-9][0-9]{0,6}", size):
        raise UserError(f"WORLD_SIZE: {short_repr(size)} is not a number of processes (torchrun sets it; else unset it)")
    for name in ("RANK", "LOCAL_RANK"):
        rank = os.environ.get(name, "0")
        if not re.fullmatch("[0-9]{1,7}", rank) or int(rank) >= int(size):
            raise UserError(f"{name}: {short_repr(rank)} is not the number of one of WORLD_SIZE={size} processes (torchrun "
                            f"sets both; else unset {name})")
    return int(size)


def load_config(argv, restarted=None):
    """The `Config` that `argv` (the command line without the program's name) asks for.

    restarted: the name of the run that torchrun has started again, and that goes on as with --resume=auto.
    Raises `UserError` for every mistake. `--help` prints every key and leaves with exit code 0.
    """
    files, flags = split_arguments(argv)
    given, explicit = {}, {}
    for path in files:
        for name, value in read_config_file(path).items():
            given[name], explicit[name] = coerce(name, value, path), path
    for name, text in flags:
        where = f"--{name}"
        given[name], explicit[name] = coerce(name, parse_value(name, text, where), where), where
    recorded, elsewhere, resuming = {}, "defaults", False
    if restarted:
        given["run_name"], given["resume"] = restarted, "auto"
        explicit.setdefault("run_name", "torchrun")
    if given.get("run_name"):
        run = Path(given.get("out_dir", Config.out_dir), given["run_name"])
        resuming = given.get("resume") == "must" or (given.get("resume") == "auto" and run_exists(run))
        if resuming:
            elsewhere = run / "run.json"
            recorded = recorded_config(elsewhere, explicit["run_name"])
            # The vocabulary it was built with then is not for the dataset to decide again.
            explicit.setdefault("vocab_size", explicit["run_name"])
    try:
        config = make_config({**recorded, **given}, explicit)
    except ConfigError as error:
        raise with_location(error, explicit, elsewhere) from None
    forced = check_resumable(config, given, recorded)
    now = config.flat()
    changed = {k: [recorded[k], now[k]] for k in now if k in recorded and recorded[k] != now[k]}
    return dataclasses.replace(config, changed=changed, forced=forced, resuming=resuming)


def run_exists(run):
    """Whether the directory of a run holds something to go on with: a checkpoint, or the record of how it began."""
    return (run / "run.json").exists() or any((run / "checkpoints").glob("step_*"))


def make_config(given, explicit):
    """The Config of `given` {key: value} over its preset and the defaults; `explicit` {key: where}: set by hand."""
    architecture = {f.name for f in dataclasses.fields(ModelConfig)}
    everything = {**LAPTOP_SIZE, **given}
    model = model_config.apply_preset({k: v for k, v in everything.items() if k in architecture})
    if "activation" in explicit and model.activation and len(model.implied().get("activation", "ab")) == 1:
        raise model.incompatible_key("activation")  # even if it is the same: who sets it expects a choice
    return Config(model=model, explicit=explicit, **{k: v for k, v in everything.items() if k not in architecture})


def with_location(error, explicit, elsewhere="defaults"):
    """The `ConfigError` with the place in front where its key was set; `elsewhere`: that of keys not in `explicit`."""
    # A default can be wrong only beside another key that was set: name that one's place.
    at_fault = [error.key, *(k for k in explicit if re.search(rf"\b{k}=", str(error)))]
    return UserError(f"{next((explicit[k] for k in at_fault if k in explicit), elsewhere)}: {error}")


def split_arguments(argv):
    """argv -> ([config files], [(key, text or None)]): --key=value, --key value, bare --flag."""
    files, flags, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            print(help_text(), flush=True)
            raise SystemExit(0)
        if argument.endswith(".py") and not argument.startswith("-"):
            files.append(argument)
            continue
        name, equals, text = argument.lstrip("-–—").partition("=")  # an editor's dash is no --, but tells what is meant
        if argument[:2] != "--" or not name:
            meant = f" (did you mean --{name}=…?)" if name in KEYS else ""
            raise UserError(f"{short_repr(argument)}: neither a config file (*.py) nor --key=value{meant}")
        if name not in KEYS:
            raise unknown_key(f"--{name}", name)
        if not equals:
            text = None
            if rest and is_value_of(name, rest[0]):
                text = rest.pop(0)
        flags.append((name, text))
    return files, flags


def unknown_key(where, name):
    """The `UserError` for a key that does not exist, or no longer under this name."""
    if name == "init_from":
        return UserError(f"{where}: init_from was replaced by resume (--resume=must in place of --init_from=resume)")
    if name in RENAMED_KEYS:
        return UserError(f"{where}: {name} was renamed to {RENAMED_KEYS[name]} (--{RENAMED_KEYS[name]}=…)")
    own = "" if where.startswith("--") else f", or _{name} for a variable of your own"
    return UserError(f"{where}: {name}: no such key{did_you_mean(name, KEYS)}{own}")


def is_value_of(name, text):
    """Whether `text`, standing behind a bare --name, is its value and not the next argument."""
    return not text.startswith("--") and (str in TYPES[name] or not text.endswith(".py"))


BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def parse_value(name, text, where):
    """The value that `text` means for key `name`: by the key's type, never by guessing at the text's."""
    accepted = TYPES[name]
    if text is None:
        if bool in accepted:
            return True
        raise UserError(f"{where}: {name}: needs a value (--{name}=…)")
    if text in ("None", "none") and type(None) in accepted:
        return None
    if is_nested(name, text):
        return text  # `coerce` reads it
    if bool in accepted:
        if text.lower() in BOOLEANS:
            return BOOLEANS[text.lower()]
        raise UserError(f"{where}: {name}: {short_repr(text)} is not a boolean (True or False)")
    if int in accepted or float in accepted:
        try:
            return float(text) if float in accepted else parse_int(text)
        except ValueError:
            if str not in accepted:
                kind = "a number" if float in accepted else "a whole number"
                raise UserError(f"{where}: {name}: {short_repr(text)} is not {kind}") from None
    return text


def is_nested(name, text):
    """Whether text is meant as a dict or list, for a key that takes one."""
    return (text[:1] == "{" and dict in TYPES[name]) or (text[:1] in ("[", "(") and list in TYPES[name])


def parse_int(text):
    """int of '12', '1_000' or '1e4'; ValueError for anything with a fraction."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():  # neither is nan or inf
            raise ValueError(text) from None
        return int(number)


def read_config_file(path):
    """{key: value} of a flat Python file; looked for from here, then from the project's folder."""
    found = next((p for p in (path, str(ROOT / path)) if os.path.isfile(p)), None)
    if found is None:
        there = sorted(f"config/{p.name}" for p in (ROOT / "config").glob("[!_]*.py"))
        raise UserError(f"{path}: {'not a file' if os.path.isdir(path) else 'no such config file'}"
                        f"{did_you_mean(path, there)}")
    namespace, search_path = {"__name__": Path(found).stem, "__file__": found}, sys.path[:]
    try:
        code = compile(Path(found).read_bytes(), found, "exec")
        sys.path.insert(0, str(ROOT))  # for `from config.arch_llama import *`
        exec(code, namespace)
    except (Exception, SystemExit) as error:  # whatever the file does, it is the file's mistake
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f"line {frame.lineno}: " for frame in reversed(frames) if frame.filename == found), "")
        raise UserError(f"{path}: {line}{type(error).__name__}: {error}") from None
    finally:
        sys.path[:] = search_path
    values = {k: v for k, v in namespace.items() if not k.startswith("_") and not isinstance(v, types.ModuleType)}
    for name in values:
        if name not in KEYS:
            raise unknown_key(path, name)
    return values


def coerce(name, value, where):
    """`value` as the key's type has it, where a file says max_iters = 1e4 or learning_rate = 1; checked."""
    if int in TYPES[name] and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is str and is_nested(name, value):
        try:
            value = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise UserError(f"{where}: {name}: {short_repr(value)} is not a Python dict or list (for the shell, in quotes: "
                            f"--{name}=\"{{'a': 0.7, 'b': 0.3}}\")") from None
    if type(value) in (dict, list, tuple):
        try:
            value = as_json(value)
        except RecursionError:
            raise UserError(f"{where}: {name}: is nested too deeply") from None
    try:
        check_value(KEYS[name], TYPES[name], value)
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from None
    return float(value) if float in TYPES[name] and type(value) is int else value


def as_json(value):
    """A nested value as run.json gives it back: lists, no tuples."""
    if type(value) is dict:
        return {k: as_json(v) for k, v in value.items()}
    return [as_json(v) for v in value] if type(value) in (list, tuple) else value


def recorded_config(path, where):
    """{key: value} as the run whose run.json this is recorded them."""
    try:
        items = json.loads(path.read_bytes())["config"].items()
    except FileNotFoundError:
        there = sorted(p.parent.name for p in path.parent.parent.glob("*/run.json"))
        raise UserError(f"{where}: run_name: there is no run {path.parent} to resume"
                        + did_you_mean(path.parent.name, there)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: run_name: {path} cannot be read ({type(error).__name__}): the run cannot be resumed "
                        "(start another)") from None
    renamed = {RENAMED_KEYS.get(k, k): v for k, v in items}
    return {k: coerce(k, v, path) for k, v in renamed.items()
            if k in KEYS and k not in ("run_name", "out_dir", "resume", "resume_force", "eval_only", "profile")
            and KEYS[k].metadata["group"] != "dry run"}


def check_resumable(config, given, recorded):
    """Refuse by name what would make the rest of a resumed run another experiment than its beginning.

    Under resume_force: a tuple of the names that would have been refused.
    """
    forced = []

    def refuse(name, message):
        if not config.resume_force:
            raise UserError(f"{config.explicit.get(name, 'defaults')}: {name}: {message}, or --resume_force)")
        forced.append(name)

    fixed = [k for k, f in KEYS.items() if f.metadata["group"] in ("architecture", "size") and k != "attention_backend"]
    for name in (*fixed, "seed", "dataset", "dataset_schedule", "packing", "tokenizer"):
        if name in given and name in recorded and given[name] != recorded[name]:
            refuse(name, f"the run was made with {recorded[name]!r} and keeps it when resumed (drop the key, start a "
                         "new run")
    if recorded:
        now = config.batch_size * config.gradient_accumulation_steps
        was = (recorded.get("batch_size", Config.batch_size)
               * recorded.get("gradient_accumulation_steps", Config.gradient_accumulation_steps))
        if now != was:
            refuse("batch_size" if "batch_size" in given else "gradient_accumulation_steps",
                   f"the run takes {was} sequences a step and keeps that when resumed, not {now} (batch_size * "
                   "gradient_accumulation_steps")
    return tuple(forced)


def help_text():
    """Every key by group: its default, what it takes, what it means."""
    lines = ["python train.py [config/*.py ...] [--key=value ...]", "",
             "Later files beat earlier ones and flags beat files; an explicit key beats the preset.",
             "A boolean may stand bare: --compile. Keys that default to None are derived, as their line says."]
    group = None
    for name, f in KEYS.items():
        if f.metadata["group"] != group:
            group = f.metadata["group"]
            lines += ["", group]
        default = LAPTOP_SIZE.get(name, f.default)
        if name == "vocab_size":
            default = None
        options = f" [{' | '.join(f.metadata['choices'])}]" if f.metadata["choices"] else ""
        text = f"{f.metadata['help']}{options}"
        head = f"  --{name}={default}"
        lines += textwrap.wrap(text, 110, initial_indent=f"{head:<40} ", subsequent_indent=" " * 41,
                               break_on_hyphens=False)
    return "\n".join(lines)
