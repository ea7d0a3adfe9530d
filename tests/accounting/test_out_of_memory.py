"""The line of a run that is out of memory: it knows the phase and the sizes, and its advice fits both."""

import os
import resource
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, environment
from forked import SERVER, exec_train

from blockgpt.accounting import out_of_memory
from blockgpt.accounting.out_of_memory import (
    PHASES,
    less_state,
    memory_limit,
    out_of_memory_error,
    requested,
    smaller_batch,
)
from blockgpt.errors import OutOfMemoryError
from configurator import load_config
from model_builder import build_model

CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
                         "you tried to allocate 536870912 bytes. Error code 12 (Cannot allocate memory)")
SMALL = ("--n_layer=1", "--n_head=1", "--n_embd=16", "--vocab_size=64")


def message(phase, *flags, limit=2**40, finished=("step",), device="cpu"):
    """The line for `CPU_ERROR` in a phase of the run that the flags describe, where there are `limit` bytes."""
    runtime = SimpleNamespace(device=torch.device(device))
    watchdog = SimpleNamespace(phase=phase, finished_phases=set(finished), runtime=runtime)
    config = load_config([*SMALL, *flags])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(out_of_memory, "memory_limit", lambda runtime: limit)
        error = out_of_memory_error(CPU_ERROR, config, build_model, watchdog)
    assert isinstance(error, OutOfMemoryError) and error.exit_code == 7 and not error.on_all_ranks
    return str(error)


@pytest.mark.parametrize("phase", PHASES)
def test_the_line_names_phase_sizes_and_dry_run_and_a_batch_only_where_there_is_one(phase):
    in_step = phase == "first step"
    line = message("step" if in_step else phase, "--batch_size=4", finished=() if in_step else ("step",))
    assert line.startswith(f"out of memory {PHASES[phase]}: tried to allocate 512 MiB; a process needs 0 MiB for ")
    assert line.endswith("; --dry_run shows what fits)") and "there are 1024.00 GiB in all" in line
    assert ("--batch_size" in line) == (phase in ("first step", "step", "evaluation"))


def test_a_model_that_no_batch_size_makes_fit_gets_no_advice_on_the_batch():
    assert "batch_size=" in message("step", "--batch_size=4", finished=())
    line = message("step", "--batch_size=4", finished=(), limit=2**16)
    assert "batch_size=" not in line and "a smaller n_embd" in line


def test_the_copy_of_a_background_save_is_advised_against():
    assert "--checkpoint_async=False" in message("save", "--checkpoint_async=True")
    assert "checkpoint_async" not in message("save") + message("step", "--checkpoint_async=True")
    assert "--checkpoint_async=False" in message("save", device="cuda")  # the default there
    assert "checkpoint_async" not in message("save", "--checkpoint_async=False", device="cuda")


def test_every_phase_of_a_run_has_words():
    text = "".join((ROOT / name).read_text() for name in ("train.py", "blockgpt/training/faults.py"))
    phases = {part.split('"')[0] for part in text.split('enter_phase("')[1:]}
    assert phases and phases | {"start"} <= PHASES.keys()


@pytest.mark.parametrize("error, is_one", [
    (MemoryError(), True), (OSError(12, "Cannot allocate memory"), True), (OSError(28, "No space left"), False),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), True), (CPU_ERROR, True),
    (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True), (RuntimeError("bad shape"), False),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True)])
def test_errors_of_all_allocators_are_recognised(error, is_one):
    found = out_of_memory_error(error, load_config([*SMALL]), build_model, None)
    assert (found is not None) == is_one
    assert found is None or str(found).startswith("out of memory before the model was built: ")


def test_the_size_is_read_from_the_message():
    assert requested("Tried to allocate 2.00 GiB. GPU") == "tried to allocate 2.00 GiB"
    assert requested("you tried to allocate 1048576 bytes") == "tried to allocate 1 MiB" and requested("no") == ""


@pytest.mark.parametrize("batch_size, checkpointing, changes", [
    (16, "none", ["--batch_size=8 --gradient_accumulation_steps=4", "--activation_checkpointing=full"]),
    (15, "full", ["--batch_size=5 --gradient_accumulation_steps=6"]),
    (1, "selective", ["--activation_checkpointing=full"]), (1, "full", ["a smaller block_size"])])
def test_a_smaller_batch_keeps_the_sequences_per_step(batch_size, checkpointing, changes):
    config = load_config([*SMALL, f"--batch_size={batch_size}", "--gradient_accumulation_steps=2",
                          f"--activation_checkpointing={checkpointing}"])
    assert smaller_batch(config) == changes
    whole_logits = replace(config, model=replace(config.model, loss_chunk=0))
    assert smaller_batch(whole_logits) == ["--loss_chunk=auto", *(c for c in changes if c != "a smaller block_size")]


def test_an_evaluation_keeps_nothing_for_a_backward_pass():
    line = message("evaluation", "--batch_size=4")
    assert "for gradients" in line and "(--batch_size=2 --gradient_accumulation_steps=2, then a smaller n_embd" in line
    line = message("evaluation", "--batch_size=4", "--eval_only=True")
    assert "gradient" not in line and "optimizer" not in line and "(--batch_size=2, then a smaller n_embd" in line


@pytest.mark.parametrize("processes, zero1, fsdp, offload, on_gpu, changes", [
    (1, False, False, False, False, []), (1, False, False, False, True, ["more processes with --use_fsdp=True"]),
    (8, False, False, False, True, ["--use_zero1=True", "--use_fsdp=True"]),
    (8, True, False, False, False, ["--use_fsdp=True"]), (8, False, True, False, True, ["--fsdp_cpu_offload=True"]),
    (8, False, True, True, True, []), (8, False, True, False, False, [])])
def test_the_state_is_sharded_where_it_is_not(processes, zero1, fsdp, offload, on_gpu, changes):
    config = SimpleNamespace(data_processes=processes, use_zero1=zero1, use_fsdp=fsdp, fsdp_cpu_offload=offload)
    assert less_state(config, on_gpu) == [*changes, "a smaller n_embd, n_layer or vocab_size"]


# ---- the real thing

def exec_limited(spare, argv, cwd, env, output):
    """`exec_train` with no more than `spare` bytes of address space in addition to what is in use."""
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare,) * 2)
    assert memory_limit(None) == used + spare
    exec_train(argv, cwd, env, output)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs the sizes of a process, as Linux has them")
@pytest.mark.parametrize("flags, phase, advised", [
    (("--n_layer=24", "--n_embd=2048"), "build", False), (("--n_layer=24", "--n_embd=448"), "first step", False),
    (("--batch_size=512", "--block_size=256", "--n_embd=256"), "first step", True)])
def test_a_run_without_enough_memory_ends_with_one_line(tmp_path, data_dir, flags, phase, advised):
    process = SERVER.Process(target=exec_limited, args=(
        2**30, [*TINY, f"--data_dir={data_dir}", "--run_name=large", "--max_iters=2", *flags], str(tmp_path),
        environment(), f"{tmp_path}/train"))
    process.start()
    process.join(120)
    stderr = (tmp_path / "train.err").read_text()
    assert process.exitcode == 7, stderr
    (line,) = stderr.splitlines()
    assert line.startswith(f"error: out of memory {PHASES[phase]}: tried to allocate ")
    assert ("--batch_size=256" in line) == advised
