"""The error of a run that is out of memory: in which phase, how much is needed, and what to change."""

import contextlib
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from blockgpt.accounting.dry_run import host_memory
from blockgpt.accounting.memory import MemoryAccount
from blockgpt.accounting.requirements import ModelState, chosen_mode, model_state, tensor_parallel_config
from blockgpt.console import human_bytes
from blockgpt.errors import OutOfMemoryError
from blockgpt.training.device import is_out_of_memory
from blockgpt.training.faults import Watchdog
from blockgpt.training.launch import Runtime

FIRST_STEP = "first step"
PHASES = {  # of the watchdog, and the first step, in words
    "start": "before the model was built", "data": "while opening the data",
    "build": "while building the model and its optimizer",
    "restore": "while loading the checkpoint or the initial weights", "wrap": "while preparing the first step",
    FIRST_STEP: "in the first step, which allocates gradients and optimizer state", "step": "in a step",
    "evaluation": "in an evaluation", "save": "while saving", "end": "at the end of the run"}
IN_STEPS = (FIRST_STEP, "step", "evaluation")
DRY_RUN = "--dry_run shows what fits"


def out_of_memory_error(error: Exception, config: Any, build_model: Callable[[Any], nn.Module],
                        watchdog: Watchdog | None) -> OutOfMemoryError | None:
    """The line for `error`, if it means that memory is lacking; else None.

    Args:
        build_model: builds the model of a config, here without memory.
        watchdog: knows the phase; None before the processes have met.
    """
    if not is_out_of_memory(error):
        return None
    phase = "start" if watchdog is None else watchdog.phase
    if watchdog is not None and phase == "step" and "step" not in watchdog.finished_phases:
        phase = FIRST_STEP
    sizes = [requested(str(error))]
    state, limit = None, memory_limit(watchdog.runtime if watchdog else None)
    with contextlib.suppress(MemoryError, RuntimeError, ValueError):  # there may be no memory for this either
        state = process_state(config, build_model)
        training = "" if config.eval_only else (f", {human_bytes(state.gradients)} for gradients and "
                                                f"{human_bytes(state.optimizer)} for the optimizer")
        sizes.append(f"a process needs {human_bytes(state.parameters)} for parameters{training}, besides activations")
    sizes.append(f"there are {human_bytes(limit)} in all")
    too_large = state is not None and state.parameters + (
        0 if config.eval_only else state.gradients + state.optimizer) > limit
    changes = smaller_batch(config, trains=phase != "evaluation") if phase in IN_STEPS and not too_large else []
    device = None if watchdog is None else watchdog.runtime.device.type
    changes += ["--checkpoint_async=False"] if phase == "save" and config.saves_in_background(device) else []
    changes += less_state(config, on_gpu=device == "cuda")
    return OutOfMemoryError(f"out of memory {PHASES[phase]}: {'; '.join(filter(None, sizes))} "
                            f"({', then '.join(changes)}; {DRY_RUN})")


def requested(message: str) -> str:
    """'tried to allocate 2.00 GiB', if an allocator's message says so."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMG]iB)", message)
    if not found:
        return ""
    size, unit = float(found[1]), {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[found[2]]
    return f"tried to allocate {human_bytes(size * unit)}"


def memory_limit(runtime: Runtime | None) -> int:
    """Bytes of the device's memory, or of the host's."""
    if runtime is not None and runtime.device.type == "cuda":
        return torch.cuda.get_device_properties(runtime.device).total_memory
    return host_memory()


def process_state(config: Any, build_model: Callable[[Any], nn.Module]) -> ModelState:
    """What one process of the run stores between steps."""
    model_config = tensor_parallel_config(config.model, config.tensor_parallel)
    return model_state(MemoryAccount(build_model, model_config, torch.float32, gpu=False), chosen_mode(config)[0])


def smaller_batch(config: Any, trains: bool = True) -> list[str]:
    """Flags that reduce the activations, the cheapest change first. The step, and so the losses, stay the same.

    Args:
        trains: activations are kept for a backward pass.
    """
    batch_size, accumulation = config.batch_size, config.gradient_accumulation_steps
    factor = next((n for n in range(2, batch_size + 1) if batch_size % n == 0), None)  # the smallest prime factor
    changes = ["--loss_chunk=auto"] if config.model.loss_chunk == 0 else []
    if factor:
        steps = "" if config.eval_only else f" --gradient_accumulation_steps={factor * accumulation}"
        changes.append(f"--batch_size={batch_size // factor}{steps}")
    if trains and config.activation_checkpointing != "full":
        changes.append("--activation_checkpointing=full")
    return changes or ["a smaller block_size"]


def less_state(config: Any, on_gpu: bool) -> list[str]:
    """Flags that reduce what a process stores of the model, those in use left out."""
    changes = []
    if config.data_processes > 1 and not (config.use_zero1 or config.use_fsdp):
        changes.append("--use_zero1=True")
    if config.data_processes > 1 and not config.use_fsdp:
        changes.append("--use_fsdp=True")
    elif on_gpu and config.data_processes == 1:
        changes.append("more processes with --use_fsdp=True")
    elif on_gpu and not config.fsdp_cpu_offload:
        changes.append("--fsdp_cpu_offload=True")
    return [*changes, "a smaller n_embd, n_layer or vocab_size"]
