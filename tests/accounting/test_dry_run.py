"""The pre-flight: what it says of a run is true, what it advises helps, and it leaves no trace."""

import contextlib
import dataclasses
import re

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY, run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from blockgpt.accounting import dry_run as dry_run_module
from blockgpt.accounting.dry_run import RESERVE, dry_run, find_target, largest, machine_memory, table
from blockgpt.accounting.flops import flops_per_token
from blockgpt.accounting.hardware import GPUS, find_gpu_by_alias
from blockgpt.accounting.memory import MemoryAccount
from blockgpt.accounting.requirements import (
    SINGLE,
    ParallelMode,
    chosen_mode,
    gathered_bytes,
    memory_need,
    most_owned,
    parallel_modes,
    part_of_model,
    state_of,
)
from blockgpt.errors import UserError
from blockgpt.training.optimizers import build_optimizer
from blockgpt.training.recompute import CHECKPOINTING_MODES, recompute
from configurator import load_config
from model_builder import build_model
from model_config import get_preset

SMALL = ["config/arch_llama.py", "--n_layer=4", "--n_head=4", "--n_embd=256", "--block_size=256", "--vocab_size=4096",
         "--dry_run", "--dry_run_gpu=T4", "--dataset=nowhere", "--device=cpu"]


@pytest.fixture(scope="module")
def account():
    config = get_preset("llama", n_layer=4, n_head=2, n_embd=64, block_size=32, vocab_size=512)
    return MemoryAccount(build_model, config, torch.bfloat16, gpu=True)


def tell(*flags):
    """(exit code, output) of a dry run in this process."""
    config = load_config([*SMALL, *flags])
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run_module, "echo", lines.append)
        code = dry_run(config, build_model)
    return code, "\n".join(lines)


def ddp(n):
    return ParallelMode("DDP", n)


def zero1(n):
    return ParallelMode("ZeRO-1", n, zero1=True, shards=n)


def fsdp(n, **others):
    return ParallelMode("FSDP", n, fsdp=True, shards=n, **others)


@contextlib.contextmanager
def pretended(processes, rank=0):
    """A process group whose other processes are not there: enough to ask torch who would hold what."""
    dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---- which mode


@pytest.mark.parametrize("flags, name, kind", [
    ([], "DDP", "none"), (["--use_zero1", "--activation_checkpointing=full"], "ZeRO-1", "full"),
    (["--use_fsdp", "--activation_checkpointing=selective"], "FSDP", "selective"),
    (["--tensor_parallel=8", "--n_head=8"], "TP8", "none"),
    (["--use_fsdp", "--tensor_parallel=2"], "FSDP × TP2", "none"),
    (["--dry_run_gpus=1"], "single", "none"), (["--dry_run_gpus=1", "--use_fsdp"], "FSDP", "none")],
    ids=lambda x: " ".join(x) if isinstance(x, list) else x)
def test_the_mode_is_that_of_the_keys(flags, name, kind):
    config = load_config([*SMALL, "--dry_run_gpus=8", "--gradient_accumulation_steps=8", *flags])
    mode, checkpointing = chosen_mode(config)
    assert (mode.name, checkpointing) == (name, kind)
    assert mode in parallel_modes(config)


def test_hybrid_sharding_splits_over_the_processes_of_one_copy():
    config = load_config([*SMALL, "--dry_run_gpus=8", "--gradient_accumulation_steps=8", "--use_fsdp",
                          "--dp_replicate=2", "--fsdp_reshard_after_forward=False", "--fsdp_cpu_offload"])
    mode, _ = chosen_mode(config)
    assert (mode.shards, mode.data, mode.reshards, mode.offloads) == (4, 8, False, True)


# ---- what a process holds


@pytest.mark.parametrize("processes", [1, 2, 8, 64])
def test_state_is_shared_out_as_each_mode_says(account, processes):
    n = sum(p.numel() for p in account.model.parameters())
    steps = 4 * len(account.sizes)  # AdamW's count of steps, a number for each tensor

    def state(mode):
        of = memory_need(account, mode, "none", 1, accumulating=True)
        return of.parameters + of.gradients + of.optimizer

    assert state(SINGLE) == state(ddp(processes)) == 16 * n + steps
    assert state(zero1(processes)) == 8 * n + most_owned(account, processes)
    assert state(fsdp(processes)) == 4 * n + 12 * n / processes + steps  # every first dimension is a multiple of 64


@pytest.mark.parametrize("processes", [2, 3, 4, 5, 100])
@pytest.mark.parametrize("overrides", [{}, {"init": "mup", "n_layer": 1}], ids=["usual", "muP"])
def test_zero1s_share_is_that_of_torchs_partition(processes, overrides):
    config = get_preset("gpt2_openai", **{**dict(n_layer=3, n_head=2, n_embd=48, block_size=8, vocab_size=33),
                                          **overrides})
    groups = build_optimizer(build_model(config), load_config(["--device=cpu"]), torch.device("cpu")).param_groups
    with pretended(processes):
        shared = ZeroRedundancyOptimizer([{"params": group["params"]} for group in groups], torch.optim.AdamW)
        held = [sum(8 * p.numel() + 4 for group in owned for p in group["params"])
                for owned in shared._partition_parameters()]
    account = MemoryAccount(build_model, config, torch.float32, gpu=False)
    assert most_owned(account, processes) == max(held) >= account.optimizer_bytes / processes


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_fsdps_share_is_that_of_torchs_first_process(processes, tied):
    config = get_preset("llama", n_layer=2, n_head=1, n_embd=46, d_ff=61, block_size=8, vocab_size=33,
                        weight_tying=tied)
    account = MemoryAccount(build_model, config, torch.float32, gpu=False)
    with pretended(processes), torch.device("meta"):
        model, mesh = build_model(config), init_device_mesh("cpu", (processes,))
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
        own = sum(p.to_local().numel() for p in model.parameters())
        count = len(list(model.parameters()))
    state = state_of(account, fsdp(processes))
    assert (state.parameters, state.gradients, state.optimizer) == (4 * own, 4 * own, 8 * own + 4 * count)
    assert state.whole == account.gradient_bytes


def test_fsdp_gathers_blocks_in_the_products_precision_and_the_rest_in_float32(account):
    block = 4 * 64 * 64 + 3 * 64 * 192 + 2 * 64
    rest = 2 * 512 * 64 + 64
    weights, head = 4 * rest + 2 * 2 * block, 4 * (512 * 64 + 64)
    assert gathered_bytes(account, fsdp(8), False, among_blocks=False) == weights
    assert gathered_bytes(account, fsdp(8), False, among_blocks=True) == weights + 4 * block + head
    assert gathered_bytes(account, fsdp(8), True, among_blocks=True) == weights + 4 * block + 2 * block
    assert gathered_bytes(account, fsdp(8, reshards=False), True, False) == weights + 2 * 2 * block  # all four
    assert all(memory_need(account, mode, "none", 1, True).gathered == 0 for mode in (SINGLE, ddp(8), zero1(8)))


@pytest.mark.parametrize("reshards", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("sequences, n_layer, width, vocab_size", [(4, 5, 256, 512), (2, 4, 128, 4096)])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING_MODES)
def test_fsdps_peak_is_at_most_what_is_told(checkpointing, sequences, n_layer, width, vocab_size, reshards):
    config = get_preset("llama", n_layer=n_layer, n_head=4, n_embd=width, block_size=64, vocab_size=vocab_size)
    idx = torch.zeros(sequences, 64, dtype=torch.long)
    account = MemoryAccount(build_model, config, torch.float32, gpu=False)
    with pretended(4):
        model, mesh = recompute(build_model(config), checkpointing), init_device_mesh("cpu", (4,))
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh, **({} if part is model else {"reshard_after_forward": reshards}))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def backward(last):
            model.set_requires_gradient_sync(last)
            model(idx, idx)[1].backward()

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
            told = memory_need(account, fsdp(4, reshards=reshards), checkpointing, sequences, accumulating).total
            assert snapshot["Total"] <= told <= 1.15 * snapshot["Total"]


def test_offloaded_state_is_not_on_the_device(account):
    here, there = (memory_need(account, fsdp(8, offloads=o), "none", 4, False) for o in (False, True))
    assert there == dataclasses.replace(here, parameters=0, gradients=0, optimizer=0)
    with_cpu = MemoryAccount(build_model, account.model.config, torch.float32, gpu=False)  # whose memory is the host's
    assert memory_need(with_cpu, fsdp(8, offloads=True), "none", 4, False).parameters > 0


def test_tensor_parallelism_shares_out_matrices_and_what_they_make():
    config = get_preset("llama3", n_layer=2, n_head=4, n_kv_head=2, n_embd=64, d_ff=128, block_size=32, vocab_size=512)
    whole = MemoryAccount(build_model, config, torch.bfloat16, gpu=True)
    part = MemoryAccount(build_model, part_of_model(config, 2), torch.bfloat16, gpu=True)
    vectors = 4 * sum(p.numel() for p in whole.model.parameters() if p.dim() < 2)
    assert state_of(part, ParallelMode("TP2", tensor=2)).parameters == (whole.parameter_bytes - vectors) // 2 + vectors
    before, after = (memory_need(account, mode, "none", 8, True) for account, mode in
                     ((whole, SINGLE), (part, ParallelMode("TP2", tensor=2))))
    assert before.activations / 2 < after.activations < before.activations


def test_checkpointing_takes_less_and_the_copies_of_weights_go_with_fsdp(account):
    for mode in (SINGLE, ddp(8), zero1(8), fsdp(8)):
        totals = [memory_need(account, mode, kind, 64, True).total for kind in ("full", "selective", "none")]
        assert totals == sorted(set(totals))
    copies = sum(block.copies for block in account.blocks)
    shared, parted = (memory_need(account, mode, "none", 64, True).activations for mode in (ddp(8), fsdp(8)))
    assert shared - parted == copies > 0


def test_the_total_is_the_sum_of_what_is_told(account):
    for mode in (SINGLE, ddp(4), zero1(4), fsdp(4)):
        of = memory_need(account, mode, "none", 3, False)
        assert of.total == (of.parameters + of.gradients + of.optimizer + of.gathered + of.activations + of.logits)


@settings(max_examples=60, deadline=None)
@given(processes=st.integers(2, 4096), sequences=st.integers(1, 500), kind=st.sampled_from(sorted(CHECKPOINTING_MODES)))
def test_fsdp_on_more_never_needs_more(account, processes, sequences, kind):
    here, more = (memory_need(account, fsdp(n), kind, sequences, True) for n in (processes, processes + 1))
    assert more.total <= here.total


@given(limit=st.integers(0, 10**7))
def test_the_largest_number_that_fits_is_found(limit):
    assert largest(lambda n: n <= limit) == limit


def test_the_largest_micro_batch_fits_and_one_more_does_not(account):
    config = load_config([*SMALL, "--gradient_accumulation_steps=8", "--dry_run_gpus=8"])
    rows = table(account, config, budget=2**28)
    assert len(rows) == 12 and all(row.largest for row in rows)
    for row in rows:
        most, beyond = (memory_need(account, row.mode, row.checkpointing, row.largest + more, row.mode is SINGLE)
                        for more in (0, 1))
        assert most.total <= 2**28 < beyond.total
        assert row.fits == (row.need.total <= 2**28)


# ---- on what


@pytest.mark.parametrize("said, meant", [
    ("B200", "B200"), ("nvidia b200", "B200"), ("H100", "H100 80GB HBM3"), ("h100 pcie", "H100 PCIe"),
    ("A100", "A100"), ("A100 40GB", "A100-SXM4-40GB"), ("A100 PCIe", "A100 80GB PCIe"), ("4090", "RTX 4090"),
    ("V100", "V100-SXM2-32GB"), ("Tesla V100-PCIE-16GB", "V100-PCIE"), ("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"),
    ("L4", "L4"), ("L40S", "L40S"), ("H20", "H20"), ("NVIDIA GeForce RTX 3090 Ti", None), ("H900", None), ("-", None),
])
def test_a_gpu_is_known_by_what_people_call_it(said, meant):
    assert (find_gpu_by_alias(said) or GPUS[0]._replace(name=None)).name == meant


def test_every_gpu_of_the_table_is_found_by_its_own_name():
    for gpu in GPUS:
        assert find_gpu_by_alias(gpu.name) == gpu and gpu.memory > 0 and gpu.watts > 0


def test_the_precision_is_what_the_gpu_has():
    assert find_target(load_config([*SMALL, "--dry_run_gpu=H100"])).dtype == torch.bfloat16
    assert find_target(load_config([*SMALL, "--dry_run_gpu=T4"])).dtype == torch.float32
    assert find_target(load_config([*SMALL, "--dry_run_gpu=T4", "--dtype=float16"])).dtype == torch.float16


def test_this_machines_memory_is_shared_by_its_processes():
    flags = ["--dry_run", "--device=cpu", "--gradient_accumulation_steps=2", "--dry_run_gpus=2"]
    target = find_target(load_config(flags))
    assert target.memory == machine_memory() // 2 and not target.gpu
    assert 2**28 < machine_memory() < 2**50
    assert target.peak is None and find_target(load_config([*flags, "--mfu_peak=2"])).peak == 2e12


def test_torchruns_processes_are_those_told_of(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    flags = ["--dry_run", "--gradient_accumulation_steps=8"]
    assert load_config(flags).processes == 4
    assert load_config([*flags, "--dry_run_gpus=8"]).processes == 8
    assert load_config([*flags[1:], "--dry_run_gpus=8"]).processes == 4
    monkeypatch.setenv("RANK", "1")
    assert tell("--gradient_accumulation_steps=4") == (0, "")


# ---- what is told


def test_the_account_of_a_run(data_dir):
    config = load_config([*SMALL, "--dry_run_gpu=A100", "--batch_size=8", "--max_iters=100", "--dry_run_mfu=0.5"])
    code, text = tell("--dry_run_gpu=A100", "--batch_size=8", "--max_iters=100", "--dry_run_mfu=0.5")
    account = MemoryAccount(build_model, config.model, torch.bfloat16, gpu=True)
    flops, tokens = flops_per_token(account.model, 256), 8 * 256 * 100
    assert code == 0
    for part in ("4L-4H-256D-RoPE-RMS-SwiGLU-PreNorm", f"{account.model.parameter_counts()['total']:,}",
                 f"training {flops['train'] / 1e6:,.2f}M (PaLM", f"{flops['train_causal'] / 1e6:,.2f}M (causal)",
                 f"{tokens:,} tokens", "not known: dataset 'nowhere' does not exist", "A100", "kept aside",
                 f"{80 * RESERVE:.2f} GiB (8%", "eager", "> ", "single, selective", "fits: single, batch_size=8 needs"):
        assert part in text
    hours = flops["train"] * tokens / (312e12 * 0.5) / 3600
    assert f"{hours:,.4g} hours" in text and f"{400 * hours / 1000:,.4g} kWh at 400 W" in text
    assert f"{account.saved_in().per_sequence / 256 / 1024:,.1f} KiB" in text


def test_what_cannot_be_known_is_said_to_be_so():
    assert "not known: no float32 peak is known for T4 (set one with --mfu_peak=TFLOPS)" in tell("--tf32=False")[1]
    code, text = tell("--dry_run_gpu=None")
    assert code == 0 and "this machine (cpu)" in text and re.search("time +not known: .*--mfu_peak=TFLOPS", text)
    assert "energy not known" in tell("--dry_run_gpu=None", "--mfu_peak=1")[1]


def test_epochs_are_those_of_the_prepared_data(data_dir):
    flags = ["--dry_run", *TINY, f"--data_dir={data_dir}", "--max_iters=10"]
    code, text = tell(*flags, "--vocab_size=300", "--dry_run_gpu=T4")
    tokens = int(re.search(r"text: ([\d,]+) training tokens", text).group(1).replace(",", ""))
    assert code == 0 and re.search(rf"the run is text {10 * 4 / ((tokens - 1) // 32 - 1):.3g} epochs", text)
    with pytest.raises(UserError, match="vocab_size: 200 is too small"):
        tell(*flags, "--vocab_size=200")


def test_a_dry_run_without_data_needs_the_vocabulary():
    with pytest.raises(UserError, match=r"dataset 'shakespeare_char' is not prepared: run python data/"):
        dry_run(load_config(["--dry_run", "--dataset=shakespeare_char", "--data_dir=nowhere", "--device=cpu"]), build_model)


# ---- advice


@pytest.mark.parametrize("flags", [
    ["--batch_size=4096"], ["--batch_size=1000", "--gradient_accumulation_steps=3"],
    ["--batch_size=4096", "--gradient_accumulation_steps=8", "--dry_run_gpus=8", "--dtype=float16"],
    ["--batch_size=1021"],  # a prime: a sequence at a time
], ids=" ".join)
def test_the_change_that_is_advised_makes_it_fit(flags):
    code, text = tell(*flags)
    assert code == 1 and "does not fit" in text
    change = re.search(r"as: (--batch_size=\d+ --gradient_accumulation_steps=\d+)$", text, re.MULTILINE)[1].split()
    code, text = tell(*flags, *change)
    assert code == 0 and "\nfits: " in text
    before, after = load_config([*SMALL, *flags]), load_config([*SMALL, *flags, *change])
    assert (before.batch_size * before.gradient_accumulation_steps
            == after.batch_size * after.gradient_accumulation_steps)


def test_where_no_batch_fits_another_mode_is_named_or_none():
    large = ["--n_layer=6", "--n_embd=4096", "--n_head=32", "--batch_size=1"]  # 1.3B: 20 GiB of state
    shared = [*large, "--gradient_accumulation_steps=8", "--dry_run_gpus=8"]
    code, text = tell(*shared)
    advice = re.search(r"no batch_size fits; ((?:ZeRO-1|FSDP).*) would, up to batch_size=\d+: (--.*)$", text, re.M)
    assert code == 1 and advice
    code, text = tell(*shared, *advice[2].split())
    assert code == 0 and f"fits: {advice[1]}, batch_size=1 needs" in text
    code, text = tell(*large)
    assert code == 1 and "nothing makes it fit on 1 of these: a smaller n_layer" in text


def test_checkpointing_is_advised_before_another_mode():
    code, text = tell("--n_layer=10", "--n_embd=1024", "--n_head=16", "--block_size=16384", "--batch_size=1",
                      "--dry_run_gpus=8", "--gradient_accumulation_steps=8")
    assert code == 1 and re.search("fits; DDP with (selective|full) activation checkpointing would", text)


def test_what_the_table_leaves_open_is_said():
    flags = ["--dry_run_gpus=8", "--gradient_accumulation_steps=8", "--use_fsdp"]
    assert "in the host's memory" in tell(*flags, "--fsdp_cpu_offload")[1]
    text = tell(*flags, "--tensor_parallel=2")[1]
    assert "> " in text and "FSDP × TP2" in text and "TP2: an estimate" in text and "ZeRO-1" not in text


# ---- through train.py


@pytest.mark.parametrize("batch_size, code", [(1, 0), (100_000, 1)])
def test_the_exit_code_says_whether_it_fits_and_nothing_is_written(tmp_path, batch_size, code):
    done = run_python(ROOT / "train.py", *SMALL, f"--batch_size={batch_size}", cwd=tmp_path)
    assert done.returncode == code and not done.stderr
    assert ("\nfits: " if code == 0 else "\ndoes not fit: ") in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_embedded_dataset_is_not_made_for_a_dry_run(tmp_path):
    done = run_python(ROOT / "train.py", "--dry_run", f"--data_dir={tmp_path}/data", "--device=cpu", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: dataset 'pycode' is not prepared: run python data/")
    assert list(tmp_path.iterdir()) == []


def test_a_model_far_larger_than_this_machine_is_only_thought_of(tmp_path):
    done = run_python(ROOT / "train.py", "config/arch_llama.py", "config/size_7b.py", "--dry_run", "--dry_run_gpus=8",
                      "--dry_run_gpu=B200", "--dataset=nowhere", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "6,738,415,616" in done.stdout and "8 × B200: 180.00 GiB, 1000 W, bfloat16" in done.stdout
    assert re.search(r"^ +FSDP, full .* yes +\d+$", done.stdout, re.MULTILINE)
