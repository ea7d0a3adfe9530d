"""Save, verify, load: a run continues from here, in whatever mode and on however many processes. No pickle anywhere.

    checkpoints/step_00000250/model-00000.safetensors      the pieces of parameters that rank 0 wrote, by name
                              optimizer-00000.safetensors  … of AdamW's moments, as <moment>/<parameter name>
                              index.json                   where the pieces of each tensor are (training/checkpoint_files.py)
                              state.json                   steps done, tokens, best so far, scaler, config, versions,
                                                           what was built, the tokenizer, the data's fingerprint
                              manifest.json                size and sha256 of the others, written last

Each rank writes what it holds, into a directory beside the checkpoint's place that is renamed into it, so a killed save
leaves nothing under a checkpoint's name; the manifest is checked before anything else is used. Whatever fails on one
rank is an error on all: every step of a save ends in an exchange that no rank can leave out. Random numbers need no
saving: batches and dropout are functions of (seed, step). All processes see one file system.
"""

import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from blockgpt.errors import CheckpointError, UserError, short_repr
from blockgpt.files import fsync_path, sha256_of, write_json
from blockgpt.training.checkpoint_files import (
    SHARD,
    Index,
    TensorFile,
    local_chunk,
    local_optimizer,
    reshard_parameters,
    safetensors_errors,
)
from blockgpt.training.launch import run_on_all_ranks

SCHEMA_VERSION = 2
STEP_DIR = re.compile(r"step_(\d{8,18})")
JSON_FILES = ("index.json", "state.json")
SINGLE_PROCESS = SimpleNamespace(rank=0, world_size=1, all_gather_object=lambda value, group=None: [value])  # the machine of one process


# ---- the parts of a save


# ---- what is there

def clean(run_dir):
    """Remove what killed saves and exports left behind; for one process at a time."""
    for stale in [*(Path(run_dir) / "checkpoints").glob(".step_*.tmp"), *Path(run_dir).glob(".export.tmp")]:
        remove(stale)


def discard(path):
    """Remove a checkpoint, which is whole until it is gone; what cannot be removed now is for the next save."""
    gone = path.with_name(f".{path.name}.old.tmp")
    try:
        os.rename(path, gone)
        remove(gone)
    except OSError:
        pass


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def list_checkpoints(run_dir):
    """[(step, directory)] under run_dir, the newest first."""
    there = (Path(run_dir) / "checkpoints").glob("step_*")
    return sorted(((int(m[1]), p) for p in there if (m := STEP_DIR.fullmatch(p.name))), reverse=True)


def find_newest(run_dir, runtime=SINGLE_PROCESS, or_none=False):
    """The newest checkpoint of a run that verifies, the same on all ranks; each passed over is a warning on stderr.

    `CheckpointError` if there is none. or_none: None where there is not even an unusable one.
    """
    names = runtime.all_gather_object([path.name for _, path in list_checkpoints(run_dir)] if runtime.rank == 0 else None)[0]
    for name in names:
        path = Path(run_dir) / "checkpoints" / name
        if is_usable(path, runtime):
            return path
    if or_none and not names:
        return None
    raise CheckpointError(f"{run_dir} has no usable checkpoint (train it anew under another run_name)")


def find_best(run_dir, runtime=SINGLE_PROCESS):
    """The checkpoint with the lowest validation loss; the newest if none was evaluated or that one is not usable."""
    newest = find_newest(run_dir, runtime)
    best = read_state(newest).get("best")
    path = newest.with_name(f"step_{best['step']:08d}") if best else newest
    return path if path == newest or is_usable(path, runtime) else newest


def is_usable(path, runtime=SINGLE_PROCESS):
    """Whether a checkpoint verifies; one that does not is a warning on stderr, of the first rank."""
    try:
        verify(path, runtime)
        return True
    except CheckpointError as error:
        if runtime.rank == 0:
            print(f"warning: passed over: {error}", file=sys.stderr)
        return False


# ---- verify

def verify(path, runtime=SINGLE_PROCESS, group=None):
    """Check a checkpoint: these files, no others, bit for bit by its manifest, and the index true of them.

    `CheckpointError`, alike on all ranks, if it differs. The ranks share the files out. Hidden files, which a file
    manager may leave, do not count.
    """
    run_on_all_ranks(runtime, lambda: verify_own_files(Path(path), runtime), group)


def verify_own_files(path, runtime):
    manifest = read_manifest(path)
    for name in sorted(manifest)[runtime.rank::runtime.world_size]:
        file = path / name
        try:
            size, digest = file.stat().st_size, None
            if size == manifest[name]["size"]:
                digest = sha256_of(file)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
        if size != manifest[name]["size"]:
            raise CheckpointError(f"{file}: has {size} bytes, the manifest says {manifest[name]['size']}")
        if digest != manifest[name]["sha256"]:
            raise CheckpointError(f"{file}: is damaged (its sha256 is not the manifest's)")
    if runtime.rank == 0:
        read_state(path)
        read_index(path).check(name for name in manifest if SHARD.fullmatch(name))


def read_manifest(path):
    """{file: {"size", "sha256"}} of a checkpoint whose directory holds just these, as files of its own."""
    if path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"{path}: is {'a link' if path.is_symlink() else 'not there'}")
    manifest = read_json(path / "manifest.json")
    if "model.safetensors" in manifest:
        raise CheckpointError(f"{path}: was written in format 1, this program reads {SCHEMA_VERSION} (resume it with "
                              "the version of the program that wrote it)")
    for name, entry in manifest.items():
        if name not in JSON_FILES and not SHARD.fullmatch(name):
            raise CheckpointError(f"{path}/manifest.json: {short_repr(name)} is no file of a checkpoint")
        if type(entry) is not dict or type(entry.get("size")) is not int or type(entry.get("sha256")) is not str:
            raise CheckpointError(f"{path}/manifest.json: is no manifest: {short_repr(name)} has no size and sha256")
    try:
        there = {p.name: p.lstat().st_mode for p in path.iterdir() if not p.name.startswith(".")}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    for name in sorted({*JSON_FILES, "manifest.json"} | manifest.keys() | there.keys()):
        if name not in there:
            raise CheckpointError(f"{path}: has no file {name}")
        if name not in manifest and name != "manifest.json":
            raise CheckpointError(f"{path}: {short_repr(name)} is not in the manifest")
        if not stat.S_ISREG(there[name]):  # a link could lead anywhere
            raise CheckpointError(f"{path}/{name}: is not a file of its own")
    return manifest


def read_json(path):
    """The object in a JSON file; `CheckpointError` if there is none."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise CheckpointError(f"{path}: is not a file of its own")
        value = json.loads(path.read_bytes())
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not an object")
    return value


def read_state(path):
    """The state of a verified checkpoint, as `save` was given it, and versions, world_size."""
    state = read_json(path / "state.json")
    version = state.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise CheckpointError(f"{path}: was written in format {short_repr(version)} by another version of this program, "
                              f"which reads {SCHEMA_VERSION}")
    best, named = state.get("best"), STEP_DIR.fullmatch(path.name)
    for step in (state.get("step"), 0 if best is None else best.get("step") if isinstance(best, dict) else None):
        if type(step) is not int or not 0 <= step < 10**18:
            raise CheckpointError(f"{path}/state.json: has no step, or a best one without")
    if named and int(named[1]) != state["step"]:
        raise CheckpointError(f"{path}: is that of step {state['step']}")
    return state


def read_index(path):
    return Index(path, read_json(path / "index.json"))


# ---- load

def load(path, model, optimizer, runtime=SINGLE_PROCESS):
    """Fill model and optimizer from a verified checkpoint, each rank with what is its own; returns its state.

    `UserError`, before anything is touched, if it is of another architecture.
    """
    state = {}

    def work():
        state.update(read_state(path))
        load_tensors(read_index(path), model, local_optimizer(optimizer))

    reshard_parameters(model)
    run_on_all_ranks(runtime, work)
    return state


@torch.no_grad()
def load_tensors(index, model, optimizer):
    """Fill this rank's parameters and AdamW state from an `Index`."""
    parameters = dict(model.named_parameters())
    check_weights(index, {name: p.shape for name, p in parameters.items()})
    moments = {}
    for key in index.keys("optimizer"):
        moment, _, name = key.partition("/")
        moments.setdefault(name, {})[moment] = index.entries[key]
    own = [(name, p) for group in optimizer.param_groups for p in group["params"] for name in names_of(p, parameters)]
    for name, p in own if moments else ():  # before the first step there are none
        if name not in moments:
            raise CheckpointError(f"{index.directory}: has no moments for {name}")
        for moment, entry in moments[name].items():
            if entry.shape not in ((), tuple(p.shape)):
                raise CheckpointError(f"{index.directory}: {moment} of {name} is {entry.shape}, not {tuple(p.shape)}")
    for name, p in parameters.items():
        offset, local = local_chunk(p)
        index.read_into(name, local, offset)
    optimizer.state.clear()
    for name, p in own if moments else ():
        for moment, entry in moments[name].items():
            if entry.shape == tuple(p.shape):
                value = torch.zeros_like(p, dtype=entry.dtype)  # spread over the ranks as p is
            else:
                value = torch.zeros(entry.shape, dtype=entry.dtype, device=p.device)
            offset, local = local_chunk(value)
            index.read_into(f"{moment}/{name}", local, offset)
            optimizer.state[p][moment] = value


def names_of(p, parameters):
    return [name for name, q in parameters.items() if q is p]


def check_weights(index, shapes):
    """`UserError` unless the checkpoint has just the parameters `shapes` {name: shape}."""
    there = set(index.keys("model"))
    missing, extra = sorted(shapes.keys() - there), sorted(there - shapes.keys())
    if missing or extra:
        raise UserError(f"{index.directory}: is not of this architecture (missing {missing[:3]}, unexpected "
                        f"{extra[:3]})")
    for name, shape in shapes.items():
        if tuple(shape) != index.entries[name].shape:
            raise UserError(f"{index.directory}: {name} is {index.entries[name].shape}, this model has {tuple(shape)}")


def read_weights(path):
    """{name: CPU tensor} of the parameters in a verified checkpoint, put together."""
    index = read_index(path)
    return {name: index.read(name) for name in index.keys("model")}


# ---- the export

def export(run_dir, path, description, runtime=SINGLE_PROCESS):
    """Write the final `model.safetensors` and `config.json` (`description`, the sha256) from the checkpoint at `path`.

    Rank 0 puts it together tensor by tensor; OSError, alike on all ranks, where the disk refuses.
    """
    def work():
        if runtime.rank == 0:
            write_export(Path(run_dir), read_index(path), description)
    run_on_all_ranks(runtime, work)


def write_export(run_dir, index, description):
    temporary = run_dir / ".export.tmp"
    remove(temporary)  # of an export that was killed
    try:
        temporary.mkdir()
        layout = {name: (index.entries[name].dtype, index.entries[name].shape) for name in index.keys("model")}
        with TensorFile(temporary / "model.safetensors", layout) as file:
            digest = file.fill(index.read)["sha256"]
        write_json(temporary / "config.json", {**description, "sha256": digest})
        fsync_path(temporary)
        for name in ("config.json", "model.safetensors"):
            os.replace(temporary / name, run_dir / name)
        fsync_path(run_dir)
    finally:
        remove(temporary)


def verify_export(run_dir):
    """The description of a run's export; `CheckpointError` if it is not there or damaged."""
    file, config = Path(run_dir) / "model.safetensors", Path(run_dir) / "config.json"
    description = read_json(config)
    try:
        if description.get("sha256") != sha256_of(file):
            raise CheckpointError(f"{file}: is damaged (its sha256 is not that of {config.name})")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    return description


def read_export(run_dir):
    """({name: CPU tensor}, description) that `export` wrote; `CheckpointError` if they are not there or damaged."""
    description = verify_export(run_dir)
    with safetensors_errors(Path(run_dir) / "model.safetensors") as file:
        return load_file(file.path), description
