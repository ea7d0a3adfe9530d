"""Checkpoints damaged at random, and malicious files: both must be refused with one line each.

New damage is a function in DAMAGE, a new malicious file an entry of MALICIOUS.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from blockgpt.checkpoints import checkpoint
from blockgpt.errors import CheckpointError
from tools.torture.runs import Harness, Trial
from tools.torture.trials import Row, run_trials

# ---- damage

TRIALS = 400
RESUME_INTERVAL = 10  # train.py resumes from one damaged checkpoint in this many


def flip_bit(rng: random.Random, newest: Path, older: Path) -> None:
    file = rng.choice(files_of(newest))
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(rng: random.Random, newest: Path, older: Path) -> None:
    file = rng.choice(files_of(newest))
    os.truncate(file, rng.randrange(1, file.stat().st_size - 1))  # the last byte of JSON is a newline, no loss


def empty(rng: random.Random, newest: Path, older: Path) -> None:
    os.truncate(rng.choice(files_of(newest)), 0)


def remove_file(rng: random.Random, newest: Path, older: Path) -> None:
    rng.choice(files_of(newest)).unlink()


def add_file(rng: random.Random, newest: Path, older: Path) -> None:
    name = rng.choice(["model-00007.safetensors", "optimizer-00007.safetensors", "model.pt", "notes.txt", "a.json"])
    shutil.copy(rng.choice(files_of(newest)), newest / name)


def swap_step(rng: random.Random, newest: Path, older: Path) -> None:
    differ = [file for file in files_of(newest) if file.read_bytes() != (older / file.name).read_bytes()]
    file = rng.choice(differ)  # all but the index, which is the same at every step
    shutil.copy(older / file.name, file)


def swap_files(rng: random.Random, newest: Path, older: Path) -> None:
    """Swap the names of two tensor files: of two ranks, or of the parameters and the optimizer state of one."""
    one, other = rng.sample(sorted(newest.glob("*.safetensors")), 2)
    one.rename(newest / ".aside")
    other.rename(one)
    (newest / ".aside").rename(other)


def edit_manifest(rng: random.Random, newest: Path, older: Path) -> None:
    """Change something in manifest.json."""
    path = newest / "manifest.json"
    manifest = json.loads(path.read_bytes())
    one, other = rng.sample(sorted(manifest), 2)
    change = rng.choice(["size", "digest", "swap", "remove", "rename", "type"])
    if change == "size":
        manifest[one]["size"] += rng.choice([-1, 1, 2**40])
    elif change == "digest":
        manifest[one]["sha256"] = hashlib.sha256(b"").hexdigest()
    elif change == "swap":
        manifest[one], manifest[other] = manifest[other], manifest[one]
    elif change == "remove":
        del manifest[one]
    elif change == "rename":
        manifest["model-00009.safetensors"] = manifest.pop(one)
    else:
        manifest[one] = rng.choice([None, 7, [], "x", {}, {"size": "12", "sha256": 3}, {"size": True, "sha256": ""}])
    path.write_text(json.dumps(manifest))


Damage = Callable[[random.Random, Path, Path], None]  # (random numbers, the newest checkpoint, the one before it)
DAMAGE: tuple[Damage, ...] = (flip_bit, truncate, empty, remove_file, add_file, swap_step, swap_files, edit_manifest)


def files_of(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def resume_damaged(harness: Harness, damage: Damage, mode: str, resume: bool,
                   rng: random.Random) -> tuple[Trial, Counter[str]]:
    """The newest checkpoint of a run is damaged: it is refused, and the one before it is used."""
    trial = harness.new_trial(mode)
    shutil.copytree(harness.reference_run_dir(mode), trial.run_dir)
    newest, older = (trial.run_dir / f"checkpoints/step_{step:08d}" for step in trial.checkpoint_steps()[:2])
    damage(rng, newest, older)
    try:
        checkpoint.verify(newest)
        trial.report_broken("undetected", f"{damage.__name__} at {newest.name}")
    except CheckpointError as error:
        if "\n" in str(error):
            trial.report_broken("message", repr(str(error)))
    stderr = io.StringIO()
    with harness.lock, contextlib.redirect_stderr(stderr):
        found = checkpoint.find_newest(trial.run_dir)
    if found != older or len(stderr.getvalue().splitlines()) != 1:
        trial.report_broken("fallback", f"{damage.__name__}: {found}, {stderr.getvalue()}")
    if resume:
        result = trial.launch()
        warnings = result.lines("warning: skipped: ")
        if result.resumed_at() != int(older.name[5:]) or len(warnings) != 1:
            trial.report_broken("fallback", f"resumed at {result.resumed_at()}, {warnings}")
        trial.check_end(result)
    return trial, Counter(trials=1, resumed=int(resume))


def damage(harness: Harness) -> Iterator[Row]:
    modes = [mode for mode in ("single", "ddp", "fsdp") if mode in harness.modes]
    for n, function in enumerate(DAMAGE):
        def trial(rng: random.Random, i: int, n: int = n, function: Damage = function) -> tuple[Trial, Counter[str]]:
            return resume_damaged(harness, function, modes[i % len(modes)], (n + i) % RESUME_INTERVAL == 0, rng)
        name = function.__name__.replace("_", " ")
        yield from run_trials(harness, "damage", name, "trials", TRIALS / len(DAMAGE), trial)


# ---- malicious files

class Bomb:
    """Creates the file `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


MakeMalicious = Callable[[Path, Path, Path], None]  # (the checkpoint, a copy outside the run, the bomb's marker)


def write_listed(directory: Path, name: str, content: bytes) -> None:
    """Write a file and its manifest entry, so that more than the manifest has to refuse it."""
    (directory / name).write_bytes(content)
    update_manifest(directory, **{name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}})


def update_manifest(directory: Path, **entries: Any) -> None:
    manifest = json.loads((directory / "manifest.json").read_bytes())
    (directory / "manifest.json").write_text(json.dumps({**manifest, **entries}))


def pickled(name: str, listed: bool = True) -> MakeMalicious:
    def make(directory: Path, outside: Path, marker: Path) -> None:
        content = pickle.dumps(Bomb(marker))
        if listed:
            write_listed(directory, name, content)
        else:
            (directory / name).write_bytes(content)
    return make


def torch_saved(directory: Path, outside: Path, marker: Path) -> None:
    import torch

    saved = io.BytesIO()
    torch.save({"model": Bomb(marker)}, saved)
    write_listed(directory, "model-00000.safetensors", saved.getvalue())


def long_header(directory: Path, outside: Path, marker: Path) -> None:
    write_listed(directory, "model-00000.safetensors", struct.pack("<Q", 2**60) + b"{}" * 100)


def far_offsets(directory: Path, outside: Path, marker: Path) -> None:
    header = json.dumps({"token_embedding.weight": {"dtype": "F32", "shape": [2**58],
                                                    "data_offsets": [0, 2**60]}}).encode()
    write_listed(directory, "model-00000.safetensors", struct.pack("<Q", len(header)) + header)


def listed_outside(name: str) -> MakeMalicious:
    """The manifest names a file outside, with its digest."""
    def make(directory: Path, outside: Path, marker: Path) -> None:
        content = (outside / "model-00000.safetensors").read_bytes()
        path = name if name.startswith("..") else str(outside / "model-00000.safetensors")
        update_manifest(directory, **{path: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}})
    return make


def indexed_outside(name: str) -> MakeMalicious:
    def make(directory: Path, outside: Path, marker: Path) -> None:
        index = json.loads((directory / "index.json").read_bytes())
        for entry in index.values():
            entry["pieces"][0]["file"] = name if name.startswith("..") else str(outside / "model-00000.safetensors")
        write_listed(directory, "index.json", json.dumps(index).encode())
    return make


def linked(name: str | None) -> MakeMalicious:
    """A file is a link to the same file outside; or the checkpoint itself is a link."""
    def make(directory: Path, outside: Path, marker: Path) -> None:
        if name:
            (directory / name).unlink()
            (directory / name).symlink_to(outside / name)
        else:
            shutil.rmtree(directory)
            directory.symlink_to(outside)
    return make


def deep(directory: Path, outside: Path, marker: Path) -> None:
    write_listed(directory, "index.json", b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}")


def huge_value(name: str, key: str, literal: str) -> MakeMalicious:
    def make(directory: Path, outside: Path, marker: Path) -> None:
        value = json.loads((directory / name).read_bytes())
        text = json.dumps({**value, key: 0}).replace(f'"{key}": 0', f'"{key}": {literal}')
        write_listed(directory, name, text.encode())
    return make


def huge_shape(directory: Path, outside: Path, marker: Path) -> None:
    index = json.loads((directory / "index.json").read_bytes())
    for entry in index.values():
        entry["shape"] = entry["pieces"][0]["shape"] = [2**61, *entry["shape"][1:]]
    write_listed(directory, "index.json", json.dumps(index).encode())


MALICIOUS: dict[str, MakeMalicious] = {
    **{f"pickle as {name}": pickled(name) for name in (
        "model-00000.safetensors", "optimizer-00000.safetensors", "index.json", "state.json")},
    **{f"pickle as {name}": pickled(name, listed=False) for name in ("manifest.json", "model.pt", "ckpt.pt")},
    "pickle as .metadata, listed": pickled(".metadata"),
    "torch.save as model": torch_saved,
    "header of 2**60 bytes": long_header,
    "tensor of 2**60 bytes": far_offsets,
    "manifest: ../outside": listed_outside("../../../../outside/model-00000.safetensors"),
    "manifest: absolute path": listed_outside("/"),
    "index: ../outside": indexed_outside("../../../../outside/model-00000.safetensors"),
    "index: absolute path": indexed_outside("/"),
    "link: model": linked("model-00000.safetensors"),
    "link: manifest": linked("manifest.json"),
    "link: the checkpoint": linked(None),
    "JSON 200,000 deep": deep,
    "step of 5,000 digits": huge_value("state.json", "step", "9" * 5000),
    "step of 1e999": huge_value("state.json", "step", "1e999"),
    "shape of 2**61 rows": huge_shape,
}


def resume_malicious(harness: Harness, mode: str, make_malicious: MakeMalicious, rng: random.Random,
                     i: int) -> tuple[Trial, Counter[str]]:
    """A run with only a malicious checkpoint is not resumed: exit code 3, one line, nothing executed."""
    trial = harness.new_trial(mode)
    shutil.copytree(harness.reference_run_dir(mode), trial.run_dir)
    newest, *others = (path for _, path in checkpoint.list_checkpoints(trial.run_dir))
    for path in others:
        shutil.rmtree(path)
    outside, marker = trial.folder / "outside", trial.folder / "executed"
    shutil.copytree(newest, outside)
    make_malicious(newest, outside, marker)
    files = list(outside.iterdir())
    reset_access_times(files)
    before = listing(trial.run_dir)
    result = trial.launch()
    if set(result.codes) != {3} or result.hung:
        trial.report_broken("codes", f"{result.codes}: {result.err[-600:]}")
    if [line for line in result.err.splitlines() if not line.startswith(("error: ", "warning: ", "note: "))] or len(
            result.lines("error: ")) != 1 or len(result.lines("warning: ")) > 1:
        trial.report_broken("message", result.err[-600:])
    if marker.exists():
        trial.report_broken("executed", marker)
    if files_read(files):
        trial.report_broken("read outside", files_read(files))
    if listing(trial.run_dir) != before:
        trial.report_broken("overwritten", sorted(set(listing(trial.run_dir)) ^ set(before)))
    return trial, Counter(files=1)


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.lstat().st_mtime_ns, p.lstat().st_size) for p in folder.rglob("*")
                  if p.name != ".lock" and p.is_file())


def reset_access_times(files: Iterable[Path]) -> None:
    """Give files an access time that the next read changes, on a file system that records access times."""
    for path in files:
        os.utime(path, (10**9, 2 * 10**9))


def files_read(files: Iterable[Path]) -> list[str]:
    """Those of the files that were read since `reset_access_times`."""
    return [str(path) for path in files if path.stat().st_atime != 10**9]


def malicious(harness: Harness) -> Iterator[Row]:
    probe = harness.folder / "probe"
    probe.write_bytes(b"x")
    reset_access_times([probe])
    probe.read_bytes()
    if not files_read([probe]):
        print(f"note: {harness.folder} has no access times: reads outside of the run are not detected")
    count = max(1, round(len(MALICIOUS) * min(1, harness.scale)))
    names = random.Random(f"{harness.seed} malicious").sample(list(MALICIOUS), count)
    for i, (name, make_malicious) in enumerate(MALICIOUS.items()):
        if name in names:
            mode = harness.modes[-1] if i % 5 == 4 else harness.modes[0]
            yield from run_trials(harness, "malicious", name, "files", 1,
                                  partial(resume_malicious, harness, mode, make_malicious))
