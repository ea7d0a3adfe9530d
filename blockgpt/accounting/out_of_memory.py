"""The error of a run that is out of memory, with a hint how to reduce its memory."""

from typing import Any

import torch

from blockgpt.errors import UserError


def out_of_memory_hint(batch_size: int, accumulation: int, processes: int, checkpointing: str, zero1: bool,
                       fsdp: bool) -> str:
    """One line that says what to change, the cheapest change first. Options already in use are left out.

    A smaller batch_size with more accumulation does not change the step, so the losses stay the same.

    Args:
        batch_size: sequences per micro-batch (batch_size).
        accumulation: micro-batches per step (gradient_accumulation_steps).
        processes: data-parallel processes (dp_size).
        checkpointing: activation_checkpointing.
        zero1: use_zero1.
        fsdp: use_fsdp.
    """
    changes = []
    factor = next((n for n in range(2, batch_size + 1) if batch_size % n == 0), None)  # the smallest prime factor
    if factor == 2:
        changes += [f"halve batch_size (--batch_size={batch_size // 2})",
                    f"double gradient_accumulation_steps (--gradient_accumulation_steps={2 * accumulation})"]
    elif factor:
        changes += [f"--batch_size={batch_size // factor} with --gradient_accumulation_steps={factor * accumulation}"]
    if checkpointing != "full":
        changes.append("--activation_checkpointing=full")
    if processes > 1 and not (zero1 or fsdp):
        changes.append("--use_zero1=True")
    if processes > 1 and not fsdp:
        changes.append("--use_fsdp=True")
    return "out of memory: " + ", then ".join(changes or ["a smaller block_size, n_embd or n_layer, or more processes"])


def out_of_memory_error(error: Exception, config: Any) -> UserError | None:
    """The `UserError` with that line, if `error` is an out-of-memory error; else None.

    torch.OutOfMemoryError is CUDA's; on a CPU torch raises a plain RuntimeError.
    """
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
        return None
    hint = UserError(out_of_memory_hint(config.batch_size, config.gradient_accumulation_steps, config.data_processes,
                                        config.activation_checkpointing, config.use_zero1, config.use_fsdp))
    hint.on_all_ranks = False  # one process may be the first to run out
    return hint
