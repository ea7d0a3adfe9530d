"""Checkpoints damaged by chance, and files made to do harm: both must be refused, in one line each."""

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

import blockgpt.training.checkpoint as checkpoint
from blockgpt.errors import CheckpointError

# ---- damage

DAMAGED = 400
RESUMED = 10  # of so many damaged checkpoints, train.py itself meets one


def flipped(rng, newest, older):
    file = rng.choice(files_of(newest))
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncated(rng, newest, older):
    file = rng.choice(files_of(newest))
    os.truncate(file, rng.randrange(1, file.stat().st_size - 1))  # the last byte of JSON is a newline, no loss


def emptied(rng, newest, older):
    os.truncate(rng.choice(files_of(newest)), 0)


def missing(rng, newest, older):
    rng.choice(files_of(newest)).unlink()


def added(rng, newest, older):
    name = rng.choice(["model-00007.safetensors", "optimizer-00007.safetensors", "model.pt", "notes.txt", "a.json"])
    shutil.copy(rng.choice(files_of(newest)), newest / name)


def of_another_step(rng, newest, older):
    differ = [file for file in files_of(newest) if file.read_bytes() != (older / file.name).read_bytes()]
    file = rng.choice(differ)  # all but the index, which says the same at every step
    shutil.copy(older / file.name, file)


def of_another_rank(rng, newest, older):
    """Two files change names: those of two ranks, or the weights and the moments of one."""
    one, other = rng.sample(sorted(newest.glob("*.safetensors")), 2)
    one.rename(newest / ".aside")
    other.rename(one)
    (newest / ".aside").rename(other)


def edited(rng, newest, older):
    """Something of manifest.json is another."""
    path = newest / "manifest.json"
    manifest = json.loads(path.read_bytes())
    one, other = rng.sample(sorted(manifest), 2)
    what = rng.choice(["size", "digest", "swapped", "left out", "named otherwise", "of another kind"])
    if what == "size":
        manifest[one]["size"] += rng.choice([-1, 1, 2**40])
    elif what == "digest":
        manifest[one]["sha256"] = hashlib.sha256(b"").hexdigest()
    elif what == "swapped":
        manifest[one], manifest[other] = manifest[other], manifest[one]
    elif what == "left out":
        del manifest[one]
    elif what == "named otherwise":
        manifest["model-00009.safetensors"] = manifest.pop(one)
    else:
        manifest[one] = rng.choice([None, 7, [], "x", {}, {"size": "12", "sha256": 3}, {"size": True, "sha256": ""}])
    path.write_text(json.dumps(manifest))


DAMAGE = (flipped, truncated, emptied, missing, added, of_another_step, of_another_rank, edited)


def files_of(directory):
    return sorted(directory.iterdir())


def damaged(tool, rng, kind, mode, resume):
    """The newest checkpoint of a run is damaged: that is seen, and the one before it is gone on with."""
    trial = tool.trial(mode)
    shutil.copytree(tool.reference_folder(mode), trial.run_dir)
    (newest, _, *_), figures = trial.visible(), Counter(trials=1, resumed=int(resume))
    place, older = (trial.run_dir / f"checkpoints/step_{step:08d}" for step in trial.visible()[:2])
    kind(rng, place, older)
    try:
        checkpoint.verify(place)
        trial.break_("undetected", f"{kind.__name__} at step {newest}")
    except CheckpointError as error:
        if "\n" in str(error):
            trial.break_("told", repr(str(error)))
    said = io.StringIO()
    with tool.lock, contextlib.redirect_stderr(said):
        found = checkpoint.find_newest(trial.run_dir)
    if found != older or len(said.getvalue().splitlines()) != 1:
        trial.break_("fallback", f"{kind.__name__}: {found}, {said.getvalue()}")
    if resume:
        result = trial.launch()
        warnings = [line for line in result.lines("warning: ") if "passed over" in line]
        if result.resumed_at() != int(older.name[5:]) or len(warnings) != 1:
            trial.break_("fallback", f"resumed at {result.resumed_at()}, {warnings}")
        trial.check_end(result)
    return trial, figures


def damage(tool, until):
    share = DAMAGED / len(DAMAGE)
    modes = [mode for mode in ("single", "ddp", "fsdp") if mode in tool.modes]
    for n, kind in enumerate(DAMAGE):
        yield from until(tool, "damage", kind.__name__.replace("_", " "), "trials", share,
                         lambda rng, i, n=n, kind=kind:
                         damaged(tool, rng, kind, modes[i % len(modes)], (n + i) % RESUMED == 0))


# ---- malice

class Bomb:
    """Unpickled, it makes the file `marker`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def put(directory, name, content):
    """A file whose size and digest the manifest gives, so that more than the manifest has to refuse it."""
    (directory / name).write_bytes(content)
    forge(directory, **{name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}})


def forge(directory, **entries):
    manifest = json.loads((directory / "manifest.json").read_bytes())
    (directory / "manifest.json").write_text(json.dumps({**manifest, **entries}))


def pickled(name, listed=True):
    def make(directory, outside, marker):
        content = pickle.dumps(Bomb(marker))
        if listed:
            put(directory, name, content)
        else:
            (directory / name).write_bytes(content)
    return make


def torch_saved(directory, outside, marker):
    import torch

    saved = io.BytesIO()
    torch.save({"model": Bomb(marker)}, saved)
    put(directory, "model-00000.safetensors", saved.getvalue())


def long_header(directory, outside, marker):
    put(directory, "model-00000.safetensors", struct.pack("<Q", 2**60) + b"{}" * 100)


def far_offsets(directory, outside, marker):
    header = json.dumps({"token_embedding.weight": {"dtype": "F32", "shape": [2**58],
                                                    "data_offsets": [0, 2**60]}}).encode()
    put(directory, "model-00000.safetensors", struct.pack("<Q", len(header)) + header)


def listed_outside(name):
    """The manifest names a file elsewhere, with its true digest."""
    def make(directory, outside, marker):
        content = (outside / "model-00000.safetensors").read_bytes()
        where = name if name.startswith("..") else str(outside / "model-00000.safetensors")
        forge(directory, **{where: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}})
    return make


def indexed_outside(name):
    def make(directory, outside, marker):
        index = json.loads((directory / "index.json").read_bytes())
        for entry in index.values():
            entry["pieces"][0]["file"] = name if name.startswith("..") else str(outside / "model-00000.safetensors")
        put(directory, "index.json", json.dumps(index).encode())
    return make


def linked(name):
    """A file is a link to its like elsewhere, or the checkpoint itself is one."""
    def make(directory, outside, marker):
        if name:
            (directory / name).unlink()
            (directory / name).symlink_to(outside / name)
        else:
            shutil.rmtree(directory)
            directory.symlink_to(outside)
    return make


def deep(directory, outside, marker):
    put(directory, "index.json", b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}")


def huge_number(name, key, number):
    def make(directory, outside, marker):
        value = json.loads((directory / name).read_bytes())
        text = json.dumps({**value, key: 0}).replace(f'"{key}": 0', f'"{key}": {number}')
        put(directory, name, text.encode())
    return make


def huge_shape(directory, outside, marker):
    index = json.loads((directory / "index.json").read_bytes())
    for entry in index.values():
        entry["shape"] = entry["pieces"][0]["shape"] = [2**61, *entry["shape"][1:]]
    put(directory, "index.json", json.dumps(index).encode())


MALICE = {
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
    "step of 5,000 digits": huge_number("state.json", "step", "9" * 5000),
    "step of 1e999": huge_number("state.json", "step", "1e999"),
    "shape of 2**61 rows": huge_shape,
}


def refused(tool, mode, make):
    """A run whose only checkpoint is malicious is not gone on with: exit code 3, one line, nothing run or read."""
    trial = tool.trial(mode)
    shutil.copytree(tool.reference_folder(mode), trial.run_dir)
    first, *rest = (path for _, path in checkpoint.list_checkpoints(trial.run_dir))
    for path in rest:
        shutil.rmtree(path)
    outside, marker = trial.folder / "outside", trial.folder / "executed"
    shutil.copytree(first, outside)
    make(first, outside, marker)
    files = list(outside.iterdir())
    unread(files)
    before = listing(trial.run_dir)
    result = trial.launch()
    if set(result.codes) != {3} or result.hung:
        trial.break_("codes", f"{result.codes}: {result.err[-600:]}")
    if [line for line in result.err.splitlines() if not line.startswith(("error: ", "warning: ", "note: "))] or len(
            result.lines("error: ")) != 1 or len(result.lines("warning: ")) > 1:
        trial.break_("told", result.err[-600:])
    if marker.exists():
        trial.break_("executed", marker)
    if was_read(files):
        trial.break_("read outside", was_read(files))
    if listing(trial.run_dir) != before:
        trial.break_("overwritten", sorted(set(listing(trial.run_dir)) ^ set(before)))
    return trial, Counter(files=1)


def listing(folder):
    return sorted((str(p), p.lstat().st_mtime_ns, p.lstat().st_size) for p in folder.rglob("*") if p.is_file())


def unread(files):
    """Give files a time of last reading that the next one changes, on a file system that keeps it."""
    for path in files:
        os.utime(path, (10**9, 2 * 10**9))


def was_read(files):
    return [str(path) for path in files if path.stat().st_atime != 10**9]


def malicious(tool, until):
    probe = tool.folder / "probe"
    probe.write_bytes(b"x")
    unread([probe])
    probe.read_bytes()
    if not was_read([probe]):
        print(f"note: {tool.folder} keeps no times of reading: what is read outside goes unseen")
    number = max(1, round(len(MALICE) * min(1, tool.scale)))
    names = random.Random(f"{tool.seed} malicious").sample(list(MALICE), number)
    for i, name in enumerate(MALICE):
        if name in names:
            mode = tool.modes[-1] if i % 5 == 4 else tool.modes[0]
            yield from until(tool, "malicious", name, "files", 1, lambda rng, i, name=name, mode=mode:
                             refused(tool, mode, MALICE[name]))
