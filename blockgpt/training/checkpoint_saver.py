"""Writing checkpoints: all ranks at once, in the foreground or a background thread; pruning."""

import copy
import os
import platform
import shutil
import sys
import threading
from pathlib import Path

import numpy
import torch

from blockgpt.console import human_bytes
from blockgpt.errors import CheckpointError, UserError
from blockgpt.files import drop_page_cache, fsync_path, sha256_of, write_json
from blockgpt.training.checkpoint import (
    JSON_FILES,
    SCHEMA_VERSION,
    SINGLE_PROCESS,
    clean,
    discard,
    list_checkpoints,
    verify,
)
from blockgpt.training.checkpoint_files import (
    Index,
    own_chunks,
    write_chunks,
)
from blockgpt.training.launch import run_on_all_ranks

RANDOM = "random numbers are functions of (seed, step, rank, number of the sequence): none has a state to save"


class CheckpointSaver:
    """The checkpoints of one run: written by all ranks of `runtime` together, pruned to the newest `keep` and the best.

    asynchronous: `save` copies the tensors to memory of the CPU and returns; a thread does the rest, and `poll` tells
    how it ended. group: the gloo group over which the ranks then agree, used by nobody else; without one, it is made.
    """

    def __init__(self, run_dir, runtime=SINGLE_PROCESS, keep=2, asynchronous=False, group=None):
        self.folder, self.runtime, self.keep = Path(run_dir) / "checkpoints", runtime, keep
        self.asynchronous, self.group = asynchronous, group
        self.thread, self.outcomes = None, []
        if asynchronous and group is None and runtime.world_size > 1:
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
            pieces.update(own_chunks(model, optimizer, self.runtime))
            if in_background:  # training changes them from here on
                pieces.update({key: (*piece[:3], piece[3].to("cpu", copy=True)) for key, piece in pieces.items()})

        run_on_all_ranks(self.runtime, collect, self.group)
        state = {**copy.deepcopy(state), "versions": versions(), "world_size": self.runtime.world_size,
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
        main = self.runtime.rank == 0

        def agree(work, everywhere=True):
            return run_on_all_ranks(self.runtime, work if everywhere or main else lambda: None, self.group)

        if agree(lambda: self._prepare(final), everywhere=False)[0]:
            try:  # a resumed run stopped where it began
                verify(final, self.runtime, self.group)
                return final
            except CheckpointError:
                pass  # written again
        written = {}
        try:
            agree(temporary.mkdir, everywhere=False)
            answers = agree(lambda: write_chunks(temporary, self.runtime.rank, pieces))
            try:
                agree(lambda: written.update(commit(temporary, final, answers, state)), everywhere=False)
                written.update(answers[self.runtime.rank]["files"])
                agree(lambda: verify_written(final, written))
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


def check_disk_space(run_dir, parameters, config):
    """`UserError` if the disk has no room for a checkpoint and the export; a warning if not for all that stay.

    parameters: how many, each 4 bytes in the weights and 8 in AdamW's moments. What stands there already counts.
    """
    if config.eval_only:
        return
    one = 12 * parameters
    there = len(list_checkpoints(run_dir))
    most = (config.keep_last + 2 - there) * one + 4 * parameters  # with the best, and the next before pruning
    disk = next(path for path in (Path(run_dir).absolute(), *Path(run_dir).absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if free < one + 4 * parameters:
        raise UserError(f"{disk}: a checkpoint needs {human_bytes(one)} and the weights at the end "
                        f"{human_bytes(4 * parameters)}, {human_bytes(free)} are free (--out_dir=…)")
    if free < most:
        print(f"warning: {disk}: checkpoints will need {human_bytes(most)} more, {human_bytes(free)} are free "
              "(--out_dir=…, --keep_last=…)", file=sys.stderr)


def commit(temporary, final, answers, state):
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
    own = {name: manifest_entry(temporary / name) for name in JSON_FILES}
    write_json(temporary / "manifest.json", dict(sorted({**manifest, **own}.items())))
    fsync_path(temporary)
    if os.path.lexists(final):  # it is damaged
        discard(final)
    os.rename(temporary, final)
    fsync_path(final.parent)
    return own


def manifest_entry(path):
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def verify_written(directory, written):
    """OSError unless the files have on the disk the size and sha256 with which they were `written`."""
    for name, entry in written.items():
        drop_page_cache(directory / name)
        if manifest_entry(directory / name) != entry:
            raise OSError(f"{directory / name}: reads back otherwise than it was written")


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
