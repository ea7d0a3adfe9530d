"""--dry_run: what it prints of a run is true, the change it proposes makes the run fit, and nothing is written."""

import re

import pytest
import torch
from conftest import ROOT, TINY, environment
from forked import run_train

from blockgpt.accounting import dry_run as dry_run_module
from blockgpt.accounting.dry_run import (
    CHECKPOINTING,
    RESERVE,
    dry_run,
    find_target,
    host_memory,
    memory_table,
    table_notes,
    time_text,
)
from blockgpt.accounting.flops import flops_per_token
from blockgpt.accounting.memory import MemoryAccount
from blockgpt.accounting.requirements import SINGLE, ParallelMode, memory_need
from blockgpt.errors import UserError
from blockgpt.training.recompute import CHECKPOINTING_MODES
from configurator import load_config
from model_builder import build_model
from model_config import get_preset

SMALL = ["config/arch_llama.py", "--n_layer=4", "--n_head=4", "--n_embd=256", "--block_size=256", "--vocab_size=4096",
         "--dry_run", "--dry_run_gpu=T4", "--dataset=nowhere", "--device=cpu"]
EIGHT_GPUS = ["--dry_run_gpus=8", "--gradient_accumulation_steps=8"]


def run(*flags):
    """(exit code, output) of a dry run in this process."""
    config = load_config([*SMALL, *flags])
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run_module, "echo", lines.append)
        code = dry_run(config, build_model)
    return code, "\n".join(lines)


@pytest.fixture(scope="module")
def account():
    config = get_preset("llama", n_layer=4, n_head=2, n_embd=64, block_size=32, vocab_size=512)
    return MemoryAccount(build_model, config, torch.bfloat16, gpu=True)


# ---- the table


@pytest.mark.slow
@pytest.mark.parametrize("budget", [2**28, 2**20])
def test_the_largest_batch_fits_and_one_more_sequence_does_not(account, budget):
    rows = memory_table(account, load_config([*SMALL, *EIGHT_GPUS]), budget)
    assert len(rows) == 12
    for row in rows:
        assert row.largest or budget == 2**20
        for sequences in {row.largest, row.largest + 1} - {0}:
            need = memory_need(account, row.mode, row.checkpointing, sequences, accumulating=row.mode is SINGLE)
            assert (need.total <= budget) == (sequences <= row.largest)
        assert row.fits == (row.need.total <= budget)


def test_the_table_has_every_activation_checkpointing_mode():
    assert set(CHECKPOINTING) == set(CHECKPOINTING_MODES)


# ---- the device


def test_the_dtype_is_one_that_the_gpu_has():
    assert find_target(load_config([*SMALL, "--dry_run_gpu=H100"])).dtype == torch.bfloat16
    assert find_target(load_config([*SMALL, "--dry_run_gpu=T4"])).dtype == torch.float32
    assert find_target(load_config([*SMALL, "--dry_run_gpu=T4", "--dtype=float16"])).dtype == torch.float16


def test_the_memory_of_this_computer_is_divided_among_the_processes():
    flags = ["--dry_run", "--device=cpu", "--gradient_accumulation_steps=2", "--dry_run_gpus=2"]
    target = find_target(load_config(flags))
    assert target.memory == host_memory() // 2 and not target.gpu
    assert 2**28 < host_memory() < 2**50
    assert target.peak is None and find_target(load_config([*flags, "--mfu_peak=2"])).peak == 2e12


def test_under_torchrun_the_processes_are_its_own_and_rank_zero_prints(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    flags = ["--dry_run", "--gradient_accumulation_steps=8"]
    assert load_config(flags).processes == 4
    assert load_config([*flags, "--dry_run_gpus=8"]).processes == 8
    assert load_config([*flags[1:], "--dry_run_gpus=8"]).processes == 4
    monkeypatch.setenv("RANK", "1")
    assert run("--gradient_accumulation_steps=4") == (0, "")


# ---- what is printed


@pytest.mark.slow
def test_the_printed_numbers_are_those_of_the_account():
    flags = ["--dry_run_gpu=A100", "--batch_size=8", "--max_iters=100", "--dry_run_mfu=0.5"]
    config = load_config([*SMALL, *flags])
    code, text = run(*flags)
    account = MemoryAccount(build_model, config.model, torch.bfloat16, gpu=True)
    flops, tokens = flops_per_token(account.model, 256), 8 * 256 * 100
    assert code == 0
    for expected in (
            "4L-4H-256D-RoPE-RMS-SwiGLU-PreNorm", f"{account.model.parameter_counts()['total']:,}",
            f"training {flops['train'] / 1e6:,.2f}M (PaLM", f"{flops['train_causal'] / 1e6:,.2f}M (causal)",
            f"{tokens:,} tokens", "unknown: dataset 'nowhere' does not exist", "A100", "reserved",
            f"{80 * RESERVE:.2f} GiB (8%", "eager", "> ", "single, selective", "fits: single, batch_size=8 needs"):
        assert expected in text
    hours = flops["train"] * tokens / (312e12 * 0.5) / 3600
    assert f"{hours:,.4g} hours" in text and f"{400 * hours / 1000:,.4g} kWh at 400 W" in text
    assert f"{account.saved_in().per_sequence / 256 / 1024:,.1f} KiB" in text


def test_an_unknown_time_or_energy_is_printed_as_unknown(account):
    def time(*flags):
        config = load_config([*SMALL, *flags])
        return time_text(config, find_target(config), account)

    assert time("--tf32=False") == "unknown: no float32 peak is known for T4 (set one with --mfu_peak=TFLOPS)"
    assert re.match("unknown: .*--mfu_peak=TFLOPS", time("--dry_run_gpu=None"))
    assert "energy unknown" in time("--dry_run_gpu=None", "--mfu_peak=1")


@pytest.mark.slow
def test_without_a_gpu_the_target_is_this_computer():
    code, text = run("--dry_run_gpu=None")
    assert code == 0 and "this computer (cpu)" in text and re.search("time +unknown: ", text)


@pytest.mark.slow
def test_epochs_are_those_of_the_prepared_data(data_dir):
    flags = ["--dry_run", *TINY, f"--data_dir={data_dir}", "--max_iters=10"]
    code, text = run(*flags, "--vocab_size=300", "--dry_run_gpu=T4")
    tokens = int(re.search(r"text: ([\d,]+) training tokens", text).group(1).replace(",", ""))
    assert code == 0 and re.search(rf"the run is text {10 * 4 / ((tokens - 1) // 32 - 1):.3g} epochs", text)
    with pytest.raises(UserError, match="vocab_size: 200 is too small"):
        run(*flags, "--vocab_size=200")


def test_without_prepared_data_the_vocabulary_must_be_given():
    config = load_config(["--dry_run", "--dataset=shakespeare_char", "--data_dir=nowhere", "--device=cpu"])
    with pytest.raises(UserError, match=r"dataset 'shakespeare_char' is not prepared: run python data/"):
        dry_run(config, build_model)


@pytest.mark.slow
def test_notes_below_the_table_name_its_limits(account):
    flags = [*EIGHT_GPUS, "--use_fsdp"]
    notes = "\n".join(table_notes(load_config([*SMALL, *flags, "--fsdp_cpu_offload"]), account))
    assert "in the host's memory" in notes and "unsharded: an upper bound" in notes
    text = run(*flags, "--tensor_parallel=2")[1]
    assert "> " in text and "FSDP × TP2" in text and "TP2: an estimate" in text and "ZeRO-1" not in text


# ---- the proposed change


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--batch_size=4096"], ["--batch_size=1000", "--gradient_accumulation_steps=3"],
    ["--batch_size=4096", *EIGHT_GPUS, "--dtype=float16"],
    ["--batch_size=1021"],  # a prime: one sequence per micro-batch
], ids=" ".join)
def test_the_proposed_batch_size_makes_the_run_fit(flags):
    code, text = run(*flags)
    assert code == 1 and "does not fit" in text
    change = re.search(r"as: (--batch_size=\d+ --gradient_accumulation_steps=\d+)$", text, re.MULTILINE)[1].split()
    code, text = run(*flags, *change)
    assert code == 0 and "\nfits: " in text
    before, after = load_config([*SMALL, *flags]), load_config([*SMALL, *flags, *change])
    assert (before.batch_size * before.gradient_accumulation_steps
            == after.batch_size * after.gradient_accumulation_steps)


@pytest.mark.long
def test_if_no_batch_fits_another_mode_is_proposed_or_none():
    large = ["--n_layer=6", "--n_embd=4096", "--n_head=32", "--batch_size=1"]  # 1.3B parameters: 20 GiB of state
    code, text = run(*large, *EIGHT_GPUS)
    change = re.search(r"no batch_size fits; ((?:ZeRO-1|FSDP).*) does, up to batch_size=\d+: (--.*)$", text, re.M)
    assert code == 1 and change
    code, text = run(*large, *EIGHT_GPUS, *change[2].split())
    assert code == 0 and f"fits: {change[1]}, batch_size=1 needs" in text
    code, text = run(*large)
    assert code == 1 and "no mode fits on 1 of these devices: use a smaller n_layer" in text


@pytest.mark.slow
def test_checkpointing_is_proposed_before_another_mode():
    code, text = run("--n_layer=10", "--n_embd=1024", "--n_head=16", "--block_size=16384", "--batch_size=1",
                     *EIGHT_GPUS)
    assert code == 1 and re.search("fits; DDP with (selective|full) activation checkpointing does", text)


# ---- through train.py


@pytest.fixture
def dry_run_command(tmp_path, tmp_path_factory):
    """dry_run_command(*flags) -> the finished process of `train.py --dry_run`, which must not write any file."""
    output = tmp_path_factory.mktemp("output") / "train"

    def run(*flags):
        done = run_train(["--dry_run", *flags], tmp_path, environment(), output)
        assert list(tmp_path.iterdir()) == []
        return done
    return run


@pytest.mark.slow
@pytest.mark.parametrize("batch_size, code, verdict", [(1, 0, "\nfits: "), (100_000, 1, "\ndoes not fit: ")],
                         ids=["fits", "does-not-fit"])
def test_the_exit_code_says_whether_the_run_fits(dry_run_command, batch_size, code, verdict):
    done = dry_run_command(*SMALL, f"--batch_size={batch_size}")
    assert done.returncode == code and not done.stderr and verdict in done.stdout


@pytest.mark.slow
def test_the_embedded_dataset_is_not_prepared_for_a_dry_run(dry_run_command, tmp_path):
    done = dry_run_command(f"--data_dir={tmp_path}/data", "--device=cpu")
    assert done.returncode == 2 and done.stderr.startswith(
        f"error: dataset 'pycode' is not prepared: run python {ROOT}/data/pycode/prepare.py --out_dir ")


@pytest.mark.slow
def test_a_model_far_larger_than_this_computer_needs_no_memory(dry_run_command):
    done = dry_run_command("config/arch_llama.py", "config/size_7b.py", "--dry_run_gpus=8", "--dry_run_gpu=B200",
                           "--dataset=nowhere")
    assert done.returncode == 0, done.stderr
    assert "6,738,415,616" in done.stdout and "8 × B200: 180.00 GiB, 1000 W, bfloat16" in done.stdout
    assert re.search(r"^ +FSDP, full .* yes +\d+$", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_frozen_companions_of_the_objective_are_counted(monkeypatch):
    teacher = get_preset("llama", n_layer=4, n_head=4, n_embd=256, block_size=256, vocab_size=4096)
    weights = sum(4 * p.numel() for p in build_model(teacher).parameters())
    _, without = run(*EIGHT_GPUS)
    monkeypatch.setattr(type(load_config([])), "companion_models", lambda config: [teacher])
    _, text = run(*EIGHT_GPUS)
    assert "frozen" not in without and "frozen: the weights of companion models" in text
    account = MemoryAccount(build_model, teacher, torch.float16, gpu=True, frozen=[teacher])
    ddp, fsdp = (memory_need(account, ParallelMode("", 8, fsdp=sharded, shards=8), "none", 1, accumulating=False)
                 for sharded in (False, True))
    assert (ddp.frozen, fsdp.frozen) == (weights, weights // 8)
    assert ddp.total == sum(vars(ddp).values()) > weights
