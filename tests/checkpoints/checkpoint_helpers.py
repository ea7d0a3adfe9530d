"""What the tests of checkpoints share: a small run with two checkpoints, damage to files, a limit on file sizes."""

import contextlib
import json
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_ranks import CONFIG, learn, state

from blockgpt.checkpoints import checkpoint
from blockgpt.checkpoints.saver import CheckpointSaver
from blockgpt.errors import CheckpointError
from blockgpt.files import sha256_of
from blockgpt.training.optimizers import build_optimizer
from model_builder import build_model
from model_config import get_preset

MODEL, OPTIMIZER = "model-00000.safetensors", "optimizer-00000.safetensors"
FILES = ("index.json", "manifest.json", MODEL, OPTIMIZER, "state.json")


def make(preset="llama", seed=1):
    config = get_preset(preset, n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32)
    model = build_model(config, seed)
    return model, build_optimizer(model, CONFIG, torch.device("cpu"))


def save(run_dir, model, optimizer, state, **options):
    return CheckpointSaver(run_dir, **options).save(model, optimizer, state)


def paths(run_dir):
    folder = Path(run_dir) / "checkpoints"
    return {"dir": Path(run_dir), "folder": folder, "older": folder / "step_00000002",
            "newest": folder / "step_00000004"}


def saved_run(run_dir):
    """A run directory with the checkpoints of steps 2 (the best) and 4, and the model that was saved at 4."""
    model, optimizer = make()
    learn(model, optimizer, range(2))
    save(run_dir, model, optimizer, state(2, best=2))
    learn(model, optimizer, range(2, 4))
    save(run_dir, model, optimizer, state(4, best=2))
    return SimpleNamespace(model=model, optimizer=optimizer, **paths(run_dir))


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(path):
    """The one-line reason for which a checkpoint does not verify."""
    with pytest.raises(CheckpointError) as error:
        checkpoint.verify(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def flip(path, position, mask=1):
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def manifest_entry(path):
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def rewrite_manifest(path, **entries):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **entries}))


@contextlib.contextmanager
def largest_file(size):
    """No file can grow beyond `size` bytes: how a disk that fills up looks to one process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
