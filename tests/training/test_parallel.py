"""The parallel modes: every one computes what a single process computes."""

import json
import random

import pytest
import torch
from conftest import records
from ranks import run_ranks

from blockgpt.training import launch, parallel
from blockgpt.training.parallel import parallel_mode, parameter_device, seed_micro_batch
from configurator import load_config
from model_config import PRESETS
from tools import bench_parallel

CPU = torch.device("cpu")


# ---- one process

def test_random_numbers_are_a_function_of_seed_step_and_micro_batch():
    def draw(seed, step, index):  # on one process, and by the second of two
        runtime = launch.Runtime(index % 2, 0, 2, CPU, torch.float32, False, False)
        seed_micro_batch(seed, step, index // 2, runtime)
        drawn = torch.rand(4).tolist()
        torch.manual_seed(0)
        seed_micro_batch(seed, step, index, launch.Runtime(0, 0, 1, CPU, torch.float32, False, False))
        assert torch.rand(4).tolist() == drawn
        torch.manual_seed(random.Random(f"{seed} {step} {index}").getrandbits(63))  # as runs of before drew
        assert torch.rand(4).tolist() == drawn
        return drawn

    keys = [(seed, step, index) for seed in (0, 1, 11) for step in (0, 1, 11) for index in (0, 1, 11)]
    first = {key: draw(*key) for key in keys}
    torch.rand(1000)  # random numbers drawn in between change nothing
    assert first == {key: draw(*key) for key in reversed(keys)}
    assert len({tuple(values) for values in first.values()}) == len(keys)


@pytest.mark.parametrize("flags, world_size, mode", [
    ([], 1, "single"), ([], 4, "DDP"), (["--use_zero1=True"], 4, "ZeRO-1"), (["--use_fsdp=True"], 4, "FSDP"),
    (["--tensor_parallel=4"], 4, "TP4"), (["--use_fsdp=True", "--tensor_parallel=2"], 4, "FSDP × TP2")])
def test_the_parallel_mode_of_a_run(monkeypatch, flags, world_size, mode):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    config = load_config(["--n_head=4", "--gradient_accumulation_steps=4", *flags])
    runtime = launch.Runtime(0, 0, world_size, CPU, torch.float32, False, False, tp_size=config.tensor_parallel)
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: world_size > 1)
    assert parallel_mode(config, runtime) == mode


def test_offloaded_parameters_are_on_the_cpu():
    runtime = launch.Runtime(0, 0, 1, torch.device("cuda", 0), torch.float32, False, False)
    assert parameter_device(load_config(["--use_fsdp=True", "--fsdp_cpu_offload=True"]), runtime) == CPU
    assert parameter_device(load_config(["--use_fsdp=True"]), runtime) == runtime.device


# ---- several processes

class Scale(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor, self.weight = factor, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.weight * x * self.factor


def check_gradient_sync():
    config = load_config(["--device=cpu", "--gradient_accumulation_steps=2"])
    runtime = launch.init(config)
    model = Scale(1.0 + runtime.rank)
    wrapped = parallel.wrap(model, config, runtime)
    with torch.no_grad():
        for _ in range(runtime.rank):  # one rank may have more to evaluate than the other
            wrapped.eval()(torch.ones(1))
        wrapped.train()
    for x, now in ((1.0, False), (2.0, True)):
        with parallel.gradient_sync(wrapped, now):
            wrapped(torch.tensor([x * (runtime.rank + 1)])).backward()
        # The rank's own gradient, then the average of the sums over both micro-batches.
        assert model.weight.grad.item() == (7.5 if now else (runtime.rank + 1) ** 2), model.weight.grad
    del wrapped
    launch.shutdown()


@pytest.mark.slow
def test_gradients_are_averaged_after_the_last_micro_batch_only():
    run_ranks(2, check_gradient_sync)


RUNS = [
    # Few models with everything that tensor parallelism shards or replicates.
    ["--position_encoding=alibi", "--qk_norm=projection", "--attn_gate=headwise", "--value_embeddings=1", "--bias=True",
     "--n_kv_head=2", "--attention_backend=manual", "--norm_position=sandwich", "--ffn_type=standard"],
    ["--arch_preset=gemma3", "--qk_norm=head", "--attn_gate=elementwise", "--value_embeddings=1", "--x0_mix=True",
     "--weight_tying=True", "--init=mup", "--qkv_bias=True", "--gradient_accumulation_steps=4",
     "--loss_chunk=20"],
    ["--gradient_log_interval=1", "--packing=documents", "--grad_clip=0.1", "--rope_pattern=NR"],
    ["--dropout=0.3", "--gradient_accumulation_steps=4"],
]
WITHOUT_DROPOUT = ["--gradient_accumulation_steps=4"]


def train_runs(folder, mode, runs):
    """Train `runs` in `mode`: the curve of each, and the gradient statistics of the third by layer."""
    world_size, mode_flags = bench_parallel.MODES[mode]
    folder.mkdir(exist_ok=True)
    (folder / "runs.json").write_text(json.dumps([
        ["config/arch_llama.py", *bench_parallel.SIZE, *mode_flags, "--gradient_accumulation_steps=2", "--max_iters=3",
         "--eval_interval=2", "--eval_tokens=128", f"--out_dir={folder}", f"--run_name={i}", *flags]
        for i, flags in enumerate(runs)]))
    run_ranks(world_size, bench_parallel.train_in_process, folder / "runs.json")
    return ([bench_parallel.read_curve(folder / str(i)) for i in range(len(runs))],
            records(folder / "2", "gradients")[3]["layers"])


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The runs in a single process."""
    return train_runs(tmp_path_factory.mktemp("single"), "single", [*RUNS, WITHOUT_DROPOUT])


@pytest.mark.slow
@pytest.mark.parametrize("modes", [["DDP", "ZeRO-1"], ["FSDP"], ["TP"]], ids=" ".join)
def test_every_mode_computes_what_a_single_process_computes(tmp_path, single, modes):
    single_curves, single_layers = single
    assert abs(single_curves[3][0][0] / single_curves[4][0][0] - 1) > 1e-4  # dropout changes the loss
    curves_of_modes = []
    for mode in modes:
        runs = RUNS[:3] if mode == "TP" else RUNS  # with tensor parallelism, dropout draws other values
        curves, layers = train_runs(tmp_path / mode, mode, runs)
        for flags, curve, expected in zip(runs, curves, single_curves, strict=False):
            assert curve == [pytest.approx(step, rel=1e-6) for step in expected], (mode, flags)
        assert layers == {name: pytest.approx(values, rel=1e-5) for name, values in single_layers.items()}
        curves_of_modes.append(curves)
    assert all(curves == curves_of_modes[0] for curves in curves_of_modes)  # DDP and ZeRO-1 bitwise


@pytest.mark.long
def test_every_mode_trains_every_preset_as_a_single_process_does():
    assert bench_parallel.compare_modes(list(bench_parallel.MODES), sorted(set(PRESETS) - {"custom"}), 50) < 1e-6
