"""Config files and --key=value flags in, one typed and validated `Config` out.

Precedence: defaults < the preset that `arch_preset` names < config files, left to right < command line.
A resumed run starts from its own recorded keys in place of the defaults. Every mistake is one line that
names where the key was set, the key, what is wrong and the way out. To add a key: one line in `Config`.
"""

import dataclasses
import json
import os
import re
import sys
import textwrap
import traceback
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import model_config
from errors import ConfigError, UserError, did_you_mean
from model_config import ModelConfig, check_fields, key

ROOT = Path(__file__).resolve().parent

# `ModelConfig` alone is GPT-2's 124M; a run that names no size must start at once on a laptop.
LAPTOP_SIZE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. `model` is the architecture; `explicit` says where a key was set by hand."""

    model: ModelConfig
    explicit: dict  # key -> the file or flag that set it

    run_name: str | None = key(None, "names runs/<run_name>; None: date, time and preset", group="run")
    out_dir: str = key("runs", "where run directories are made", group="run")
    init_from: str = key("scratch", "scratch, or resume: go on with run_name, whose keys are taken over",
                         group="run", choices=("scratch", "resume"))
    eval_only: bool = key(False, "evaluate once and stop", group="run")
    seed: int = key(1337, "of weights, batches and dropout", group="run", minimum=0, maximum=2**63 - 1)

    dataset: str = key("pycode", "a folder under data_dir, made by its prepare.py", group="data")
    data_dir: str | None = key(None, "where datasets stand; None: data/ beside train.py", group="data")
    batch_size: int = key(16, "sequences per micro-batch, on each process", group="data", minimum=1)
    gradient_accumulation_steps: int = key(1, "micro-batches per step, over all processes", group="data", minimum=1)

    max_iters: int = key(2000, "optimizer steps of the whole run", group="optimization", minimum=0)
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

    device: str = key("auto", "auto: cuda, else mps, else cpu; or cpu, cuda, cuda:1, mps", group="system")
    dtype: str = key("auto", "of the matrix products; auto: bfloat16 on CUDA where it has it, else float32",
                     group="system", choices=("auto", "float32", "bfloat16", "float16"))
    tf32: bool = key(True, "TensorFloat-32 products on CUDA where dtype is float32", group="system")
    compile: bool | None = key(None, "torch.compile; None: on CUDA", group="system")
    mfu_peak: str | float = key("dense", "what MFU divides by: dense, sparse (2:4), or TFLOP/s as a number",
                                group="system")

    log_interval: int = key(10, "steps between lines of the log", group="logging", minimum=1)
    gradient_log_interval: int = key(0, "steps between per-layer gradient statistics; 0: never", group="logging",
                                     minimum=0)
    wandb_log: bool = key(False, "send the log to Weights & Biases too", group="logging")
    wandb_project: str = key("blockgpt", "project there", group="logging")

    def __post_init__(self):
        check_fields(self)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if self.gradient_accumulation_steps % processes:
            raise ConfigError("gradient_accumulation_steps", f"{self.gradient_accumulation_steps} cannot be shared by "
                              f"{processes} processes (a multiple of {processes}: it counts over all of them)")
        if self.lr_decay_iters is not None and self.lr_decay_iters < (self.warmup_iters or 0):
            raise ConfigError("lr_decay_iters", f"{self.lr_decay_iters} ends before warmup_iters={self.warmup_iters} "
                                                "(raise it, or lower warmup_iters)")
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ConfigError("min_lr", f"{self.min_lr:g} is above learning_rate={self.learning_rate:g}")
        if self.init_from == "resume" and not self.run_name:
            raise ConfigError("init_from", "resume needs --run_name=NAME, the run to go on with")
        for name in ("run_name", "dataset"):
            value = getattr(self, name)
            if value is not None and (value in ("", ".", "..") or set(value) & set("/\\\0\n\r")):
                raise ConfigError(name, f"{value!r} is not the name of a folder")
        if isinstance(self.mfu_peak, str) and self.mfu_peak not in ("dense", "sparse"):
            raise ConfigError("mfu_peak", f"{self.mfu_peak!r} is unknown (dense, sparse, or TFLOP/s as a number)")
        if not isinstance(self.mfu_peak, str) and self.mfu_peak <= 0:
            raise ConfigError("mfu_peak", f"{self.mfu_peak} is out of range, must be above 0")

    def for_vocabulary(self, n):
        """The config with room for a dataset of n token ids: as set by hand, else n rounded up to a multiple of 64."""
        if "vocab_size" not in self.explicit:
            return dataclasses.replace(self, model=dataclasses.replace(self.model, vocab_size=-(-n // 64) * 64))
        if self.model.vocab_size < n:
            raise UserError(f"{self.explicit['vocab_size']}: vocab_size: {self.model.vocab_size} is too small for "
                            f"{self.dataset}, which has {n} token ids (drop the key to fit the data)")
        return self

    def flat(self):
        """Every key with its value, as the run log keeps it and a config file would set it."""
        keys = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata}
        return {**keys, **self.model.flat()}

    def without_effect(self):
        """{key: reason} of the keys set by hand that change nothing in this combination."""
        unused = dict(self.model.unused_keys())
        if not self.wandb_log:
            unused["wandb_project"] = "wandb_log is off"
        if self.lr_schedule == "constant":
            unused |= dict.fromkeys(("min_lr", "lr_decay_iters"), "lr_schedule is constant")
        if self.eval_only:
            training = [f.name for f in dataclasses.fields(self) if f.metadata.get("group") == "optimization"]
            training += ["gradient_accumulation_steps", "eval_interval", "checkpoint_interval", "log_interval",
                         "gradient_log_interval"]
            unused |= dict.fromkeys((*training, "dropout"), "eval_only trains nothing")
        if self.dtype in ("bfloat16", "float16"):
            unused["tf32"] = f"dtype is {self.dtype}"
        return {k: reason for k, reason in unused.items() if k in self.explicit}


def key_fields():
    """{key: dataclass field} of every configuration key, in the order of the help."""
    fields = {f.name: f for cls in (ModelConfig, Config) for f in dataclasses.fields(cls) if f.metadata}
    order = ("architecture", "size", "run", "data", "optimization", "evaluation", "system", "logging")
    return {n: f for group in order for n, f in fields.items() if f.metadata["group"] == group}


KEYS = key_fields()
TYPES = {n: typing.get_args(t) or (t,) for cls in (ModelConfig, Config)
         for n, t in typing.get_type_hints(cls).items() if n in KEYS}


def load_config(argv):
    """The `Config` that `argv` (the command line without the program's name) asks for.

    Raises `UserError` for every mistake. `--help` prints every key and leaves with exit code 0.
    """
    files, flags = split_arguments(argv)
    given, explicit = {}, {}
    for path in files:
        values = read_config_file(path)
        given |= values
        explicit |= dict.fromkeys(values, path)
    for name, text in flags:
        where = f"--{name}"
        given[name] = parse_value(name, text, where)
        explicit[name] = where
    base = {}
    if given.get("init_from") == "resume" and isinstance(given.get("run_name"), str):
        base = recorded_keys(Path(given.get("out_dir", Config.out_dir)) / given["run_name"], explicit["run_name"])
    if base:  # what it was built with then is not for the dataset to decide again
        explicit.setdefault("vocab_size", explicit["run_name"])
    config = make_config({**base, **given}, explicit)
    check_resumable(config, given, base)
    return config


def make_config(given, explicit):
    """The Config of `given` {key: value} over its preset and the defaults; `explicit` {key: where} is for messages."""
    architecture = {f.name for f in dataclasses.fields(ModelConfig)}
    everything = {**LAPTOP_SIZE, **given}
    try:
        model = model_config.apply_preset({k: v for k, v in everything.items() if k in architecture})
        if explicit.get("activation") and given["activation"] is not None and model.implied().get("activation"):
            raise ConfigError("activation", f"{given['activation']!r} has no place in ffn_type={model.ffn_type}, which "
                                            "brings its own: drop activation, or use ffn_type=standard")
        return Config(model=model, explicit=explicit, **{k: v for k, v in everything.items() if k not in architecture})
    except ConfigError as error:
        # A default can be wrong only beside another key that was set: name that one's place.
        at_fault = [error.key, *(k for k in explicit if re.search(rf"\b{k}\b", str(error)))]
        where = next((explicit[k] for k in at_fault if k in explicit), "defaults")
        raise UserError(f"{where}: {error}") from None


def no_such_key(where, name):
    return UserError(f"{where}: {name or '(empty)'}: no such key{did_you_mean(name, KEYS)}")


def split_arguments(argv):
    """argv -> ([config files], [(key, text or None)]): --key=value, --key value, bare --flag."""
    files, flags, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            print(help_text())
            raise SystemExit(0)
        if not argument.startswith("--"):
            if argument.startswith("-") or not argument.endswith(".py"):
                raise UserError(f"{argument}: neither a config file (*.py) nor --key=value")
            files.append(argument)
            continue
        name, equals, text = argument[2:].partition("=")
        if name not in KEYS:
            raise no_such_key(f"--{name}", name)
        if not equals:
            text = None
            if rest and takes(name, rest[0]):
                text = rest.pop(0)
        flags.append((name, text))
    return files, flags


def takes(name, text):
    """Whether `text`, standing behind a bare --name, is its value and not the next argument."""
    if bool in TYPES[name]:
        return text.lower() in BOOLEANS or text == "None"
    if text.startswith("--"):
        return False
    return not text.endswith(".py") or str in TYPES[name]


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
    if bool in accepted:
        if text.lower() in BOOLEANS:
            return BOOLEANS[text.lower()]
        raise UserError(f"{where}: {name}: {text!r} is not a boolean (True or False)")
    if int in accepted or float in accepted:
        try:
            return float(text) if float in accepted else whole(text)
        except ValueError:
            if str not in accepted:
                kind = "a number" if float in accepted else "a whole number"
                raise UserError(f"{where}: {name}: {text!r} is not {kind}") from None
    return text


def whole(text):
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
    found = next((p for p in (Path(path), ROOT / path) if p.is_file()), None)
    if found is None:
        there = sorted(f"config/{p.name}" for p in (ROOT / "config").glob("*.py"))
        raise UserError(f"{path}: no such config file{did_you_mean(path, there)}")
    namespace = {"__name__": found.stem, "__file__": str(found)}
    sys.path.insert(0, str(ROOT))  # for `from config.arch_llama import *`
    try:
        exec(compile(found.read_bytes(), str(found), "exec"), namespace)
    except SyntaxError as error:
        raise UserError(f"{path}: line {error.lineno}: not Python: {error.msg}") from None
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the file does, it is the file's mistake
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(found)), "?")
        raise UserError(f"{path}: line {line}: {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(str(ROOT))
    values = {k: v for k, v in namespace.items() if not k.startswith("_") and not isinstance(v, types.ModuleType)}
    for name, value in values.items():
        if name not in KEYS:
            raise no_such_key(path, name)
        if int in TYPES[name] and type(value) is float and value.is_integer():
            values[name] = int(value)  # max_iters = 1e4
    return values


def recorded_keys(run_dir, where):
    """{key: value} as the run in `run_dir` recorded them."""
    try:
        config = json.loads((run_dir / "run.json").read_text())["config"]
    except FileNotFoundError:
        there = sorted(p.parent.name for p in run_dir.parent.glob("*/run.json"))
        raise UserError(f"{where}: run_name: there is no run {run_dir} to resume"
                        + (did_you_mean(run_dir.name, there) if there else "")) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: run_name: {run_dir}/run.json cannot be read ({type(error).__name__})") from None
    return {k: v for k, v in config.items() if k in KEYS and k not in ("run_name", "out_dir", "init_from", "eval_only")}


def check_resumable(config, given, base):
    """Refuse by name what would make the rest of a resumed run another experiment than its beginning."""
    fixed = [k for k, f in KEYS.items() if f.metadata["group"] in ("architecture", "size") and k != "attention_backend"]
    for name in (*fixed, "seed", "dataset"):
        if name in given and name in base and given[name] != base[name]:
            raise UserError(f"{config.explicit[name]}: {name}: the run was made with {base[name]!r} and keeps it "
                            "when resumed (drop the key, or start a new run)")
    if base:
        now = config.batch_size * config.gradient_accumulation_steps
        was = base["batch_size"] * base["gradient_accumulation_steps"]
        name = "batch_size" if "batch_size" in given else "gradient_accumulation_steps"
        if now != was:
            raise UserError(f"{config.explicit[name]}: {name}: the run takes {was} sequences a step and keeps that "
                            f"when resumed, not {now} (batch_size * gradient_accumulation_steps)")


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
        lines += textwrap.wrap(text, 110, initial_indent=f"{head:<40} ", subsequent_indent=" " * 41)
    return "\n".join(lines)
