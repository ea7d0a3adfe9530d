"""What one process of each parallel mode needs, compared with how torch shards parameters and optimizer state."""

import contextlib
import dataclasses

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from blockgpt.accounting.memory import MemoryAccount
from blockgpt.accounting.requirements import (
    SINGLE,
    ParallelMode,
    ceil_div,
    chosen_mode,
    memory_need,
    model_state,
    parallel_modes,
    tensor_parallel_config,
    unsharded_bytes,
    zero1_optimizer_bytes,
)
from blockgpt.training.optimizers import build_optimizer
from blockgpt.training.recompute import CHECKPOINTING_MODES, recompute
from configurator import load_config
from model_builder import build_model
from model_config import get_preset

EIGHT_GPUS = ["config/arch_llama.py", "--n_layer=4", "--n_head=4", "--n_embd=256", "--dry_run", "--dry_run_gpu=T4",
              "--dry_run_gpus=8", "--gradient_accumulation_steps=8", "--device=cpu"]


@pytest.fixture(scope="module")
def account():
    config = get_preset("llama", n_layer=4, n_head=2, n_embd=64, block_size=32, vocab_size=512)
    return MemoryAccount(build_model, config, torch.bfloat16, gpu=True)


def ddp(n):
    return ParallelMode("DDP", n)


def zero1(n):
    return ParallelMode("ZeRO-1", n, zero1=True, shards=n)


def fsdp(n, **options):
    return ParallelMode("FSDP", n, fsdp=True, shards=n, **options)


@contextlib.contextmanager
def fake_process_group(processes, rank=0):
    """A process group whose other processes do not exist: enough to ask torch what each process would hold."""
    dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---- the mode of a run


@pytest.mark.parametrize("flags, name, checkpointing", [
    ([], "DDP", "none"), (["--use_zero1", "--activation_checkpointing=full"], "ZeRO-1", "full"),
    (["--use_fsdp", "--activation_checkpointing=selective"], "FSDP", "selective"),
    (["--tensor_parallel=8", "--n_head=8"], "TP8", "none"),
    (["--use_fsdp", "--tensor_parallel=2"], "FSDP × TP2", "none"),
    (["--dry_run_gpus=1"], "single", "none"), (["--dry_run_gpus=1", "--use_zero1"], "single", "none"),
    (["--dry_run_gpus=1", "--use_fsdp"], "FSDP", "none")],
    ids=lambda x: " ".join(x) if isinstance(x, list) else x)
def test_the_mode_follows_from_the_keys(flags, name, checkpointing):
    config = load_config([*EIGHT_GPUS, *flags])
    mode, chosen_checkpointing = chosen_mode(config)
    assert (mode.name, chosen_checkpointing) == (name, checkpointing)
    assert mode in parallel_modes(config)


def test_hybrid_sharding_splits_over_the_processes_of_one_replica():
    config = load_config([*EIGHT_GPUS, "--use_fsdp", "--dp_replicate=2", "--fsdp_reshard_after_forward=False",
                          "--fsdp_cpu_offload"])
    mode, _ = chosen_mode(config)
    assert (mode.shards, mode.dp_size, mode.reshard_after_forward, mode.cpu_offload) == (4, 8, False, True)


# ---- what one process holds


@pytest.mark.parametrize("processes", [1, 2, 8, 64])
def test_each_mode_shards_what_it_says(account, processes):
    n = sum(p.numel() for p in account.model.parameters())
    steps = 4 * len(account.parameter_sizes)  # AdamW's step counts

    def state(mode):
        need = memory_need(account, mode, "none", 1, accumulating=True)
        return need.parameters + need.gradients + need.optimizer

    assert state(SINGLE) == state(ddp(processes)) == 16 * n + steps
    assert state(zero1(processes)) == 8 * n + zero1_optimizer_bytes(account, processes)
    assert state(fsdp(processes)) == 4 * n + 12 * n / processes + steps  # every first dimension is a multiple of 64


@pytest.mark.parametrize("processes", [2, 3, 4, 5, 100])
@pytest.mark.parametrize("overrides", [{}, {"init": "mup", "n_layer": 1}], ids=["usual", "muP"])
def test_zero1_assigns_as_torchs_optimizer_does(processes, overrides):
    config = get_preset("gpt2_openai", **{**dict(n_layer=3, n_head=2, n_embd=48, block_size=8, vocab_size=33),
                                          **overrides})
    groups = build_optimizer(build_model(config), load_config(["--device=cpu"]), torch.device("cpu")).param_groups
    with fake_process_group(processes):
        optimizer = ZeroRedundancyOptimizer([{"params": group["params"]} for group in groups], torch.optim.AdamW)
        state_bytes = [sum(8 * p.numel() + 4 for group in owned for p in group["params"])
                       for owned in optimizer._partition_parameters()]
    account = MemoryAccount(build_model, config, torch.float32, gpu=False)
    assert zero1_optimizer_bytes(account, processes) == max(state_bytes) >= account.optimizer_bytes / processes


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_fsdps_shard_is_that_of_torchs_first_process(processes, tied):
    config = get_preset("llama", n_layer=2, n_head=1, n_embd=46, d_ff=61, block_size=8, vocab_size=33,
                        weight_tying=tied)
    account = MemoryAccount(build_model, config, torch.float32, gpu=False)
    with fake_process_group(processes), torch.device("meta"):
        model, mesh = build_model(config), init_device_mesh("cpu", (processes,))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
        own = sum(p.to_local().numel() for p in model.parameters())
        count = len(list(model.parameters()))
    state = model_state(account, fsdp(processes))
    assert (state.parameters, state.gradients, state.optimizer) == (4 * own, 4 * own, 8 * own + 4 * count)
    assert state.unsharded_gradients == account.gradient_bytes


def test_fsdp_gathers_blocks_in_the_precision_of_the_products_and_the_rest_in_float32(account):
    block = 4 * 64 * 64 + 3 * 64 * 192 + 2 * 64
    outside_blocks = 2 * 512 * 64 + 64
    weights, head = 4 * outside_blocks + 2 * 2 * block, 4 * (512 * 64 + 64)
    assert unsharded_bytes(account, fsdp(8), False, in_blocks=False) == weights
    assert unsharded_bytes(account, fsdp(8), False, in_blocks=True) == weights + 4 * block + head
    assert unsharded_bytes(account, fsdp(8), True, in_blocks=True) == weights + 4 * block + 2 * block
    not_resharded = fsdp(8, reshard_after_forward=False)
    assert unsharded_bytes(account, not_resharded, True, in_blocks=False) == weights + 2 * 2 * block  # all four
    assert all(memory_need(account, mode, "none", 1, True).unsharded == 0 for mode in (SINGLE, ddp(8), zero1(8)))


@pytest.mark.slow
@pytest.mark.parametrize("reshard", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("sequences, n_layer, width, vocab_size", [
    pytest.param(4, 5, 256, 512, marks=pytest.mark.long), (2, 4, 128, 4096)])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING_MODES)
def test_fsdps_peak_is_at_most_the_estimate(checkpointing, sequences, n_layer, width, vocab_size, reshard):
    config = get_preset("llama", n_layer=n_layer, n_head=4, n_embd=width, block_size=64, vocab_size=vocab_size)
    idx = torch.zeros(sequences, 64, dtype=torch.long)
    account = MemoryAccount(build_model, config, torch.float32, gpu=False)
    with fake_process_group(4):
        model, mesh = recompute(build_model(config), checkpointing), init_device_mesh("cpu", (4,))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh, **({} if module is model else {"reshard_after_forward": reshard}))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def backward(last):
            model.set_requires_gradient_sync(last)
            model(idx, idx).backward()

        for accumulating in (False, True):
            backward(True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if accumulating:
                backward(False)
            tracker = MemTracker()
            tracker.track_external(model, optimizer)
            with tracker:
                backward(True)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            snapshot, = tracker.get_tracker_snapshot("peak").values()
            mode = fsdp(4, reshard_after_forward=reshard)
            estimate = memory_need(account, mode, checkpointing, sequences, accumulating).total
            assert snapshot["Total"] <= estimate <= 1.15 * snapshot["Total"]


def test_offloaded_state_is_not_on_the_device(account):
    on_device, offloaded = (memory_need(account, fsdp(8, cpu_offload=o), "none", 4, False) for o in (False, True))
    assert offloaded == dataclasses.replace(on_device, parameters=0, gradients=0, optimizer=0)
    on_cpu = MemoryAccount(build_model, account.model.config, torch.float32, gpu=False)  # its memory is the host's
    assert memory_need(on_cpu, fsdp(8, cpu_offload=True), "none", 4, False).parameters > 0


def test_tensor_parallelism_splits_matrices_and_their_activations():
    config = get_preset("llama3", n_layer=2, n_head=4, n_kv_head=2, n_embd=64, d_ff=128, block_size=32, vocab_size=512)
    full = MemoryAccount(build_model, config, torch.bfloat16, gpu=True)
    half = MemoryAccount(build_model, tensor_parallel_config(config, 2), torch.bfloat16, gpu=True)
    tp2 = ParallelMode("TP2", tp_size=2)
    vectors = 4 * sum(p.numel() for p in full.model.parameters() if p.dim() < 2)
    assert model_state(half, tp2).parameters == (full.parameter_bytes - vectors) // 2 + vectors
    before, after = (memory_need(account, mode, "none", 8, True) for account, mode in ((full, SINGLE), (half, tp2)))
    assert before.activations / 2 < after.activations < before.activations


def test_checkpointing_needs_less_and_fsdp_caches_no_weight_copies(account):
    for mode in (SINGLE, ddp(8), zero1(8), fsdp(8)):
        totals = [memory_need(account, mode, mode_name, 64, True).total for mode_name in ("full", "selective", "none")]
        assert totals == sorted(set(totals))
    copies = sum(block.weight_copies for block in account.blocks)
    replicated, sharded = (memory_need(account, mode, "none", 64, True).activations for mode in (ddp(8), fsdp(8)))
    assert replicated - sharded == copies > 0


def test_the_total_is_the_sum_of_the_columns(account):
    for mode in (SINGLE, ddp(4), zero1(4), fsdp(4)):
        need = memory_need(account, mode, "none", 3, False)
        assert need.total == (need.parameters + need.gradients + need.optimizer + need.unsharded + need.activations
                              + need.logits)


@settings(max_examples=60, deadline=None)
@given(processes=st.integers(2, 4096), sequences=st.integers(1, 500),
       checkpointing=st.sampled_from(sorted(CHECKPOINTING_MODES)))
def test_fsdp_on_more_processes_never_needs_more(account, processes, sequences, checkpointing):
    fewer, more = (memory_need(account, fsdp(n), checkpointing, sequences, True) for n in (processes, processes + 1))
    assert more.total <= fewer.total


@given(a=st.integers(0, 10**20), b=st.integers(1, 10**9))
def test_ceil_div_rounds_up(a, b):
    assert (ceil_div(a, b) - 1) * b < a <= ceil_div(a, b) * b
