"""The configurator: what a command line, a config file and a recorded run mean, in any order."""

import contextlib
import dataclasses
import io
import json
import re
import string
import subprocess
import sys

import pytest
from conftest import ROOT, config_error
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgpt.config_aliases import ALIASES, NOT_KEYS
from blockgpt.config_fields import example_value
from blockgpt.errors import UserError, exit_on_user_error
from configurator import KEYS, RENAMED_KEYS, TYPES, load_config
from model_config import ModelConfig


def value(key, *argv):
    return load_config(argv).flat()[key]


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """config_file(name, text): write a config file into the current directory, which is not the project's."""
    monkeypatch.chdir(tmp_path)
    return lambda name, text: (tmp_path / name).write_text(text) and name


# Precedence


def test_defaults_then_preset_then_files_then_flags(config_file):
    path = config_file("mine.py", "norm_position = 'post'\nlearning_rate = 2e-3")
    assert value("normalization") == "layernorm_nobias"
    assert value("normalization", "--arch_preset=llama") == "rmsnorm"
    assert value("norm_position", path, "--arch_preset=llama") == "post"
    assert value("norm_position", path, "--norm_position=pre") == "pre"
    assert value("norm_position", "--norm_position=pre", path) == "pre"  # flags override files in any order
    assert value("learning_rate", path) == 2e-3 and value("learning_rate", path, "--learning_rate=1") == 1.0


def test_files_compose_left_to_right(config_file):
    one, two = config_file("one.py", "n_layer = 1\nseed = 1"), config_file("two.py", "n_layer = 2")
    assert value("n_layer", one, two) == 2 and value("n_layer", two, one) == 1
    assert value("seed", one, two) == 1
    assert value("arch_preset", "config/arch_gpt2.py", "config/arch_llama.py", "config/size_tiny.py") == "llama"


@pytest.mark.parametrize("order", [["own.py", "config/arch_llama.py"], ["config/arch_llama.py", "own.py"],
                                   ["--normalization=layernorm", "--arch_preset=llama"],
                                   ["--arch_preset=llama", "--normalization=layernorm"]])
def test_an_explicit_component_overrides_the_preset_in_any_order(config_file, order):
    config_file("own.py", "normalization = 'layernorm'")
    assert load_config(order).model.arch_name().endswith("-RoPE-LN-SwiGLU-PreNorm")


def test_the_last_of_a_key_counts(config_file):
    config = load_config(["--n_layer=2", "--n-layer", "3"])
    assert config.model.n_layer == 3 and config.notes() == ["--n_layer is given more than once: 3 counts, not 2"]
    assert load_config(["--n_layer=3", "--n_layer=3"]).notes() == []
    assert value("arch_preset", config_file("twice.py", "arch_preset = 'gpt2'\narch_preset = 'team'")) == "team"


def test_a_file_may_build_on_a_preset_from_anywhere(config_file):
    path = config_file("mine.py", "import sys\nfrom config.arch_llama import *\n_half = 2\nn_layer = 2 * _half\n"
                                  "sys.path.clear()")
    before = sys.path[:]
    assert value("arch_preset", path) == "llama" and value("n_layer", path) == 4
    assert sys.path == before


def test_a_config_file_need_not_be_in_the_current_directory(config_file, tmp_path):
    assert value("arch_preset", "config/arch_llama.py") == "llama"  # the project's
    config_file("mine.py", "n_layer = 3")
    assert value("n_layer", f"{tmp_path}/mine.py") == 3


# Several datasets


MIXTURE = {"fineweb": 0.7, "pycode": 0.3}
SCHEDULE = [[0, MIXTURE], [20_000, {"pycode": 1}]]


@pytest.mark.parametrize("key, text, expected", [
    ("dataset", "{'fineweb': 0.7, 'pycode': 0.3}", MIXTURE), ("dataset", "mine", "mine"),
    ("dataset_schedule", "[(0, {'fineweb': 0.7, 'pycode': 0.3}), (20_000, {'pycode': 1})]", SCHEDULE),
    ("dataset_schedule", "None", None), ("max_epochs", "{'pycode': 4}", {"pycode": 4}), ("max_epochs", "1.5", 1.5),
])
def test_a_mixture_means_the_same_in_a_flag_in_a_file_and_in_run_json(config_file, key, text, expected):
    flag = value(key, f"--{key}={text}")
    file = value(key, config_file("mine.py", f"{key} = {text if text != 'mine' else repr(text)}"))
    assert flag == file == expected == json.loads(json.dumps(flag))


def test_phases_come_from_dataset_or_dataset_schedule():
    assert load_config([]).phases() == [(0, {"pycode": 1})]
    assert load_config([f"--dataset={MIXTURE}"]).phases() == [(0, MIXTURE)]
    assert load_config([f"--dataset_schedule={SCHEDULE}"]).phases() == [(0, MIXTURE), (20_000, {"pycode": 1})]
    assert load_config(["config/mix_code.py"]).phases()[0][1]["pycode_gpt2"] == 0.65


def test_no_code_in_a_mixture_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "is not a Python dict" in config_error("--dataset={'a': __import__('os').mkdir('pwned')}")
    assert not list(tmp_path.iterdir())


# What a value means


@pytest.mark.parametrize("argument, expected", [
    ("--n_layer=2", 2), ("--max_iters=1e4", 10_000), ("--max_iters=600_000", 600_000), ("--eval_tokens=2.0", 2),
    ("--seed=9007199254740993", 2**53 + 1), ("--learning_rate=1", 1.0), ("--learning_rate=1e-4", 1e-4),
    ("--mfu_peak=312", 312.0), ("--mfu_peak=sparse", "sparse"), ("--compile=None", None), ("--n_kv_head=none", None),
    ("--activation=None", None), ("--run_name=None", None), ("--dataset=None", "None"), ("--run_name=1e4", "1e4"),
    ("--run_name=a=b c", "a=b c"), ("--out_dir==", "="), ("--run_name=żółw", "żółw"), ("--run_name=-x", "-x"),
    ("--tf32=True", True), ("--tf32=false", False), ("--tf32=1", True), ("--tf32=0", False), ("--tf32=No", False),
    ("--tf32=on", True), ("--tf32", True),
])
def test_a_flag_means_what_its_key_takes(argument, expected):
    key = argument[2:].partition("=")[0]
    got = value(key, argument)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize("argv, key, expected", [
    (["--n_layer", "2"], "n_layer", 2), (["--min_lr", "1e-5"], "min_lr", 1e-5), (["--tf32", "False"], "tf32", False),
    (["--tf32", "--n_layer=2"], "tf32", True), (["--tf32", "config/size_tiny.py"], "n_embd", 64),
    (["--run_name", "a b=c"], "run_name", "a b=c"), (["--run_name", "x.py"], "run_name", "x.py"),
    (["--run_name", "-x"], "run_name", "-x"), (["--compile", "None", "config/size_tiny.py"], "n_embd", 64),
    (["--compile"], "compile", True), (["--compile", "--n_layer=2"], "compile", True),
    (["config/arch_llama.py", "--compile", "config/size_tiny.py"], "n_embd", 64), (["--run_name=--"], "run_name", "--"),
    (["--seed", "-0"], "seed", 0), (["--run_name=--help"], "run_name", "--help"),
])
def test_a_value_may_follow_its_flag(argv, key, expected):
    assert value(key, *argv) == expected


@pytest.mark.parametrize("text, expected", [
    ("max_iters = 1e4", 10_000), ("learning_rate = 1", 1.0), ("compile = None", None), ("mfu_peak = 312", 312.0),
    ("tf32 = False", False), ("dataset: str = 'a=b c'", "a=b c"), ("\ufeffn_layer = 2\r\n", 2),
])
def test_a_file_means_what_its_key_takes(config_file, text, expected):
    key = text.strip("\ufeff").split()[0].rstrip(":")
    got = value(key, config_file("mine.py", text))
    assert got == expected and type(got) is type(expected)


def test_a_run_without_sizes_fits_a_laptop_and_a_model_without_sizes_has_124m():
    assert load_config([]).model.n_embd < ModelConfig().n_embd == 768


# Every key with another value


@pytest.mark.grid(4)
@pytest.mark.parametrize("key", list(KEYS))
def test_an_example_means_the_same_in_a_flag_in_a_file_and_in_run_json(config_file, tmp_path, monkeypatch, key):
    example = example_value(KEYS[key], TYPES[key])
    others = []
    if key == "resume":
        others = ["--run_name=mine"]
    elif key == "lr_decay_iters":
        others = ["--max_iters=2000"]
    elif key == "init_from":
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs/other").mkdir(parents=True)
        (tmp_path / "runs/other/run.json").write_text('{"config": {}}')
    elif key in ("tensor_parallel", "dp_replicate"):
        others = ["--use_fsdp", "--gradient_accumulation_steps=2"]
        monkeypatch.setenv("WORLD_SIZE", "2")
    assert example != KEYS[key].default or list(KEYS[key].metadata["choices"]) == [example]
    flat = load_config([*others, f"--{key}={example}"]).flat()
    assert flat[key] == example and flat == load_config([*others, f"--{key}", str(example)]).flat()
    assert flat == load_config([*others, config_file("mine.py", f"{key} = {example!r}")]).flat()
    assert json.loads(json.dumps(flat)) == flat


# Messages


def test_a_mistake_names_the_place_where_it_was_made(config_file):
    path = config_file("mine.py", "n_embd = 100\nn_head = 4\nmin_lr = 1e-4")
    assert config_error(path, "--n_head=3").startswith("--n_head: 3 does not divide n_embd=100")
    assert config_error("--n_head=3", path, "--n_embd=8").startswith("--n_head: 3 does not divide n_embd=8")
    assert config_error("--n_embd=30", path, "--n_head=4").startswith("--n_head: 4 does not divide n_embd=30")
    assert config_error(path, "--learning_rate=1e-5").startswith("mine.py: min_lr: 0.0001 is above learning_rate=1e-05")
    message = config_error(path, "--n_embd=7", "--head_dim=3", "--position_encoding=rope")
    assert message.startswith("--position_encoding: ")
    assert config_error(path, "--head_dim=3", "--arch_preset=llama").startswith("--head_dim: position_encoding: rope ")
    assert config_error("--head_dim=None", path, "--n_embd=7").startswith("mine.py: n_head: 4 does not divide n_embd=7")
    assert config_error(path, "--n_embd=12", "--arch_preset=llama").startswith("--n_embd: position_encoding: rope ")


def test_a_wrong_value_is_refused_even_if_another_overrides_it(config_file):
    assert config_error(config_file("mine.py", "n_layer = '2'"), "--n_layer=2").startswith("mine.py: n_layer: ")


def test_the_processes_divide_the_micro_batches(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert value("gradient_accumulation_steps", "--gradient_accumulation_steps=8") == 8
    message = config_error("--gradient_accumulation_steps=6", "--batch_size=4")
    assert "(--gradient_accumulation_steps=4 or 8; with the same sequences per step: " in message
    again = load_config(message.partition("per step: ")[2].rstrip(")").split())
    assert again.batch_size * again.gradient_accumulation_steps == 24
    assert config_error("--gradient_accumulation_steps=3", "--batch_size=1").endswith("steps=4)")


@pytest.mark.parametrize("flags, steps", [
    ([], 4), (["--tensor_parallel=2", "--use_fsdp"], 2), (["--dry_run", "--dry_run_gpus=6"], 6), (["--dry_run"], 4),
    (["--dry_run_gpus=6"], 4),
])
def test_accumulation_that_is_not_set_is_a_micro_batch_for_each_data_parallel_process(monkeypatch, flags, steps):
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = load_config(flags)
    assert config.gradient_accumulation_steps == steps == config.data_processes
    assert any(f"gradient_accumulation_steps is {steps}" in line for line in config.notes())
    assert not [line for line in load_config([*flags, f"--gradient_accumulation_steps={steps}"]).notes()
                if "gradient_accumulation_steps" in line]


def test_an_explicit_vocabulary_must_hold_the_data():
    assert load_config([]).for_vocabulary(257).model.vocab_size == 320
    assert load_config(["--vocab_size=300"]).for_vocabulary(257).model.vocab_size == 300
    with pytest.raises(UserError, match="--vocab_size: 256 is too small for pycode"):
        load_config(["--vocab_size=256"]).for_vocabulary(257)


@pytest.mark.parametrize("text, message", [
    ("3", "is not START:STOP"), ("a:b", "is not START:STOP"), ("1:2:3", "is not START:STOP"), ("-1:3", "is not START"),
    ("٣:٤", "is not START:STOP"), ("0:3", "has no step"), ("3:3", "has no step"),
    ("5:2", "has no step"), ("9:12", "ends with step 11, beyond max_iters=10"),
])
def test_profile_names_steps_of_the_run(text, message):
    assert config_error(f"--profile={text}", "--max_iters=10").startswith("--profile: ")
    assert message in config_error(f"--profile={text}", "--max_iters=10")


def test_profiled_steps_count_like_the_log_and_end_before_stop():
    assert list(load_config([]).profiled_steps()) == []
    assert load_config(["--profile=9:11", "--max_iters=10"]).profiled_steps() == range(9, 11)


# Renamed keys


@pytest.mark.parametrize("name, flag_message, file_message", [
    ("fsdp_replicas", "was renamed to --dp_replicate", "was renamed to dp_replicate"),
    ("keep_checkpoints", "was renamed to --keep_last", "was renamed to keep_last"),
    ("peer_timeout", "was renamed to --rank_timeout", "was renamed to rank_timeout"),
])
def test_a_renamed_key_is_answered_with_its_new_name(config_file, name, flag_message, file_message):
    for argv in ([f"--{name}=resume"], [f"--{name}", "3"], [f"--{name}"]):
        assert config_error(*argv) == f"--{name}: {flag_message}"
    assert config_error(config_file("mine.py", f"{name} = 3")) == f"mine.py: {name}: {file_message}"


def test_no_renamed_key_is_a_key_and_every_new_name_is():
    assert not set(RENAMED_KEYS) & set(KEYS) and set(RENAMED_KEYS.values()) <= set(KEYS)


# Other programs' names, dashes, negations


@pytest.mark.parametrize("argv, message", [
    (["--lr=3e-4"], "--lr: no such key (did you mean --learning_rate=3e-4?)"),
    (["--lr", "3e-4"], "--lr: no such key (did you mean --learning_rate=3e-4?)"),
    (["--LR"], "--LR: no such key (did you mean --learning_rate=…?)"),
    (["--bf16"], "--bf16: no such key (did you mean --dtype=bfloat16?)"),
    (["--bf16=False"], "--bf16: no such key (did you mean --dtype=…?)"),
    (["--precision=16"], "--precision: no such key (did you mean --dtype=…?)"),
    (["--name=a b"], "--name: no such key (did you mean '--run_name=a b'?)"),
    (["--wandb"], "--wandb: no such key (did you mean --tracker=wandb?)"),
    (["--n-layers=3"], "--n-layers: no such key (did you mean --n_layer=3?)"),
    (["--no-dropout"], "--no-dropout: dropout is not a boolean (--dropout=…)"),
    (["--no_compile=True"], "--no_compile: takes no value (--no_compile, or --compile=…)"),
    (["--no-compiler"], "--no-compiler: no such key (did you mean --compile?)"),
    (["--n-layer"], "--n_layer: needs a value (--n_layer=…)"),
    (["--cpu"], "--cpu: no such key (did you mean --device=cpu?)"),
    (["--gradient_clip_val=1"], "--gradient_clip_val: no such key (did you mean --grad_clip=1?)"),
    (["--num-workers=4"], "--num-workers: no such key: batches are read without worker processes"),
    (["--momentum", "0.9"], "--momentum: no such key: the optimizer is AdamW (--beta1=…)"),
    # what no key is like gets no advice that would do something else
    (["--label_smoothing=0.1"], "--label_smoothing: no such key (--help lists all keys)"),
    (["--ema=0.9"], "--ema: no such key (--help lists all keys)"),
    (["--verbose"], "--verbose: no such key (--help lists all keys)"),
    (["--x"], "--x: no such key (--help lists all keys)"),
])
def test_a_name_that_is_no_key_is_answered_with_the_flag_to_type(argv, message):
    assert config_error(*argv) == message


def test_epochs_are_answered_with_what_there_is():
    assert "--max_iters=N sets" in config_error("--epochs=3") and "--max_epochs=N" in config_error("--num-epochs", "3")


def test_an_alias_in_a_file_is_answered_without_dashes(config_file):
    path = config_file("mine.py", "lr = 1e-3")
    assert config_error(path).startswith("mine.py: lr: no such key (did you mean learning_rate?)")
    assert "(did you mean dtype = 'bfloat16'?)" in config_error(config_file("mine.py", "bf16 = True"))
    assert config_error(config_file("mine.py", "ema = 0.9")).startswith("mine.py: ema: no such key (--help lists all")


@pytest.mark.grid(6)
@pytest.mark.parametrize("name", [*ALIASES, *NOT_KEYS])
def test_every_flag_that_an_answer_names_can_be_typed(name):
    assert name not in KEYS and name == name.lower().replace("-", "_") and name not in RENAMED_KEYS
    message = config_error(f"--{name}")
    assert message.startswith(f"--{name}: no such key")
    flags = re.findall(r"--(\w+)", message.partition("no such key")[2])
    assert set(flags) <= {*KEYS, "standalone", "nproc_per_node"}
    if name in ALIASES:
        key, _, text = ALIASES[name].partition("=")
        assert flags == [key]
        if text:
            assert f"--{key}={text}" in message and load_config([f"--{key}={text}", "--run_name=x"]).flat()[key] == text


@pytest.mark.grid(4)
@pytest.mark.parametrize("key", list(KEYS))
def test_dashes_stand_for_underscores_and_no_negates_every_boolean(key):
    dashed = key.replace("_", "-")
    assert not key.startswith("no_")
    assert outcome([f"--{dashed}=x"], f"--{key}", key) == outcome([f"--{key}=x"], f"--{key}", key)
    if bool in TYPES[key]:
        assert value(key, f"--no-{dashed}") is False and value(key, f"--no_{key}", "config/arch_llama.py") is False
        assert len(load_config([f"--{key}", f"--no-{dashed}"]).remarks) == 1
    else:
        assert "is not a boolean" in config_error(f"--no-{dashed}")


# Notes


@pytest.mark.parametrize("argv, noted", [
    (["--rope_theta=500"], "rope_theta"), (["--arch_preset=llama", "--rope_theta=500"], ""),
    (["--tracker_project=x"], "tracker_project"), (["--tracker_project=x", "--tracker=wandb"], ""),
    (["--lr_schedule=constant", "--min_lr=0", "--lr_decay_iters=9"], "min_lr lr_decay_iters"), (["--min_lr=0"], ""),
    (["--warmup_iters=9", "--max_iters=9", "--lr_schedule=constant"], "lr_schedule"),
    (["--eval_only", "--learning_rate=1", "--dropout=0.1", "--log_interval=9"], "learning_rate dropout log_interval"),
    (["--tf32", "--dtype=bfloat16"], "tf32"), (["--tf32", "--device=cpu"], "tf32"), (["--tf32"], ""),
    (["--dry_run_gpus=2", "--dry_run_mfu=1"], "dry_run_gpus dry_run_mfu"), (["--dry_run", "--dry_run_gpus=1"], ""),
    (["--dry_run", "--dry_run_gpu=T4", "--device=cpu", "--tf32", "--mfu_peak=sparse"], "device"),
    (["--memory_snapshot", "--device=cpu"], "memory_snapshot"), (["--memory_snapshot"], ""),
    (["--eval_only", "--memory_snapshot", "--profile=1:2"], "memory_snapshot profile"),
    (["--mfu_peak=sparse", "--device=cpu"], "mfu_peak"), (["--mfu_peak=9", "--device=cpu"], ""),
    (["config/arch_custom.py", "--arch_preset=llama", "--ffn_type=standard"], ""),
])
def test_a_key_without_effect_is_listed_with_its_reason(argv, noted):
    reasons = load_config(argv).keys_without_effect()
    assert set(reasons) == set(noted.split()) and all(reasons.values())


# Help and imports


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--n_layer=2", "--help"]])
def test_help_names_every_key_its_default_and_its_values(argv, capsys):
    with pytest.raises(SystemExit) as left:
        load_config(argv)
    out = capsys.readouterr().out
    assert left.value.code == 0 and max(map(len, out.splitlines())) <= 120
    text = " ".join(out.split())
    for key, field in KEYS.items():
        assert f"--{key}=" in text and field.metadata["help"] in text
        for choice in field.metadata["choices"] or ():
            assert choice in text
    assert f"--n_embd={load_config([]).model.n_embd} " in text


def test_neither_the_configurator_nor_the_comparison_loads_torch():
    code = ("import sys, configurator, compare_architectures; configurator.load_config(['config/arch_llama.py']); "
            "assert not {'torch', 'numpy'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# For any key, any value, any command line


def valid_values(key):
    """A strategy for values that are legal for the key alone; in a combination they may be refused."""
    limits, types = KEYS[key].metadata, TYPES[key]
    if limits["choices"]:
        values = st.sampled_from(tuple(limits["choices"]))
    elif bool in types:
        values = st.booleans()
    elif key == "device":
        values = st.sampled_from(["auto", "cpu", "cuda", "cuda:7", "mps"])
    elif key == "mfu_peak":
        values = st.sampled_from(["dense", "sparse"]) | st.floats(0, exclude_min=True, allow_infinity=False)
    elif int in types:
        values = st.integers(limits["minimum"], limits["maximum"] or 2**63 - 1)
    elif float in types:
        low = limits["minimum"] if limits["above"] is None else limits["above"]
        values = st.floats(low, limits["below"], exclude_min=limits["above"] is not None,
                           exclude_max=limits["below"] is not None, allow_infinity=False, allow_nan=False)
    else:
        values = st.text(string.ascii_letters + "żα=,'\"{}#$%()+_", min_size=1, max_size=80)
    return values | st.none() if type(None) in types else values


def outcome(argv, location, key):
    """The configuration that argv asks for, or what is wrong with it, without the place where the key was set."""
    try:
        return load_config(argv).flat()
    except UserError as error:
        return str(error).removeprefix(f"{location}: ").removeprefix(f"{key}: ")


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(pair=st.sampled_from(list(KEYS)).flatmap(lambda key: st.tuples(st.just(key), valid_values(key))))
def test_a_value_means_the_same_in_a_flag_and_in_a_file(tmp_path_factory, pair):
    key, value = pair
    path = tmp_path_factory.getbasetemp() / "same.py"
    path.write_text(f"{key} = {value!r}\n", encoding="utf-8")
    from_flag = outcome([f"--{key}={value}"], f"--{key}", key)
    if value not in ("None", "none"):  # a text that a flag takes for the None that its key also takes
        assert from_flag == outcome([str(path)], path, key)
        assert from_flag == outcome([f"--{key}", str(value)], f"--{key}", key)
        assert isinstance(from_flag, str) or from_flag[key] == value


@settings(max_examples=50, deadline=None)
@given(argv=st.lists(st.sampled_from(["config/arch_llama.py", "config/size_tiny.py", "--arch_preset=gpt2",
                                      "--ffn_type=swiglu", "--normalization=rmsnorm", "--min_lr=0", "--tf32",
                                      "--run_name=a b", "--compile=None", "--bias", "--learning_rate=1"]), max_size=5))
def test_the_recorded_keys_are_a_config_file_of_the_same_run(tmp_path_factory, argv):
    path = tmp_path_factory.getbasetemp() / "recorded.py"
    flat = load_config(argv).flat()
    path.write_text("\n".join(f"{key} = {value!r}" for key, value in json.loads(json.dumps(flat)).items()))
    assert load_config([str(path)]).flat() == flat


def load_or_exit(argv):
    """A config that is consistent, or None after exactly one line."""
    err, out, config = io.StringIO(), io.StringIO(), None
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out), exit_on_user_error():
            config = load_config(argv)
    except SystemExit as left:
        line = err.getvalue()
        assert (left.code == 0 and line == "" and out.getvalue()) or (
            left.code == 2 and line.startswith("error: ") and line[:-1].isprintable() and line.endswith("\n"))
        return None
    assert err.getvalue() == out.getvalue() == ""
    json.dumps(config.flat(), allow_nan=False)
    assert config.model.resolve().arch_name() == config.model.arch_name()
    assert set(config.keys_without_effect()) <= set(config.explicit) <= set(KEYS)
    return config


number_like = st.from_regex(r"\A[-+]?[0-9_]{0,30}[.]?[0-9]{0,5}(e[-+]?[0-9]{1,4})?\Z")
texts = st.text(max_size=300) | number_like | st.sampled_from(["None", "nan", "-inf", "True", "resume", "..", "a/b"])
keys = st.sampled_from(list(KEYS))


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(key=keys, text=texts)
def test_any_text_for_any_key_is_a_config_or_one_line(key, text):
    config = load_or_exit([f"--{key}={text}"])
    assert config is None or key in config.explicit


arguments = (st.builds("--{}={}".format, keys, texts) | st.builds("--{}".format, keys | texts) | texts
             | st.sampled_from(["--help", "-h", "--", "-", "config/arch_llama.py", "config/nowhere.py", "config"]))


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(argv=st.lists(arguments, max_size=6))
def test_any_command_line_is_a_config_or_one_line(argv):
    load_or_exit(argv)


literals = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(values=st.dictionaries(keys, literals, min_size=1, max_size=4), more=st.binary(max_size=20) | st.just(b""))
def test_any_config_file_is_a_config_or_one_line(tmp_path_factory, values, more):
    path = tmp_path_factory.getbasetemp() / "any.py"
    text = "\n".join(f"{key} = {value!r}" for key, value in values.items())
    path.write_bytes(text.encode("utf-8", "surrogatepass") + b"\n" + more)
    load_or_exit([str(path)])


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(config=literals | st.dictionaries(keys, literals | st.just(1), max_size=4))
def test_any_recorded_run_resumes_or_is_one_line(tmp_path_factory, config):
    run = tmp_path_factory.getbasetemp() / "resumed"
    run.mkdir(exist_ok=True)
    with contextlib.suppress(TypeError):  # bytes are no JSON
        (run / "run.json").write_text(json.dumps({"config": config}))
    load_or_exit(["--resume=must", "--run_name=resumed", f"--out_dir={run.parent}"])


@pytest.mark.parametrize("value", ["yes", 3, [], {}, None])
def test_a_value_that_no_version_wrote_for_a_former_key_is_one_line(tmp_path, value):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/run.json").write_text(json.dumps({"config": {"wandb_log": value}}))
    with pytest.raises(UserError, match=r"run\.json: tracker: "):
        load_config(["--resume=must", "--run_name=old", f"--out_dir={tmp_path}"])


def test_every_key_has_a_line_of_help_and_a_default_that_it_takes():
    defaults = load_config([]).flat()
    assert list(defaults) and set(defaults) == set(KEYS) == set(TYPES)
    for field in KEYS.values():
        assert field.metadata["help"] and field.default is not dataclasses.MISSING
