"""The weights of another run as the beginning of a new one (the key `init_from`), or frozen, in any parallel mode.

They are read from a checkpoint, or from the export if the run has no usable one. Optimizer, step and data are the new
run's. Each rank reads its own chunks. Names and shapes of all parameters are checked before the first is copied.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from blockgpt.checkpoints import checkpoint
from blockgpt.checkpoints.files import (
    TORCH_DTYPES,
    Index,
    StoredChunk,
    TensorEntry,
    local_chunk,
    reshard_parameters,
    safetensors_errors,
)
from blockgpt.checkpoints.resume import split_init_from
from blockgpt.errors import CheckpointError, ConfigError
from blockgpt.files import exists, is_dir, sha256_of
from blockgpt.huggingface.hub import checkpoint_directory, is_checkpoint_name
from blockgpt.huggingface.read import Weights, find_family, read_config
from blockgpt.huggingface.source import describe_source
from blockgpt.training.launch import Runtime, run_on_all_ranks


def load_initial_weights(init_from: str, model: torch.nn.Module, runtime: Runtime) -> dict[str, Any]:
    """Copy the weights that `init_from` names into the model.

    Args:
        init_from: runs/NAME, of which the best checkpoint is read, runs/NAME@step, or hf:NAME.
        model: a GPT, parallelized or not.
        runtime: all its ranks call this.

    Returns:
        {path, step, sha256, tokenizer}: the sha256 is that of the checkpoint's manifest or of the exported weights.

    Raises:
        UserError: there are no such weights, or they do not fit the model, which is unchanged.
        CheckpointError: they are damaged.
    """
    if is_checkpoint_name(init_from):
        return load_checkpoint_weights(init_from, model, runtime)
    run_dir, step = split_init_from(init_from)
    path = runtime.on_rank_zero(lambda: choose_source(run_dir, step))
    if path != "export":
        try:
            directory = checkpoint.find_best(run_dir, runtime) if path is None else Path(path)
            if path is not None:
                checkpoint.verify(directory, runtime)
            index, source = checkpoint_source(directory, runtime)
        except CheckpointError:
            if step is not None or not runtime.on_rank_zero(lambda: exists(run_dir / "model.safetensors")):
                raise
            path = "export"
    if path == "export":
        index, source = export_source(run_dir, runtime)
    reshard_parameters(model)
    run_on_all_ranks(runtime, lambda: copy_weights(index, model))
    return source


def load_checkpoint_weights(init_from: str, model: Any, runtime: Runtime) -> dict[str, Any]:
    """`load_initial_weights` of a checkpoint of transformers; each rank translates one tensor after the other."""
    directory = Path(runtime.on_rank_zero(lambda: str(checkpoint_directory(init_from, weights=True))))
    reshard_parameters(model)

    def read() -> None:
        weights = checkpoint_weights(directory, model)
        if runtime.rank == 0:
            weights.echo_notes()
        for name, p in model.named_parameters():
            chunk = local_chunk(p)
            weights.read_into(name, chunk.data, chunk.offsets)

    run_on_all_ranks(runtime, read)
    return {**runtime.on_rank_zero(lambda: describe_source(directory)), "name": init_from}


def checkpoint_weights(directory: Path, model: Any) -> Weights:
    """The tensors of a checkpoint of transformers, whose names and shapes are those of the model (else `UserError`)."""
    return Weights(directory, find_family(read_config(directory)), model.config.flat(),
                   {name: p.shape for name, p in model.named_parameters()})


def load_companion(init_from: str, model: torch.nn.Module, runtime: Runtime) -> torch.nn.Module:
    """The model with the weights that `init_from` names, frozen: in eval mode, without gradients."""
    load_initial_weights(init_from, model, runtime)
    return model.requires_grad_(False).eval()


def choose_source(run_dir: Path, step: int | None) -> str | None:
    """The checkpoint of `step`; without a step None, for the best, or "export" if the run has no checkpoint."""
    if not is_dir(run_dir):
        raise ConfigError("init_from", f"there is no run {run_dir}")
    steps = {found: path for found, path in checkpoint.list_checkpoints(run_dir)}
    if step is None:
        return "export" if not steps and exists(run_dir / "model.safetensors") else None
    if step not in steps:
        existing = ", ".join(map(str, sorted(steps))) or "none"
        raise ConfigError("init_from", f"{run_dir} has no checkpoint of step {step} (it has {existing})")
    return str(steps[step])


def checkpoint_source(directory: Path, runtime: Runtime) -> tuple[Index, dict[str, Any]]:
    """The tensors of a verified checkpoint, and what `load_initial_weights` returns of it."""
    state = checkpoint.read_state(directory)
    return checkpoint.read_index(directory), {
        "path": str(directory), "step": state["step"],
        "sha256": runtime.on_rank_zero(lambda: sha256_of(directory / "manifest.json")),
        "tokenizer": (state.get("description") or {}).get("tokenizer")}


def export_source(run_dir: Path, runtime: Runtime) -> tuple[Index, dict[str, Any]]:
    """The same of a run's export."""
    description = runtime.on_rank_zero(lambda: checkpoint.verify_export(run_dir))
    path, index = run_dir / "model.safetensors", Index(run_dir, {})
    with safetensors_errors(path), safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            tensor = file.get_slice(name)
            shape = tuple(tensor.get_shape())
            chunk = StoredChunk(path.name, (0,) * len(shape), shape)
            index.entries[name] = TensorEntry(TORCH_DTYPES[tensor.get_dtype()], shape, [chunk])
    return index, {"path": str(path), "step": description.get("step"), "sha256": description["sha256"],
                   "tokenizer": description.get("tokenizer")}


def copy_weights(index: Index, model: torch.nn.Module) -> None:
    """Fill this rank's chunks of all parameters; `UserError` if names or shapes differ, before anything is copied."""
    parameters = dict(model.named_parameters())
    checkpoint.check_parameters(index, {name: p.shape for name, p in parameters.items()})
    for name, p in parameters.items():
        chunk = local_chunk(p)
        index.read_into(name, chunk.data, chunk.offsets)
