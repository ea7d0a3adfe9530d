"""Save, verify, load: a run continues from here bit for bit. Safetensors and JSON, no pickle anywhere.

    checkpoints/step_00000250/model.safetensors      the weights by parameter name
                              optimizer.safetensors  AdamW's moments as <moment>/<parameter name>
                              state.json             steps done, tokens, best so far, scaler, what was built,
                                                     the tokenizer, the data's fingerprint
                              manifest.json          size and sha256 of the others, written last

A directory is written beside its place and renamed into it, so a killed save leaves nothing under a checkpoint's
name; the manifest is checked before anything else is read. Random numbers need no saving: batches and dropout are
functions of (seed, step). Kept are the newest checkpoint and the one with the best validation loss.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from errors import CheckpointError
from files import sha256_of, sync, write_json
from model_builder import load_weights

SCHEMA_VERSION = 1
STEP_DIR = re.compile(r"step_(\d{8,})")
FILES = {"model.safetensors", "optimizer.safetensors", "state.json"}


def save(run_dir, model, optimizer, state):
    """Write the checkpoint of `state["step"]` and prune; returns its directory. OSError where the disk refuses.

    state: JSON-able; `step` counts the optimizer steps done, `best` is {"step", "val_loss"} or None.
    """
    parent = Path(run_dir) / "checkpoints"
    final = parent / f"step_{state['step']:08d}"
    temporary = parent / f".{final.name}.tmp"
    parent.mkdir(exist_ok=True)
    for stale in parent.glob(".step_*.tmp"):  # of a save that was killed
        shutil.rmtree(stale)
    if final.exists():  # a resumed run stopped where it began; only a damaged one is written again
        try:
            verify(final)
            return final
        except CheckpointError:
            shutil.rmtree(final)
    try:
        temporary.mkdir()
        write_tensors(temporary / "model.safetensors", named_weights(model))
        write_tensors(temporary / "optimizer.safetensors", named_moments(model, optimizer))
        write_json(temporary / "state.json", {**state, "schema_version": SCHEMA_VERSION})
        manifest = {p.name: {"size": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(temporary.iterdir())}
        write_json(temporary / "manifest.json", manifest)
        sync(temporary)
        os.rename(temporary, final)
        sync(parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    keep = {final.name} | ({f"step_{state['best']['step']:08d}"} if state.get("best") else set())
    for _, path in list_checkpoints(run_dir):
        if path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)  # the new one stands; what is left is for the next save
    return final


def export(run_dir, model, description):
    """Write the final `model.safetensors` and `config.json` (`description`, the sha256) into the run directory."""
    run_dir = Path(run_dir)
    temporary = run_dir / ".export.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
    try:
        temporary.mkdir()
        write_tensors(temporary / "model.safetensors", named_weights(model))
        digest = sha256_of(temporary / "model.safetensors")
        write_json(temporary / "config.json", {**description, "sha256": digest})
        for file in sorted(temporary.iterdir()):
            os.replace(file, run_dir / file.name)
        sync(run_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_export(run_dir):
    """({name: CPU tensor}, description) that `export` wrote; `CheckpointError` if they are not there or damaged."""
    file, config = Path(run_dir) / "model.safetensors", Path(run_dir) / "config.json"
    description = read_json(config)
    try:
        damaged = description.get("sha256") != sha256_of(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    if damaged:
        raise CheckpointError(f"{file}: is damaged (its sha256 is not that of {config.name})")
    return read_tensors(file), description


def list_checkpoints(run_dir):
    """[(step, directory)] under run_dir, the newest first."""
    there = (Path(run_dir) / "checkpoints").glob("step_*")
    return sorted(((int(m[1]), p) for p in there if (m := STEP_DIR.fullmatch(p.name))), reverse=True)


def verify(path):
    """Check a checkpoint against its manifest: these files, no others, bit for bit; `CheckpointError` if it differs.

    Hidden files, which a file manager may leave, do not count.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: is not there")
    manifest = read_json(path / "manifest.json")
    try:
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
        there = {p.name for p in path.iterdir() if not p.name.startswith(".")} - {"manifest.json"}
        for name in sorted(FILES | expected.keys() | there):
            file = path / name
            if name not in there:
                raise CheckpointError(f"{path}: has no file {name}")
            if name not in expected:
                raise CheckpointError(f"{file}: is not in the manifest")
            if file.stat().st_size != expected[name][0]:
                raise CheckpointError(f"{file}: has {file.stat().st_size} bytes, the manifest says {expected[name][0]}")
            if sha256_of(file) != expected[name][1]:
                raise CheckpointError(f"{file}: is damaged (its sha256 is not the manifest's)")
    except (KeyError, TypeError):
        raise CheckpointError(f"{path}: manifest.json is no manifest") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def usable(path):
    """Whether a checkpoint verifies; one that does not is a warning on stderr (of the first process, if several)."""
    try:
        verify(path)
        return True
    except CheckpointError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: passed over: {error}", file=sys.stderr)
        return False


def find_newest(run_dir):
    """The newest checkpoint of a run that is usable; `CheckpointError` if there is none."""
    newest = next((path for _, path in list_checkpoints(run_dir) if usable(path)), None)
    if newest is None:
        raise CheckpointError(f"{run_dir} has no usable checkpoint (train it anew under another run_name)")
    return newest


def find_best(run_dir):
    """The checkpoint with the lowest validation loss; the newest if none was evaluated or that one is not usable."""
    newest = find_newest(run_dir)
    best = read_state(newest).get("best")
    path = newest.with_name(f"step_{best['step']:08d}") if best else newest
    return path if path == newest or usable(path) else newest


def write_tensors(path, tensors):
    """Write {name: CPU tensor} as a new safetensors file, to the disk. OSError where that refuses."""
    path.touch()
    rights = path.stat().st_mode  # those of any new file here; save_file makes one that only its owner may read
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # a full disk, among others
        raise OSError(str(error)) from None
    path.chmod(rights)
    sync(path)


def read_json(path):
    """The object in a JSON file; `CheckpointError` if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not an object")
    return value


def read_tensors(path):
    """{name: CPU tensor} of a safetensors file; `CheckpointError` if it is none."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def read_state(path):
    """The state of a verified checkpoint, as `save` was given it."""
    state = read_json(path / "state.json")
    if state.pop("schema_version", None) != SCHEMA_VERSION:
        raise CheckpointError(f"{path}: was written by another version of this program")
    return state


def load(path, model, optimizer, device):
    """Fill model and optimizer from a verified checkpoint; returns its state."""
    state = read_state(path)
    moments = {}
    for key, value in read_tensors(path / "optimizer.safetensors").items():
        moment, _, name = key.partition("/")
        moments.setdefault(name, {})[moment] = value.to(device)
    load_weights(model, read_tensors(path / "model.safetensors"), path / "model.safetensors")
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups if moments else ():  # before the first step there are none
        for p in group["params"]:
            if names[id(p)] not in moments:
                raise CheckpointError(f"{path}/optimizer.safetensors: has nothing for {names[id(p)]}")
            optimizer.state[p] = moments[names[id(p)]]
    return state


def named_weights(model):
    """{name: CPU tensor} of the parameters, tied ones once."""
    return {name: p.detach().contiguous().cpu() for name, p in model.named_parameters()}


def named_moments(model, optimizer):
    """{moment/name: CPU tensor} of the optimizer's state."""
    return {f"{moment}/{name}": value.detach().contiguous().cpu()
            for name, p in model.named_parameters() for moment, value in optimizer.state.get(p, {}).items()}
