"""The pre-flight: what it says of a run is true, what it advises helps, and it leaves no trace."""

import re

import pytest
import torch
from conftest import ROOT, TINY, run_python
from hypothesis import given, settings
from hypothesis import strategies as st

import training_preflight
from configurator import load_config
from errors import UserError
from model_config import get_preset
from model_flops import GPUS, flops_per_token, gpu_called
from model_memory import MemoryAccount
from training_preflight import (
    DDP,
    FSDP,
    MODES,
    RESERVE,
    SINGLE,
    ZERO1,
    find_target,
    largest,
    machine_memory,
    need,
    preflight,
    table,
)

SMALL = ["config/arch_llama.py", "--n_layer=4", "--n_head=4", "--n_embd=256", "--block_size=256", "--vocab_size=4096",
         "--dry_run", "--dry_run_gpu=T4", "--dataset=nowhere", "--device=cpu"]


@pytest.fixture(scope="module")
def account():
    config = get_preset("llama", n_layer=4, n_head=2, n_embd=64, block_size=32, vocab_size=512)
    return MemoryAccount(config, torch.bfloat16, gpu=True)


def tell(*flags):
    """(exit code, output) of a dry run in this process."""
    config = load_config([*SMALL, *flags])
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_preflight, "tell", lines.append)
        code = preflight(config)
    return code, "\n".join(lines)


# ---- what a process holds


@pytest.mark.parametrize("processes", [1, 2, 8, 64])
def test_state_is_shared_out_as_each_mode_says(account, processes):
    n = sum(p.numel() for p in account.model.parameters())
    steps = 4 * len(account.sizes)  # AdamW's count of steps, a number for each tensor

    def state(mode):
        of = need(account, mode, False, processes, 1, accumulating=True)
        return of.parameters + of.gradients + of.optimizer

    assert state(SINGLE) == state(DDP) == 16 * n + steps
    assert state(ZERO1) == pytest.approx(n * (8 + 8 / processes) + steps / processes, abs=1)
    assert state(FSDP) == pytest.approx(n * 16 / processes + steps / processes, abs=3)


def test_fsdp_gathers_the_two_largest_groups_in_the_products_precision(account):
    block = 4 * 64 * 64 + 3 * 64 * 192 + 2 * 64
    rest = 2 * 512 * 64 + 64
    assert rest > block
    of = need(account, FSDP, False, 8, 1, accumulating=True)
    assert of.gathered == 2 * 2 * (rest + block)  # weights and gradients, in bfloat16
    assert all(need(account, mode, False, 8, 1, True).gathered == 0 for mode in (SINGLE, DDP, ZERO1))


def test_checkpointing_takes_less_and_the_copies_of_weights_go_with_fsdp(account):
    for mode in MODES:
        assert need(account, mode, True, 8, 64, True).total < need(account, mode, False, 8, 64, True).total
    copies = sum(block.copies for block in account.blocks)
    ddp, fsdp = (need(account, mode, False, 8, 64, True).activations for mode in (DDP, FSDP))
    assert ddp - fsdp == copies > 0


def test_the_total_is_the_sum_of_what_is_told(account):
    for mode in MODES:
        of = need(account, mode, False, 4, 3, False)
        assert of.total == (of.parameters + of.gradients + of.optimizer + of.gathered + of.activations + of.logits)


@settings(max_examples=60, deadline=None)
@given(processes=st.integers(2, 4096), sequences=st.integers(1, 500), checkpointing=st.booleans())
def test_fsdp_on_many_never_needs_more_than_one_alone(account, processes, sequences, checkpointing):
    alone = need(account, SINGLE, checkpointing, 1, sequences, accumulating=True)
    here, more = (need(account, FSDP, checkpointing, n, sequences, True) for n in (processes, processes + 1))
    assert more.total <= here.total <= alone.total


@given(limit=st.integers(0, 10**7))
def test_the_largest_number_that_fits_is_found(limit):
    assert largest(lambda n: n <= limit) == limit


def test_the_largest_micro_batch_fits_and_one_more_does_not(account):
    config = load_config([*SMALL, "--gradient_accumulation_steps=8", "--dry_run_gpus=8"])
    rows = table(account, config, budget=2**28)
    assert len(rows) == 8 and all(row.largest for row in rows)
    for row in rows:
        processes = 1 if row.mode is SINGLE else 8
        most, beyond = (need(account, row.mode, row.checkpointing, processes, row.largest + more, row.mode is SINGLE)
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
    assert (gpu_called(said) or GPUS[0]._replace(name=None)).name == meant


def test_every_gpu_of_the_table_is_found_by_its_own_name():
    for gpu in GPUS:
        assert gpu_called(gpu.name) == gpu and gpu.memory > 0 and gpu.watts > 0


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
    account = MemoryAccount(config.model, torch.bfloat16, gpu=True)
    flops, tokens = flops_per_token(account.model, 256), 8 * 256 * 100
    assert code == 0
    for part in ("4L-4H-256D-RoPE-RMS-SwiGLU-PreNorm", f"{account.model.parameter_counts()['total']:,}",
                 f"training {flops['train'] / 1e6:,.2f}M (PaLM", f"{flops['train_causal'] / 1e6:,.2f}M (causal)",
                 f"{tokens:,} tokens", "not known: dataset 'nowhere' does not exist", "A100", "kept aside",
                 f"{80 * RESERVE:.2f} GiB (8%", "eager", "> ", "* an estimate", "fits: single, batch_size=8 needs"):
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
        preflight(load_config(["--dry_run", "--dataset=shakespeare_char", "--data_dir=nowhere", "--device=cpu"]))


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
    large = ["--n_layer=24", "--n_embd=2048", "--n_head=16", "--batch_size=1"]  # 1.3B: 20 GiB of state
    code, text = tell(*large, "--gradient_accumulation_steps=8", "--dry_run_gpus=8")
    assert code == 1 and re.search("no batch_size fits; (ZeRO-1|FSDP).* would, up to batch_size=", text)
    code, text = tell(*large)
    assert code == 1 and "nothing makes it fit on 1 of these: a smaller n_layer" in text


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
    assert re.search(r"^ +FSDP, checkpointing \* .* yes +\d+$", done.stdout, re.MULTILINE)
