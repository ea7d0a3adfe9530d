"""Write checkpoints: all ranks at once, verified after the write, pruned, in the foreground or a background thread.

Each rank writes its own chunks into a hidden directory, which rank zero renames to the checkpoint's name: a killed save
leaves no checkpoint. Every step of a save ends with an all_gather on all ranks, so an error on one rank is an error on
all. A new file per checkpoint is written and entered into the manifest in `commit_checkpoint`.
"""

import copy
import errno
import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist

from blockgpt.checkpoints.checkpoint import (
    JSON_FILES,
    SCHEMA_VERSION,
    SINGLE_PROCESS,
    clean,
    discard,
    list_checkpoints,
    read_state,
    verify,
)
from blockgpt.checkpoints.files import Index, LocalChunk, file_layouts, has_tensors, own_chunks, write_chunks
from blockgpt.console import echo, human_bytes
from blockgpt.errors import CheckpointError, UserError
from blockgpt.files import drop_page_cache, exists, fsync_path, is_dir, list_dir, sha256_of, write_json
from blockgpt.training.background import BackgroundThread
from blockgpt.training.device import is_out_of_memory
from blockgpt.training.launch import Runtime, run_on_all_ranks

RANDOM = "random numbers are functions of (seed, step, rank, sequence id): there is no generator state to save"


class CheckpointSaver:
    """The checkpoints of one run: written by all ranks of `runtime`, pruned to the newest `keep` and the best.

    Args:
        asynchronous: `save` copies the tensors to CPU memory and returns; a thread writes them, and `poll` returns its
            outcome.
        group: a gloo group for the thread's all_gathers only; created if it is needed and None.
    """

    def __init__(self, run_dir: str | Path, runtime: Runtime = SINGLE_PROCESS, keep: int = 2,
                 asynchronous: bool = False, group: dist.ProcessGroup | None = None) -> None:
        self.directory, self.runtime, self.keep = Path(run_dir) / "checkpoints", runtime, keep
        self.asynchronous, self.group = asynchronous, group
        self.thread: BackgroundThread | None = None
        self.copies: dict[str, torch.Tensor] = {}
        self.saving: int | None = None  # the step whose background save has no outcome yet
        if asynchronous and group is None and runtime.world_size > 1:
            self.group = dist.new_group(backend="gloo")

    @property
    def ended(self) -> bool:
        """Whether `poll` has an outcome."""
        return self.thread is not None and not self.thread.is_alive()

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any],
             wait: bool = False) -> Path | None:
        """Write the checkpoint of `state["step"]`. The background save before it has ended, and was polled.

        Args:
            state: JSON-able, the same on all ranks. `step` counts the optimizer steps done, `best` is
                {"step", "val_loss"} or None.
            wait: write in the foreground although asynchronous.

        Returns:
            the checkpoint's directory; None if it is written in the background, where `poll` returns the outcome

        Raises:
            OSError: a write failed; raised on all ranks.
        """
        assert self.thread is None, "the outcome of the last save was not asked for"
        chunks: dict[str, LocalChunk] = {}
        in_background = self.asynchronous and not wait

        def collect() -> None:
            chunks.update(own_chunks(model, optimizer, self.runtime))
            if in_background:  # training changes the tensors meanwhile
                chunks.update(self._copies(chunks))

        run_on_all_ranks(self.runtime, collect, self.group)
        state = {**copy.deepcopy(dict(state)), "versions": versions(), "world_size": self.runtime.world_size,
                 "random": RANDOM, "schema_version": SCHEMA_VERSION}
        if not in_background:
            return self._write(chunks, state)
        self.saving, self.thread = state["step"], BackgroundThread(lambda: self._write(chunks, state), "save")
        return None

    def poll(self) -> tuple[int, str | None] | None:
        """The outcome of the background save: (step, why it failed or None); None if it runs or there is none."""
        if not self.ended:
            return None
        assert self.thread is not None and self.saving is not None
        thread, self.thread = self.thread, None
        try:
            thread.check()
        except OSError as error:
            return self.saving, str(error)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error):
                raise
            return self.saving, "out of memory (--checkpoint_async=False keeps no second copy of the weights)"
        return self.saving, None

    def join(self) -> None:
        """Wait for the background save to end."""
        if self.thread is not None:
            self.thread.join()

    def wait(self) -> tuple[int, str | None] | None:
        """`poll`, after the background save has ended."""
        self.join()
        return self.poll()

    def _copies(self, chunks: Mapping[str, LocalChunk]) -> dict[str, LocalChunk]:
        """The chunks in CPU memory, which the next background save uses again: pinned memory is slow to get."""
        for key, chunk in chunks.items():
            former = self.copies.get(key)
            if former is None or (former.shape, former.dtype) != (chunk.data.shape, chunk.data.dtype):
                self.copies[key] = torch.empty(chunk.data.shape, dtype=chunk.data.dtype, device="cpu",
                                               pin_memory=chunk.data.is_cuda)
            self.copies[key].copy_(chunk.data, non_blocking=chunk.data.is_cuda)
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)
        return {key: chunk._replace(data=self.copies[key]) for key, chunk in chunks.items()}

    # ------------------------------------------------------------ a save, on all ranks at once

    def _write(self, chunks: Mapping[str, LocalChunk], state: Mapping[str, Any]) -> Path:
        """`_write_files`; what cannot be told is a failed save like any other."""
        try:
            return self._write_files(chunks, state)
        except UserError as error:
            raise OSError(str(error)) from None

    def _write_files(self, chunks: Mapping[str, LocalChunk], state: Mapping[str, Any]) -> Path:
        """Write, verify, prune; returns the checkpoint's directory."""
        final = self.directory / f"step_{state['step']:08d}"
        temporary = self.directory / f".{final.name}.tmp"
        if self._on_rank_zero(lambda: self._prepare(final)):
            try:
                verify(final, self.runtime, self.group)
                if self._on_rank_zero(lambda: describes(final, state)):  # a resumed run ended where it began
                    return final
            except CheckpointError:
                pass  # it is written again
        try:
            self._on_rank_zero(temporary.mkdir)
            rank_files = self._on_all_ranks(lambda: write_chunks(temporary, self.runtime.rank, chunks))
            try:
                json_files = self._on_rank_zero(lambda: commit_checkpoint(temporary, final, rank_files, state))
                self.runtime.activity("verify")
                self._on_all_ranks(lambda: verify_written(final, self.runtime.rank, chunks, json_files))
            except OSError:
                if self.runtime.is_rank_zero:
                    discard(final)
                raise
        finally:
            if self.runtime.is_rank_zero:
                shutil.rmtree(temporary, ignore_errors=True)
        if self.runtime.is_rank_zero:
            self._prune(state)
        return final

    def _on_all_ranks(self, work: Callable[[], Any]) -> list[Any]:
        return run_on_all_ranks(self.runtime, work, self.group)

    def _on_rank_zero(self, work: Callable[[], Any]) -> Any:
        """Run `work()` on rank zero; returns its result, or raises its error, on all ranks."""
        return self._on_all_ranks(lambda: work() if self.runtime.is_rank_zero else None)[0]

    def _prepare(self, final: Path) -> bool:
        """Make the directory of checkpoints and clean it; whether something has the new checkpoint's name."""
        self.directory.mkdir(exist_ok=True)
        clean(self.directory.parent)
        return final.name in (path.name for path in list_dir(self.directory))

    def _prune(self, state: Mapping[str, Any]) -> None:
        """Remove all but the newest `keep` up to this step, and the best. The run will overwrite later ones."""
        steps = [(step, path) for step, path in list_checkpoints(self.directory.parent) if step <= state["step"]]
        for step, path in steps[self.keep:]:
            if not state.get("best") or step != state["best"]["step"]:
                discard(path)


def describes(path: Path, state: Mapping[str, Any]) -> bool:
    """Whether a verified checkpoint says of model, data and progress what `state` says."""
    saved = read_state(path)
    now = json.loads(json.dumps(state))
    return all(saved.get(key) == now.get(key) for key in ("step", "data", "val_data", "description"))


def commit_checkpoint(temporary: Path, final: Path, rank_files: list[dict[str, Any]],
                      state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Write index, state and manifest, and rename `temporary` to `final`.

    Args:
        rank_files: what `write_chunks` returned, by rank

    Returns:
        {file name: manifest entry} of index and state
    """
    index: dict[str, dict[str, Any]] = {}
    manifest: dict[str, dict[str, Any]] = {}
    for answer in rank_files:
        manifest |= answer["files"]
        for key, (file, dtype, shape, offsets, sizes) in answer["chunks"].items():
            entry = index.setdefault(key, {"dtype": dtype, "shape": shape, "pieces": []})
            if 0 not in sizes:
                entry["pieces"].append({"file": file, "offset": offsets, "shape": sizes})
    Index(final, index)  # raises unless the chunks of all ranks tile every tensor
    write_json(temporary / "index.json", index, indent=None)
    write_json(temporary / "state.json", state)
    json_files = {name: manifest_entry(temporary / name) for name in JSON_FILES}
    write_json(temporary / "manifest.json", dict(sorted({**manifest, **json_files}.items())))
    fsync_path(temporary)
    if final in list_dir(final.parent):  # it is damaged, or of other data or another model (resume_force)
        discard(final)
    os.rename(temporary, final)
    fsync_path(final.parent)
    return json_files


def manifest_entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def verify_written(directory: Path, rank: int, chunks: Mapping[str, LocalChunk],
                   json_files: Mapping[str, Mapping[str, Any]]) -> None:
    """OSError unless this rank's tensor files have its `chunks` on the disk, and `json_files` their manifest entries.

    Rank zero reads the JSON files.
    """
    layouts = file_layouts(rank, chunks)
    for name in [*layouts, *(json_files if rank == 0 else ())]:
        drop_page_cache(directory / name)
        if not (has_tensors(directory / name, layouts[name], lambda key: chunks[key].data) if name in layouts else
                manifest_entry(directory / name) == json_files[name]):
            raise OSError(f"{directory / name}: its content on the disk differs from what was written")


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}


# ---- before the first save

def check_disk_space(run_dir: str | Path, parameters: int, config: Any) -> None:
    """`UserError` if a checkpoint and the export do not fit on the disk; a warning if not all kept checkpoints do.

    Existing checkpoints of the run count as kept ones.

    Args:
        parameters: their count: 4 bytes each for the weights and 8 for AdamW's state.
        config: its `eval_only` and `keep_last` are read.
    """
    if config.eval_only:
        return
    check_writable(Path(run_dir))
    checkpoint_bytes, export_bytes = 12 * parameters, 4 * parameters
    # The newest `keep_last`, the best, and the next one before pruning.
    missing = config.keep_last + 2 - len(list_checkpoints(run_dir))
    needed = missing * checkpoint_bytes + export_bytes
    disk = next(path for path in (Path(run_dir).absolute(), *Path(run_dir).absolute().parents) if exists(path))
    free = shutil.disk_usage(disk).free
    if free < checkpoint_bytes + export_bytes:
        raise UserError(f"{disk}: a checkpoint needs {human_bytes(checkpoint_bytes)} and the weights at the end "
                        f"{human_bytes(export_bytes)}, {human_bytes(free)} are free (--out_dir=…)")
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if 0 <= largest < export_bytes:  # RLIM_INFINITY is -1
        raise UserError(f"{disk}: the weights at the end need a file of {human_bytes(export_bytes)}, and files are "
                        f"limited to {human_bytes(largest)} (ulimit -f unlimited)")
    if free < needed:
        echo(f"warning: {disk}: checkpoints will need {human_bytes(needed)} more, {human_bytes(free)} are free "
             "(--out_dir=…, --keep_last=…)", sys.stderr)


def check_writable(run_dir: Path) -> None:
    """`UserError` unless checkpoints and export can be written into the directory of a resumed run, if it exists."""
    for folder in (run_dir, run_dir / "checkpoints"):
        if not exists(folder):
            continue
        try:
            (folder / ".export.tmp").mkdir(exist_ok=True)
            os.rmdir(folder / ".export.tmp")
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # what a killed export left
                raise UserError(f"{folder}: cannot be written: {error.strerror} (make it writable, or start a new run "
                                "with another --run_name)") from None
    for name in ("model.safetensors", "config.json"):
        if is_dir(run_dir / name):
            raise UserError(f"{run_dir / name}: is a folder, where the weights at the end are written (remove it)")
