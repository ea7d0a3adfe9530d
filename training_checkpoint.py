"""Save, verify, load: a run continues from here bit for bit. Safetensors and JSON, no pickle anywhere.

    checkpoints/step_00000250/model.safetensors      the weights by parameter name
                              optimizer.safetensors  AdamW's moments as <moment>/<parameter name>
                              state.json             steps done, tokens, best so far, scaler, what was built,
                                                     the tokenizer, the data's fingerprint
                              manifest.json          size and sha256 of the others, written last

A directory is written beside its place and renamed into it, so one that has its name is whole; its manifest
is checked before a tensor of it is used. Random numbers need no saving: batches and dropout are functions of
(seed, step). Kept are the newest checkpoint and the one with the best validation loss.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from errors import CheckpointError, UserError
from files import sha256_of, sync, write_json
from model_builder import load_weights

STEP_DIR = re.compile(r"step_(\d{8,})")


def save(run_dir, model, optimizer, state):
    """Write the checkpoint of `state["step"]` and prune; returns its directory. OSError where the disk refuses.

    state: JSON-able; `step` counts the optimizer steps done, `best` is {"step", "val_loss"} or None.
    """
    parent = Path(run_dir) / "checkpoints"
    final = parent / f"step_{state['step']:08d}"
    temporary = parent / f".{final.name}.tmp"
    parent.mkdir(exist_ok=True)
    for stale in parent.glob(".*.tmp"):
        shutil.rmtree(stale)
    if final.exists():  # a resumed run stopped where it began; only a damaged one is written again
        try:
            verify(final)
            return final
        except CheckpointError:
            shutil.rmtree(final)
    try:
        temporary.mkdir()
        save_file(named_weights(model), temporary / "model.safetensors")
        save_file(named_moments(model, optimizer), temporary / "optimizer.safetensors")
        write_json(temporary / "state.json", state)
        written = sorted(temporary.iterdir())
        for path in written:
            sync(path)
        write_json(temporary / "manifest.json",
                   {p.name: {"size": p.stat().st_size, "sha256": sha256_of(p)} for p in written})
        sync(temporary)
        os.rename(temporary, final)
        sync(parent)
    except SafetensorError as error:  # how safetensors tells a full disk
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    keep = {final.name} | ({f"step_{state['best']['step']:08d}"} if state.get("best") else set())
    for _, path in list_checkpoints(run_dir):
        if path.name not in keep:
            shutil.rmtree(path)
    return final


def export(run_dir, model, description):
    """Write the final `model.safetensors` and `config.json` (`description`) into the run directory, for other tools."""
    run_dir = Path(run_dir)
    temporary = run_dir / ".model.safetensors.tmp"
    try:
        save_file(named_weights(model), temporary)
        sync(temporary)
        os.replace(temporary, run_dir / "model.safetensors")
        write_json(run_dir / "config.json", description)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def list_checkpoints(run_dir):
    """[(step, directory)] under run_dir, the newest first."""
    there = (Path(run_dir) / "checkpoints").glob("step_*")
    return sorted(((int(m[1]), p) for p in there if (m := STEP_DIR.fullmatch(p.name))), reverse=True)


def verify(path):
    """Check every file of a checkpoint against its manifest; `CheckpointError` names the first that differs."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: manifest.json cannot be read ({type(error).__name__})") from None
    for name in {"model.safetensors", "optimizer.safetensors", "state.json"} | expected.keys():
        file = path / name
        if Path(name).name != name or name not in expected or not file.is_file():
            raise CheckpointError(f"{file}: is missing")
        if file.stat().st_size != expected[name][0]:
            raise CheckpointError(f"{file}: has {file.stat().st_size} bytes, the manifest says {expected[name][0]}")
        if sha256_of(file) != expected[name][1]:
            raise CheckpointError(f"{file}: is damaged (its sha256 is not the manifest's)")


def find_newest(run_dir):
    """The newest checkpoint of a run that verifies; each one passed over is a warning on stderr.

    `CheckpointError` if there is none.
    """
    for _, path in list_checkpoints(run_dir):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            print(f"warning: passed over: {error}", file=sys.stderr)
    raise CheckpointError(f"{run_dir} has no usable checkpoint to resume from (start a new run under another run_name)")


def find_best(run_dir):
    """The checkpoint with the lowest validation loss, verified; the newest if none was evaluated."""
    newest = find_newest(run_dir)
    best = read_state(newest).get("best")
    path = Path(run_dir) / "checkpoints" / f"step_{best['step']:08d}" if best else newest
    if path != newest:
        verify(path)
    return path


def read_state(path):
    """The state.json of a verified checkpoint."""
    return json.loads((path / "state.json").read_text())


def load(path, model, optimizer, device):
    """Fill model and optimizer from a verified checkpoint; returns its state."""
    load_weights(model, load_file(path / "model.safetensors"), path / "model.safetensors")
    moments = load_file(path / "optimizer.safetensors")
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            suffix = "/" + names[id(p)]
            mine = {k.removesuffix(suffix): v for k, v in moments.items() if k.endswith(suffix)}
            if not mine and moments:
                raise UserError(f"{path}/optimizer.safetensors: has nothing for {names[id(p)]}")
            if mine:
                optimizer.state[p] = {k: v.to(device) for k, v in mine.items()}
    return read_state(path)


def named_weights(model):
    """{name: CPU tensor} of the parameters, tied ones once."""
    return {name: p.detach().contiguous().cpu() for name, p in model.named_parameters()}


def named_moments(model, optimizer):
    """{moment/name: CPU tensor} of the optimizer's state."""
    return {f"{moment}/{name}": value.detach().contiguous().cpu()
            for name, p in model.named_parameters() for moment, value in optimizer.state.get(p, {}).items()}
