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

import copy
import json
import os
import platform
import re
import shutil
import stat
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy
import torch
from safetensors.torch import load_file

from blockgpt.errors import CheckpointError, UserError, shown
from blockgpt.files import forget_cached, sha256_of, sync, write_json
from blockgpt.training.checkpoint_files import (
    SHARD,
    Index,
    TensorFile,
    local_optimizer,
    own_pieces,
    placed,
    readable,
    settle,
    write_pieces,
)
from training_logger import human_bytes

SCHEMA_VERSION = 2
STEP_DIR = re.compile(r"step_(\d{8,18})")
JSON_FILES = ("index.json", "state.json")
RANDOM = "random numbers are functions of (seed, step, rank, number of the sequence): none has a state to save"
ALONE = SimpleNamespace(rank=0, world_size=1, exchange=lambda value, group=None: [value])  # the machine of one process


class Checkpoints:
    """The checkpoints of one run: written by all ranks of `machine` together, pruned to the newest `keep` and the best.

    asynchronous: `save` copies the tensors to memory of the CPU and returns; a thread does the rest, and `poll` tells
    how it ended. group: the gloo group over which the ranks then agree, used by nobody else; without one, it is made.
    """

    def __init__(self, run_dir, machine=ALONE, keep=2, asynchronous=False, group=None):
        self.folder, self.machine, self.keep = Path(run_dir) / "checkpoints", machine, keep
        self.asynchronous, self.group = asynchronous, group
        self.thread, self.outcomes = None, []
        if asynchronous and group is None and machine.world_size > 1:
            self.group = torch.distributed.new_group(backend="gloo")

    @property
    def ended(self):
        """Whether `poll` has something to tell."""
        return bool(self.outcomes)

    def save(self, model, optimizer, state, wait=False):
        """Write the checkpoint of `state["step"]`; its directory. OSError, alike on all ranks, where a disk refuses.

        state: JSON-able, the same on all ranks; `step` counts the optimizer steps done, `best` is {"step", "val_loss"}
        or None. If asynchronous and not to `wait`, only copying can fail here; the rest is for `poll`. A save that is
        under way is waited for first.
        """
        self._join()
        pieces, in_background = {}, self.asynchronous and not wait

        def collect():
            pieces.update(own_pieces(model, optimizer, self.machine))
            if in_background:  # training changes them from here on
                pieces.update({key: (*piece[:3], piece[3].to("cpu", copy=True)) for key, piece in pieces.items()})

        together(self.machine, collect, self.group)
        state = {**copy.deepcopy(state), "versions": versions(), "world_size": self.machine.world_size,
                 "random": RANDOM, "schema_version": SCHEMA_VERSION}
        if not in_background:
            return self._write(pieces, state)
        self.thread = threading.Thread(target=self._in_background, args=(pieces, state), daemon=True)
        self.thread.start()
        return None

    def poll(self):
        """What is new of saves in the background: None; (step, None) of one that stands, or (step, why it failed)."""
        if not self.outcomes:
            return None
        step, problem = self.outcomes.pop(0)
        if isinstance(problem, Exception) and not isinstance(problem, OSError):
            raise problem
        return step, problem and str(problem)

    def wait(self):
        """`poll`, after a save that is under way has ended."""
        self._join()
        return self.poll()

    def _join(self):
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _in_background(self, pieces, state):
        try:
            self._write(pieces, state)
            self.outcomes.append((state["step"], None))
        except Exception as error:
            self.outcomes.append((state["step"], error))

    def _write(self, pieces, state):
        """Write, verify, prune, on all ranks at once; the directory."""
        final = self.folder / f"step_{state['step']:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        main = self.machine.rank == 0

        def agree(work, everywhere=True):
            return together(self.machine, work if everywhere or main else lambda: None, self.group)

        if agree(lambda: self._prepare(final), everywhere=False)[0]:
            try:  # a resumed run stopped where it began
                verify(final, self.machine, self.group)
                return final
            except CheckpointError:
                pass  # written again
        written = {}
        try:
            agree(temporary.mkdir, everywhere=False)
            answers = agree(lambda: write_pieces(temporary, self.machine.rank, pieces))
            try:
                agree(lambda: written.update(finish(temporary, final, answers, state)), everywhere=False)
                written.update(answers[self.machine.rank]["files"])
                agree(lambda: reread(final, written))
            except OSError:
                if main:
                    discard(final)
                raise
        finally:
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
        if main:
            self._prune(state)
        return final

    def _prepare(self, final):
        """Make room for the work of rank 0; whether something stands in the checkpoint's place."""
        self.folder.mkdir(exist_ok=True)
        clean(self.folder.parent)
        return os.path.lexists(final)

    def _prune(self, state):
        """Remove what is neither among the newest up to this step nor the best; later ones this run will replace."""
        steps = [(step, path) for step, path in list_checkpoints(self.folder.parent) if step <= state["step"]]
        for step, path in steps[self.keep:]:
            if not state.get("best") or step != state["best"]["step"]:
                discard(path)


def together(machine, work, group=None):
    """Run `work()` on every rank at once: [what each returned]; if it failed on any, an error on all alike.

    An OSError, `CheckpointError` or `UserError` is that of the first rank that met one; any other error stays what it
    is where it happened. `work` returns what JSON can say.
    """
    own = told = result = None
    try:
        result = work()
    except Exception as error:  # a rank that left now would let the others wait
        own = error
        told = [type(error).__name__, " ".join(str(error).split()) or type(error).__name__]
    answers = machine.exchange([told, result], group)
    failed = [(rank, problem) for rank, (problem, _) in enumerate(answers) if problem]
    if own is not None and (machine.world_size == 1 or not isinstance(own, (OSError, UserError))):
        raise own
    if failed:
        rank, (kind, text) = failed[0]
        if kind in ("CheckpointError", "UserError"):
            raise {"CheckpointError": CheckpointError, "UserError": UserError}[kind](text)
        others = ", ".join(str(r) for r, _ in failed[1:8]) + ", …" * (len(failed) > 8)
        raise OSError(f"rank {rank}: {text}" + (f" (so on rank {others})" if others else ""))
    return [value for _, value in answers]


def check_room(run_dir, parameters, config):
    """`UserError` if the disk has no room for a checkpoint and the export; a warning if not for all that stay.

    parameters: how many, each 4 bytes in the weights and 8 in AdamW's moments. What stands there already counts.
    """
    if config.eval_only:
        return
    one = 12 * parameters
    there = len(list_checkpoints(run_dir))
    most = (config.keep_checkpoints + 2 - there) * one + 4 * parameters  # with the best, and the next before pruning
    disk = next(path for path in (Path(run_dir).absolute(), *Path(run_dir).absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if free < one + 4 * parameters:
        raise UserError(f"{disk}: a checkpoint needs {human_bytes(one)} and the weights at the end "
                        f"{human_bytes(4 * parameters)}, {human_bytes(free)} are free (--out_dir=…)")
    if free < most:
        print(f"warning: {disk}: checkpoints will need {human_bytes(most)} more, {human_bytes(free)} are free "
              "(--out_dir=…, --keep_checkpoints=…)", file=sys.stderr)


# ---- the parts of a save

def finish(temporary, final, answers, state):
    """Index, state, manifest, and the new name; {file: size and sha256} of the two JSON files."""
    index, manifest = {}, {}
    for answer in answers:
        manifest |= answer["files"]
        for key, (file, dtype, shape, offset, box) in answer["pieces"].items():
            entry = index.setdefault(key, {"dtype": dtype, "shape": shape, "pieces": []})
            entry["pieces"].append({"file": file, "offset": offset, "shape": box})
    Index(final, index)  # what the ranks wrote makes up every tensor
    write_json(temporary / "index.json", index, indent=None)
    write_json(temporary / "state.json", state)
    own = {name: entry_of(temporary / name) for name in JSON_FILES}
    write_json(temporary / "manifest.json", dict(sorted({**manifest, **own}.items())))
    sync(temporary)
    if os.path.lexists(final):  # it is damaged
        discard(final)
    os.rename(temporary, final)
    sync(final.parent)
    return own


def entry_of(path):
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def reread(directory, written):
    """OSError unless the files have on the disk the size and sha256 with which they were `written`."""
    for name, entry in written.items():
        forget_cached(directory / name)
        if entry_of(directory / name) != entry:
            raise OSError(f"{directory / name}: reads back otherwise than it was written")


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}


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


def find_newest(run_dir, machine=ALONE, or_none=False):
    """The newest checkpoint of a run that verifies, the same on all ranks; each passed over is a warning on stderr.

    `CheckpointError` if there is none. or_none: None where there is not even an unusable one.
    """
    names = machine.exchange([path.name for _, path in list_checkpoints(run_dir)] if machine.rank == 0 else None)[0]
    for name in names:
        path = Path(run_dir) / "checkpoints" / name
        if usable(path, machine):
            return path
    if or_none and not names:
        return None
    raise CheckpointError(f"{run_dir} has no usable checkpoint (train it anew under another run_name)")


def find_best(run_dir, machine=ALONE):
    """The checkpoint with the lowest validation loss; the newest if none was evaluated or that one is not usable."""
    newest = find_newest(run_dir, machine)
    best = read_state(newest).get("best")
    path = newest.with_name(f"step_{best['step']:08d}") if best else newest
    return path if path == newest or usable(path, machine) else newest


def usable(path, machine=ALONE):
    """Whether a checkpoint verifies; one that does not is a warning on stderr, of the first rank."""
    try:
        verify(path, machine)
        return True
    except CheckpointError as error:
        if machine.rank == 0:
            print(f"warning: passed over: {error}", file=sys.stderr)
        return False


# ---- verify

def verify(path, machine=ALONE, group=None):
    """Check a checkpoint: these files, no others, bit for bit by its manifest, and the index true of them.

    `CheckpointError`, alike on all ranks, if it differs. The ranks share the files out. Hidden files, which a file
    manager may leave, do not count.
    """
    together(machine, lambda: verify_share(Path(path), machine), group)


def verify_share(path, machine):
    manifest = read_manifest(path)
    for name in sorted(manifest)[machine.rank::machine.world_size]:
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
    if machine.rank == 0:
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
            raise CheckpointError(f"{path}/manifest.json: {shown(name)} is no file of a checkpoint")
        if type(entry) is not dict or type(entry.get("size")) is not int or type(entry.get("sha256")) is not str:
            raise CheckpointError(f"{path}/manifest.json: is no manifest: {shown(name)} has no size and sha256")
    try:
        there = {p.name: p.lstat().st_mode for p in path.iterdir() if not p.name.startswith(".")}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    for name in sorted({*JSON_FILES, "manifest.json"} | manifest.keys() | there.keys()):
        if name not in there:
            raise CheckpointError(f"{path}: has no file {name}")
        if name not in manifest and name != "manifest.json":
            raise CheckpointError(f"{path}: {shown(name)} is not in the manifest")
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
        raise CheckpointError(f"{path}: was written in format {shown(version)} by another version of this program, "
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

def load(path, model, optimizer, machine=ALONE):
    """Fill model and optimizer from a verified checkpoint, each rank with what is its own; returns its state.

    `UserError`, before anything is touched, if it is of another architecture.
    """
    state = {}

    def work():
        state.update(read_state(path))
        fill(read_index(path), model, local_optimizer(optimizer))

    settle(model)
    together(machine, work)
    return state


@torch.no_grad()
def fill(index, model, optimizer):
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
        offset, local = placed(p)
        index.read_into(name, local, offset)
    optimizer.state.clear()
    for name, p in own if moments else ():
        for moment, entry in moments[name].items():
            if entry.shape == tuple(p.shape):
                value = torch.zeros_like(p, dtype=entry.dtype)  # spread over the ranks as p is
            else:
                value = torch.zeros(entry.shape, dtype=entry.dtype, device=p.device)
            offset, local = placed(value)
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

def export(run_dir, path, description, machine=ALONE):
    """Write the final `model.safetensors` and `config.json` (`description`, the sha256) from the checkpoint at `path`.

    Rank 0 puts it together tensor by tensor; OSError, alike on all ranks, where the disk refuses.
    """
    def work():
        if machine.rank == 0:
            write_export(Path(run_dir), read_index(path), description)
    together(machine, work)


def write_export(run_dir, index, description):
    temporary = run_dir / ".export.tmp"
    remove(temporary)  # of an export that was killed
    try:
        temporary.mkdir()
        layout = {name: (index.entries[name].dtype, index.entries[name].shape) for name in index.keys("model")}
        with TensorFile(temporary / "model.safetensors", layout) as file:
            digest = file.fill(index.read)["sha256"]
        write_json(temporary / "config.json", {**description, "sha256": digest})
        sync(temporary)
        for name in ("config.json", "model.safetensors"):
            os.replace(temporary / name, run_dir / name)
        sync(run_dir)
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
    with readable(Path(run_dir) / "model.safetensors") as file:
        return load_file(file.path), description
