"""Keys that do nothing, or something else than they say, where they are set: each is said in one line at the start."""

import pytest

from blockgpt.config_effects import SITUATIONS, SPIKE_FREE_STEPS, Start
from blockgpt.config_fields import example_value
from blockgpt.training.diagnostics import LossSpikeDetector
from blockgpt.training.optimizers import learning_rate
from configurator import KEYS, TYPES, Config, load_config
from model_config import ModelConfig

# Keys of a run that are never without effect; a key of the model is `ModelConfig.unused_keys`' concern.
ALWAYS_HAS_EFFECT = {
    "run_name", "out_dir", "resume", "init_from", "eval_only", "objective", "seed",  # which run it is
    "dataset", "dataset_schedule", "tokenizer", "data_dir", "batch_size",  # what it reads; a phase: see the notes
    "use_fsdp", "tensor_parallel",  # also of one process: how it is built
    "dtype", "dry_run"}
MODEL_KEYS = set(ModelConfig().flat())


def noted(*argv, **start):
    return load_config(argv).keys_without_effect(**start)


def test_every_key_is_in_a_situation_or_always_has_an_effect():
    in_situations = {key for situation in SITUATIONS for key in situation.keys.split()}
    assert in_situations <= set(KEYS)
    assert in_situations - MODEL_KEYS | ALWAYS_HAS_EFFECT == set(KEYS) - MODEL_KEYS
    assert not in_situations & ALWAYS_HAS_EFFECT


# (the flags, what the process is, the keys that are noted). A row of SITUATIONS that none of these reaches is dead.
CASES = [
    (["--dry_run_mfu=1", "--dry_run_gpus=2", "--dry_run_gpu=T4"], {}, "dry_run_gpu dry_run_gpus dry_run_mfu"),
    (["--dry_run", "--learning_rate=1", "--keep_best", "--profile=1:2", "--compile", "--max_iters=3"], {},
     "compile keep_best learning_rate profile"),
    (["--dry_run", "--dry_run_gpu=T4", "--device=cpu"], {}, "device"),
    (["--eval_only", "--max_iters=9", "--use_zero1", "--activation_checkpointing=full", "--eval_tokens=9"], {},
     "activation_checkpointing max_iters use_zero1"),
    (["--fsdp_cpu_offload", "--dp_replicate=1"], {}, "dp_replicate fsdp_cpu_offload"),
    (["--use_fsdp", "--fsdp_cpu_offload"], {"device": "cpu"}, "fsdp_cpu_offload"),
    (["--use_fsdp", "--fsdp_cpu_offload"], {"device": "cuda"}, ""),
    (["--use_fsdp", "--fsdp_reshard_after_forward=False"], {}, "fsdp_reshard_after_forward"),
    (["--rank_timeout=9", "--save_timeout=9", "--join_timeout=9", "--use_zero1"], {},
     "join_timeout rank_timeout save_timeout use_zero1"),
    (["--tf32", "--memory_snapshot", "--mfu_peak=sparse"], {}, ""),
    (["--tf32", "--memory_snapshot", "--mfu_peak=sparse"], {"device": "cpu"}, "memory_snapshot mfu_peak tf32"),
    (["--tf32", "--memory_snapshot", "--mfu_peak=sparse"], {"device": "cuda"}, ""),
    (["--tf32"], {"device": "cuda", "dtype": "bfloat16"}, "tf32"),
    (["--min_lr=0", "--lr_decay_iters=9", "--lr_schedule=constant"], {}, "lr_decay_iters min_lr"),
    (["--warmup_iters=9", "--max_iters=9", "--min_lr=0"], {}, "min_lr"),
    (["--warmup_iters=5", "--lr_schedule=constant"], {"step": 5}, "warmup_iters"),  # a resumed run
    (["--warmup_iters=0", "--lr_schedule=constant"], {"step": 1}, "warmup_iters"),
    (["--warmup_iters=0", "--lr_schedule=constant"], {}, ""),
    (["--warmup_iters=5", "--lr_schedule=constant"], {"step": 4}, ""), (["--warmup_iters=5"], {"step": 5}, ""),
    (["--eval_interval=10", "--checkpoint_interval=10", "--log_interval=10", "--gradient_log_interval=10",
      "--max_iters=9"], {}, "checkpoint_interval eval_interval gradient_log_interval log_interval"),
    (["--eval_interval=9", "--checkpoint_interval=9", "--log_interval=9", "--gradient_log_interval=9",
      "--max_iters=9"], {}, ""),
    (["--gradient_log_interval=5", "--max_iters=9"], {"step": 4}, ""),
    (["--gradient_log_interval=5", "--max_iters=9"], {"step": 5}, "gradient_log_interval"),
    (["--profile=3:5", "--max_iters=9"], {"step": 3}, ""), (["--profile=3:5", "--max_iters=9"], {"step": 4}, "profile"),
    (["--patience=3", "--eval_interval=10", "--max_iters=40"], {}, "patience"),
    (["--patience=3", "--eval_interval=10", "--max_iters=41"], {}, ""),
    (["--skip_spikes", "--spike_threshold=3", "--max_iters=100"], {}, "skip_spikes spike_threshold"),
    (["--skip_spikes", "--max_iters=101"], {}, ""),
    (["--keep_best"], {}, "keep_best"), (["--keep_best", "--checkpoint_interval=0"], {}, ""),
    (["--keep_best", "--checkpoint_interval=0", "--eval_interval=2000"], {}, "keep_best"),
    (["--checkpoint_async", "--keep_last=3", "--checkpoint_interval=0"], {}, "checkpoint_async keep_last"),
    (["--checkpoint_async", "--keep_last=3", "--checkpoint_interval=0", "--keep_best"], {}, ""),
    (["--checkpoint_async", "--keep_last=3"], {}, ""),
    (["--resume_force", "--tracker_project=x"], {}, "resume_force tracker_project"),
]


@pytest.mark.parametrize("argv, start, keys", CASES)
def test_a_key_without_effect_is_named(argv, start, keys):
    assert sorted(noted(*argv, **start)) == keys.split()


def test_every_situation_is_reached_by_a_case():
    config_of = [(load_config(argv), start) for argv, start, _ in CASES]
    reached = {situation for situation in SITUATIONS for config, start in config_of
               if situation.applies(config.start(**start))}
    assert {s.reason for s in SITUATIONS} - {s.reason for s in reached} == {"init_from gives the weights"}


def test_a_key_that_is_not_set_is_never_noted():
    assert load_config(["--eval_only", "--device=cpu"]).notes() == []
    assert Start(load_config([])).config.notes(device="cpu", step=5) == []


NEEDS_MORE = {"init_from", "resume", "tensor_parallel", "dp_replicate"}


@pytest.mark.parametrize("key", sorted(set(KEYS) - MODEL_KEYS - NEEDS_MORE))
def test_notes_can_be_made_of_every_key(key):
    field = KEYS[key]
    config: Config = load_config([f"--{key}={example_value(field, TYPES[key])}"])
    assert all(line.isprintable() for line in config.notes(device="cpu", dtype="float32", step=1))


def test_keys_of_one_reason_are_one_line():
    (line,) = load_config(["--dry_run", "--learning_rate=1", "--beta1=0.5"]).notes()
    assert line == "learning_rate, beta1 have no effect here: dry_run does not train"


def test_spikes_begin_where_the_detector_begins():
    assert SPIKE_FREE_STEPS == LossSpikeDetector.HORIZON


# ---- what is done differently

def test_a_warm_up_as_long_as_the_run_says_which_rate_is_reached():
    config = load_config(["--warmup_iters=1000", "--max_iters=10"])
    (line,) = config.notes()
    assert "rises to 1e-05 of 0.001" in line and learning_rate(9, config) == pytest.approx(1e-5)
    assert not load_config(["--max_iters=10"]).notes()  # the default adapts
    assert load_config(["--warmup_iters=None", "--max_iters=10"]).notes() == []


def test_a_phase_beyond_the_end_and_a_trace_that_begins_late_are_said():
    schedule = "--dataset_schedule=[(0, 'a'), (50, 'b')]"
    assert "from step 50 on is not reached" in load_config([schedule, "--max_iters=50"]).notes()[0]
    assert load_config([schedule, "--max_iters=51"]).notes() == []
    assert "after step 3, and the trace begins there" in load_config(["--profile=3:9"]).notes(step=3)[0]
    assert load_config(["--profile=3:9"]).notes(step=2) == []
