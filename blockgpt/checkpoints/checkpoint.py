"""Find, verify, load and export checkpoints. A run resumes in any parallel mode, on any number of processes.

    checkpoints/step_00000250/model-00000.safetensors      the chunks of parameters that rank 0 wrote, by name
                              optimizer-00000.safetensors  … of the optimizer state, as <state>/<parameter name>
                              index.json                   the chunks of each tensor (files.py)
                              state.json                   step, tokens, best so far, scaler, config, versions, model,
                                                           tokenizer, the data's fingerprint
                              manifest.json                size and sha256 of the others, written last

saver.py writes them. Nothing is unpickled, and nothing but the manifest is read before it is verified. An
error on one rank is raised on all ranks. There is no generator state to save: batches and dropout are functions of
(seed, step). All processes see one file system.

A new entry of the state needs no change here. A new file per checkpoint is added to JSON_FILES or TENSOR_FILE.
"""

import errno
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from blockgpt.checkpoints.files import (
    JSON_SUFFIX,
    TENSOR_FILE,
    Index,
    TensorEntry,
    TensorFile,
    is_dtensor,
    local_chunk,
    local_optimizer,
    reshard_parameters,
    safetensors_errors,
)
from blockgpt.console import echo
from blockgpt.errors import CheckpointError, UserError, short_repr
from blockgpt.files import find, fsync_path, is_dir, list_dir, sha256_of, unreadable, write_json
from blockgpt.training.launch import Runtime, run_on_all_ranks

SCHEMA_VERSION = 2
STEP_DIR = re.compile(r"step_(\d{8,18})")
JSON_FILES = ("index.json", "state.json")
SINGLE_PROCESS = Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float32,
                         tf32=False, compile=False)


# ---- find

def list_checkpoints(run_dir: str | Path) -> list[tuple[int, Path]]:
    """[(step, directory)] of a run, the newest first, verified or not; `UserError` if they cannot be listed."""
    paths = list_dir(Path(run_dir) / "checkpoints", "step_*")
    return sorted(((int(m[1]), p) for p in paths if (m := STEP_DIR.fullmatch(p.name))), reverse=True)


@overload
def find_newest(run_dir: str | Path, runtime: Runtime = ..., or_none: Literal[False] = ...) -> Path: ...
@overload
def find_newest(run_dir: str | Path, runtime: Runtime = ..., or_none: bool = ...) -> Path | None: ...
def find_newest(run_dir: str | Path, runtime: Runtime = SINGLE_PROCESS, or_none: bool = False) -> Path | None:
    """The newest checkpoint of a run that verifies, the same on all ranks. A warning names each one that is skipped.

    Args:
        or_none: return None if the run has no checkpoint at all, not even a damaged one.

    Raises:
        CheckpointError: there is none.
        UserError: it cannot be told, because something may not be read.
    """
    names = runtime.on_rank_zero(lambda: [path.name for _, path in list_checkpoints(run_dir)])
    for name in names:
        path = Path(run_dir) / "checkpoints" / name
        if is_valid(path, runtime):
            return path
    if or_none and not names:
        return None
    raise CheckpointError(f"{run_dir} has no usable checkpoint (start a new run with another --run_name)")


def find_best(run_dir: str | Path, runtime: Runtime = SINGLE_PROCESS) -> Path:
    """The checkpoint with the lowest validation loss; the newest if none was evaluated or that one is not usable."""
    newest = find_newest(run_dir, runtime)
    best = read_state(newest).get("best")
    path = newest.with_name(f"step_{best['step']:08d}") if best else newest
    return path if path == newest or is_valid(path, runtime) else newest


def is_valid(path: Path, runtime: Runtime = SINGLE_PROCESS) -> bool:
    """Whether a checkpoint verifies. Rank zero prints a warning if it does not."""
    try:
        verify(path, runtime)
        return True
    except CheckpointError as error:
        if runtime.rank == 0:
            echo(f"warning: skipped: {error}", sys.stderr)
        return False


# ---- verify

def verify(path: str | Path, runtime: Runtime = SINGLE_PROCESS, group: dist.ProcessGroup | None = None) -> None:
    """Check that a checkpoint has exactly the files of its manifest, bit for bit, and that its index matches them.

    The files are divided among the ranks. Hidden files, which a file manager may add, are ignored.

    Raises:
        CheckpointError: it does not, on all ranks.
    """
    run_on_all_ranks(runtime, lambda: verify_own_files(Path(path), runtime), group)


def verify_own_files(path: Path, runtime: Runtime) -> None:
    manifest = read_manifest(path)
    for name in sorted(manifest)[runtime.rank::runtime.world_size]:
        file = path / name
        try:
            size, digest = file.stat().st_size, None
            if size == manifest[name]["size"]:
                digest = sha256_of(file)
        except OSError as error:
            raise read_error(file, error) from None
        if size != manifest[name]["size"]:
            raise CheckpointError(f"{file}: has {size} bytes, the manifest says {manifest[name]['size']}")
        if digest != manifest[name]["sha256"]:
            raise CheckpointError(f"{file}: is damaged (its sha256 is not the manifest's)")
    if runtime.rank == 0:
        read_state(path)
        read_index(path).check(name for name in manifest if TENSOR_FILE.fullmatch(name))


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """{file name: {"size", "sha256"}} of a checkpoint; `CheckpointError` unless exactly these regular files exist."""
    status = find(path)
    if status is not None and path.is_symlink():
        raise CheckpointError(f"{path}: is a symbolic link")
    if status is None or not stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{path}: {'does not exist' if status is None else 'is not a directory'}")
    manifest = read_json(path / "manifest.json")
    if "model.safetensors" in manifest:
        raise CheckpointError(f"{path}: was written in format 1, this program reads {SCHEMA_VERSION} (resume it with "
                              "the version of the program that wrote it)")
    for name, entry in manifest.items():
        if name not in JSON_FILES and not TENSOR_FILE.fullmatch(name):
            raise CheckpointError(f"{path}/manifest.json: {short_repr(name)} is not a file of a checkpoint")
        if type(entry) is not dict or type(entry.get("size")) is not int or type(entry.get("sha256")) is not str:
            raise CheckpointError(f"{path}/manifest.json: {short_repr(name)} has no valid size and sha256")
    try:
        modes = {p.name: p.lstat().st_mode for p in list_dir(path)}
    except OSError as error:
        raise read_error(path, error) from None
    for name in sorted({*JSON_FILES, "manifest.json"} | manifest.keys() | modes.keys()):
        if name not in modes:
            raise CheckpointError(f"{path}: has no file {name}")
        if name not in manifest and name != "manifest.json":
            raise CheckpointError(f"{path}: {short_repr(name)} is not in the manifest")
        if not stat.S_ISREG(modes[name]):  # a link could lead anywhere
            raise CheckpointError(f"{path}/{name}: is not a regular file")
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `CheckpointError` if there is none."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
        value = json.loads(path.read_bytes())
    except CheckpointError:
        raise
    except OSError as error:
        raise read_error(path, error) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not an object")
    return value


def read_error(path: Path, error: OSError) -> UserError:
    """The error for a file of a checkpoint that cannot be read.

    It is a `CheckpointError` where the file is lost or damaged. Otherwise the checkpoint may be good, and no older one
    takes its place: training would be done again, and the good one overwritten.
    """
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO):
        return CheckpointError(f"{path}: cannot be read: {error.strerror}")
    return unreadable(path, error)


def read_state(path: Path) -> dict[str, Any]:
    """The state of a verified checkpoint: what `CheckpointSaver.save` was given, and versions, world_size."""
    state = read_json(path / "state.json")
    version = state.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise CheckpointError(f"{path}: was written in format {short_repr(version)} by another version of this "
                              f"program, this version reads {SCHEMA_VERSION}")
    best, directory_name = state.get("best"), STEP_DIR.fullmatch(path.name)
    for step in (state.get("step"), 0 if best is None else best.get("step") if isinstance(best, dict) else None):
        if type(step) is not int or not 0 <= step < 10**18:
            raise CheckpointError(f"{path}/state.json: step or best.step is not a step")
    if directory_name and int(directory_name[1]) != state["step"]:
        raise CheckpointError(f"{path}: is the checkpoint of step {state['step']}")
    return state


def read_index(path: Path) -> Index:
    return Index(path, read_json(path / "index.json"))


# ---- load

def load(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer,
         runtime: Runtime = SINGLE_PROCESS) -> dict[str, Any]:
    """Load a verified checkpoint: each rank reads its own chunks of model and optimizer state.

    Returns:
        the checkpoint's state

    Raises:
        UserError: it is of another architecture; model and optimizer are unchanged.
    """
    state: dict[str, Any] = {}

    def read() -> None:
        state.update(read_state(path))
        load_tensors(read_index(path), model, local_optimizer(optimizer))

    reshard_parameters(model)
    run_on_all_ranks(runtime, read)
    return state


@torch.no_grad()
def load_tensors(index: Index, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill this rank's parameters and optimizer state from an `Index`."""
    parameters = dict(model.named_parameters())
    check_parameters(index, {name: p.shape for name, p in parameters.items()})
    entries: dict[str, dict[str, TensorEntry]] = {}  # {parameter name: {state key: entry}}
    for key in index.optimizer_keys():
        state_key, _, name = key.partition("/")
        entries.setdefault(name, {})[state_key] = index.entries[key]
    names = {p: name for name, p in parameters.items()}
    own = [(names[p], p) for group in optimizer.param_groups for p in group["params"] if p in names]
    if not entries:  # a checkpoint of step 0
        own = []
    for name, p in own:
        if name not in entries:
            raise CheckpointError(f"{index.directory}: has no optimizer state for {name}")
        for state_key, entry in entries[name].items():
            if is_dtensor(p) and entry.shape not in ((), tuple(p.shape)) and not state_key.endswith(JSON_SUFFIX):
                raise UserError(f"{index.directory}: {state_key} of {name} has shape {entry.shape}, which cannot be "
                                f"sharded as the parameter's {tuple(p.shape)} is (resume without use_fsdp and "
                                "tensor_parallel)")
    for name, p in parameters.items():
        chunk = local_chunk(p)
        index.read_into(name, chunk.data, chunk.offsets)
    optimizer.state.clear()
    for name, p in own:
        for state_key, entry in entries[name].items():
            is_json = state_key.endswith(JSON_SUFFIX)
            if entry.shape == tuple(p.shape) and not is_json:
                value = torch.zeros_like(p, dtype=entry.dtype)  # sharded as p is
            else:
                value = torch.zeros(entry.shape, dtype=entry.dtype, device=p.device)
            chunk = local_chunk(value)
            index.read_into(f"{state_key}/{name}", chunk.data, chunk.offsets)
            if is_json:
                state_key, value = state_key.removesuffix(JSON_SUFFIX), json.loads(bytes(value.tolist()))
            optimizer.state[p][state_key] = value


def check_parameters(index: Index, shapes: Mapping[str, Sequence[int]]) -> None:
    """`UserError` unless the checkpoint has exactly the parameters `shapes` {name: shape}."""
    stored = set(index.parameter_names())
    missing, extra = sorted(shapes.keys() - stored), sorted(stored - shapes.keys())
    if missing or extra:
        raise UserError(f"{index.directory}: is not of this architecture (missing {missing[:3]}, unexpected "
                        f"{extra[:3]})")
    for name, shape in shapes.items():
        if tuple(shape) != index.entries[name].shape:
            raise UserError(f"{index.directory}: {name} has shape {index.entries[name].shape}, in this model "
                            f"{tuple(shape)}")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """{name: whole CPU tensor} of the parameters in a verified checkpoint."""
    index = read_index(path)
    return {name: index.read(name) for name in index.parameter_names()}


# ---- export

def export(run_dir: str | Path, path: Path, description: Mapping[str, Any], runtime: Runtime = SINGLE_PROCESS) -> None:
    """Write the final `model.safetensors` and `config.json` (`description`, the sha256) from the checkpoint at `path`.

    Rank zero writes them, one tensor in memory at a time.

    Raises:
        OSError: a write failed; raised on all ranks.
    """
    def write() -> None:
        if runtime.rank == 0:
            write_export(Path(run_dir), read_index(path), description)
    run_on_all_ranks(runtime, write)


def write_export(run_dir: Path, index: Index, description: Mapping[str, Any]) -> None:
    temporary = run_dir / ".export.tmp"
    remove(temporary)  # of an export that was killed
    try:
        temporary.mkdir()
        layout = {name: (index.entries[name].dtype, index.entries[name].shape) for name in index.parameter_names()}
        with TensorFile(temporary / "model.safetensors", layout) as file:
            digest = file.write_tensors(index.read)["sha256"]
        write_json(temporary / "config.json", {**description, "sha256": digest})
        fsync_path(temporary)
        for name in ("config.json", "model.safetensors"):
            os.replace(temporary / name, run_dir / name)
        fsync_path(run_dir)
    finally:
        remove(temporary)


def verify_export(run_dir: str | Path) -> dict[str, Any]:
    """The description of a run's export; `CheckpointError` if it is missing or damaged."""
    file, config = Path(run_dir) / "model.safetensors", Path(run_dir) / "config.json"
    description = read_json(config)
    try:
        if description.get("sha256") != sha256_of(file):
            raise CheckpointError(f"{file}: is damaged (its sha256 is not that of {config.name})")
    except OSError as error:
        raise read_error(file, error) from None
    return description


def read_export(run_dir: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """({name: CPU tensor}, description) of a run's export; `CheckpointError` if it is missing or damaged."""
    description = verify_export(run_dir)
    path = Path(run_dir) / "model.safetensors"
    with safetensors_errors(path):
        return load_file(path), description


# ---- remove

def clean(run_dir: str | Path) -> None:
    """Remove what killed saves and exports left. Only one process may call this at a time."""
    for stale in [*list_dir(Path(run_dir) / "checkpoints", ".step_*.tmp"), *list_dir(run_dir, ".export.tmp")]:
        remove(stale)


def discard(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so no half of it is visible; `clean` removes what remains."""
    renamed = path.with_name(f".{path.name}.old.tmp")
    try:
        os.rename(path, renamed)
        remove(renamed)
    except OSError:
        pass


def remove(path: Path) -> None:
    if not path.is_symlink() and is_dir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
