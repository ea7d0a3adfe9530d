"""The run directory: run.json, metrics.jsonl, the console.

run.json says what the run is and how it ended, and is replaced whole; metrics.jsonl gets one object a line,
flushed at once, so that a run killed at any moment leaves a log that reads. A resumed run appends: readers
keep the last record of a step. Only the main process writes.
"""

import contextlib
import datetime
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy
import torch

from blockgpt.console import echo, human_bytes, human_time, in_columns, is_terminal
from blockgpt.errors import UserError
from blockgpt.files import write_json
from blockgpt.training.tracker import WandbTracker
from configurator import run_exists

SCHEMA_VERSION = 1
ROOT = Path(__file__).resolve().parent
RANKS_LISTED = 64  # with more processes, the log says how their values spread
SLOWER = 1.05  # × the median step time: a rank that the console points at


def run_directory(config):
    """The directory of this run: a new name for a fresh run, the run's own for a resumed one.

    `UserError` if a fresh run would land on another.
    """
    if config.run_name is None:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{stamp}-{config.model.arch_preset}"
        names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
        return next(p for p in (Path(config.out_dir) / n for n in names) if not os.path.lexists(p))
    path = Path(config.out_dir) / config.run_name
    if not config.resuming and os.path.lexists(path) and not (config.resume == "auto" and path.is_dir()):
        raise UserError(f"--run_name: run_name: {path} exists (--resume=auto to go on with it, or another name)")
    return path


class RunLog:
    """The log of one run, a context manager: whatever ends the block is recorded as the run's status.

    dir: where it is, which is run_dir unless another run took that name in the meantime.
    """

    def __init__(self, run_dir, header, config, resumed, quiet=False):
        """header: what run.json says beside status and results. quiet: write nothing (not the main process)."""
        self.dir, self.config, self.quiet = Path(run_dir), config, quiet
        self.header, self.resumed, self.record = header, resumed, None
        self.live, self.line_open = is_terminal(), False
        self.results, self.speeds, self.tracker = {}, {"tokens_per_sec": [], "mfu": [], "step_time": []}, None
        self.ended = {"status": "finished", "status_reason": None}
        self.first_step = None

    def open(self):
        """Make the directory, or take over that of a resumed run; its path. `UserError` where it cannot be written."""
        header = self.header
        try:
            if not self.resumed:
                self._make_directory()
            self.metrics = open(self.dir / "metrics.jsonl", "a+b")  # noqa: SIM115 (lives as long as self)
            if self.resumed:
                header = self._go_on(header)
            self.started = time.time() - (self.results.get("wall_time") or 0)  # a resumed run's time adds up
            self.record = {"schema_version": SCHEMA_VERSION, "run_name": self.dir.name, "status": None,
                           "status_reason": None, "created_at": utc_now(), **header}
            self.record |= {"status": "running", "status_reason": None}
            self._write_record()
        except OSError as error:
            raise UserError(f"{self.dir}: cannot be written: {error.strerror} (--out_dir=…)") from None
        if self.config.wandb_log:
            self.record.setdefault("wandb_id", uuid.uuid4().hex[:8])  # ours, so that nobody waits to be told of it
            self._update_record()
            self.tracker = WandbTracker(self.config, self.dir, finite(self.record), self.warning)
        return str(self.dir)

    def _make_directory(self):
        while True:
            try:
                return self.dir.mkdir(parents=True, exist_ok=self.config.resume == "auto")
            except FileExistsError:  # another run, started in the same second, was faster
                self.dir = run_directory(self.config)

    def _go_on(self, header):
        """Take over from the run.json of a resumed run what stays true; returns the header."""
        self._end_torn_line()
        for stale in self.dir.glob(".run.json.*.tmp"):  # of a killed process
            stale.unlink()
        before = json.loads((self.dir / "run.json").read_bytes())
        self.results = before.get("results") or {}
        if self.config.eval_only:  # an evaluation changes nothing of what the run is, nor how it ended
            self.ended = {k: before.get(k) for k in self.ended}
            return before
        kept = {k: before[k] for k in ("created_at", "wandb_id", "resumes") if k in before}
        origin = {k: v for k, v in before["config"].items()  # where it came from
                  if k in ("resume", "resume_force", "eval_only")}
        return {**header, **kept, "config": {**header["config"], **origin}}

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.quiet:
            return
        if self.record["status"] == "running":
            if kind is None:
                self.record |= self.ended
            else:
                interrupted = issubclass(kind, KeyboardInterrupt)
                self.record["status"] = "interrupted" if interrupted else "failed"
                self.record["status_reason"] = " ".join(f"{kind.__name__}: {error}".split())[:500]
        if self.line_open:
            echo("")
        self._update_record()
        with contextlib.suppress(OSError):  # the disk may be what ended the run
            self.metrics.close()
        if self.tracker:
            self.tracker.finish(finite(self.record))

    def resumed_at(self, step, changed, forced, world_size):
        """Record, and say, where a resumed run goes on and what of its config changed, {key: [before, now]}."""
        if self.quiet:
            return
        entry = {"step": step, "changed": changed, "forced": list(forced), "world_size": world_size}
        self.record["resumes"] = [*self.record.get("resumes", []), entry]
        for name, (before, now) in changed.items():
            self.info(f"  {name}: {before} -> {now}{' (forced)' if name in forced else ''}")
        self._update_record()

    def interrupted(self, reason):
        """Record that the run was stopped from outside, with its state saved."""
        if not self.quiet:
            self.record |= {"status": "interrupted", "status_reason": reason}

    def lost(self, reason):
        """Record the run as failed, from whatever thread, as the process is about to leave."""
        if not self.quiet:
            self.record |= {"status": "failed", "status_reason": reason}
            self._update_record()

    def saved(self, step, seconds):
        """A checkpoint that stands; seconds: how long the run waited for it, None if it did not."""
        if self.quiet:
            return
        self._append("save", {"step": step, "seconds": seconds})
        self.results["saved_step"] = step
        self.info(f"step {step:>6}   saved" + ("" if seconds is None else f" in {seconds:.2f} s"))

    def spike(self, step, loss, excess, skipped):
        """A loss `excess` standard deviations above its running mean; skipped: whether its update was left out."""
        if self.quiet:
            return
        self._append("spike", {"step": step, "loss": loss, "excess": excess, "skipped": skipped})
        self.results["spikes"] = self.results.get("spikes", 0) + 1
        self.results["skipped_steps"] = self.results.get("skipped_steps", 0) + skipped
        self.warning(f"step {step}: the loss of {loss:.4f} is a spike, {excess:.1f} standard deviations above its mean"
                  + ("; its update is left out" if skipped else ""))

    def step(self, ranks=None, **values):
        """One line of training: step, tokens, loss, lr, grad_norm, step_time, tokens_per_sec, mfu, memory …

        ranks: {name: [value of rank 0, of rank 1, …]}, of several processes: `step_time` (s), `memory_peak` (bytes),
        and `communication`, what `blockgpt.training.profiling.Profile.communication` gives.
        """
        if self.quiet:
            return
        if ranks and len(ranks["step_time"]) > 1:
            values |= rank_statistics(ranks)
            peaks = [peak for peak in ranks["memory_peak"] if peak is not None]
            values["memory"] = {**values["memory"], "peak": max(peaks, default=None)}
        self._append("step", values)
        for name, series in self.speeds.items():
            series.append(values[name])
        peak = (values["memory"] or {}).get("peak")
        self.results |= {"step": values["step"], "tokens": values["tokens"], "peak_memory": peak,
                         "tokens_per_source": values.get("tokens_per_source"),
                         "wall_time": round(time.time() - self.started, 3)}
        if values.get("communication"):
            self.results["communication"] = values["communication"]
        if self.first_step is None:
            self.first_step = (values["step"], time.time())
        self._show(values)

    def evaluation(self, step, tokens, **metrics):
        """The validation metrics after `step` optimizer steps."""
        if self.quiet:
            return
        self._append("eval", {"step": step, "tokens": tokens, **metrics})
        self.results |= {"step": step, "tokens": tokens, **metrics}
        self._update_record()
        words = "   ".join(f"{k} {v:.4f}" for k, v in metrics.items() if isinstance(v, float))
        self.info(f"step {step:>6}   {words}")

    def best(self, best):
        """Note the best evaluation so far: {"step", "val_loss", "val_bpb"}."""
        self.results |= {"best_step": best["step"], "best_val_loss": best["val_loss"],
                         "best_val_bpb": best.get("val_bpb")}

    def gradients(self, step, layers):
        """Per-layer statistics: {layer: {grad_norm, grad_max, weight_norm}}."""
        if not self.quiet:
            self._append("gradients", {"step": step, "layers": layers})

    def info(self, text):
        """A line that stays on the console."""
        if not self.quiet:
            self._clear_line()
            echo(text)

    def warning(self, text):
        """A line on stderr."""
        if not self.quiet:
            self._clear_line()
            echo(f"warning: {text}", sys.stderr)

    def _clear_line(self):
        if self.line_open:
            echo("\r\x1b[K", end="")
            self.line_open = False

    def _show(self, v):
        first, since = self.first_step
        done = v["step"] - first
        left = (time.time() - since) / done * (self.config.max_iters - v["step"]) if done else None
        mfu = (f"MFU {v['mfu']:.1%}   " if v["mfu"] is not None else "") + f"{v['tflops']:.3g} TFLOP/s"
        memory = v["memory"]["allocated"]
        if communication := v.get("communication"):
            mfu += f"   communication {communication['share']:.1%}, {communication['exposed']:.1%} exposed"
        if "ranks" in v:
            times = v["ranks"]["step_time"]
            most, middle = ((times["max"], times["median"]) if isinstance(times, dict)
                            else (max(times), statistics.median_low(times)))
            if most > SLOWER * middle:
                mfu += f"   rank {v['slowest_rank']} takes {most / middle:.2f} × as long"
        line = (f"step {v['step']:>6}/{self.config.max_iters}   loss {v['loss']:.4f}   "
                f"{v['tokens_per_sec']:>9,.0f} tok/s   {mfu}   left {human_time(left):<7}   "
                f"{v['step_time'] * 1e3:.1f} ms   lr {v['lr']:.2e}   |g| {v['grad_norm']:.2f}   {human_bytes(memory)}")
        if self.live:  # rewritten in place, which a line that wraps cannot be
            echo("\r\x1b[K" + line[:shutil.get_terminal_size().columns - 1], end="")
            self.line_open = True
        else:
            echo(line)

    def _append(self, kind, values):
        line = json.dumps({"kind": kind, **finite(values)}, allow_nan=False)
        try:
            self.metrics.write(line.encode() + b"\n")
            self.metrics.flush()
        except OSError as error:
            self.warning(f"metrics.jsonl: {error.strerror}: the {kind} line of step {values['step']} may be lost")
        if self.tracker:
            self.tracker.log(kind, finite(values))

    def _end_torn_line(self):
        """A killed run may have left half a line; what follows must not be glued to it."""
        if self.metrics.seek(0, os.SEEK_END):
            self.metrics.seek(-1, os.SEEK_END)
            if self.metrics.read(1) != b"\n":
                self.metrics.write(b"\n")

    def _write_record(self):
        for name, series in self.speeds.items():  # the first one warms up
            known = [v for v in series[len(series) > 2:] if v is not None]
            if series:
                self.results[name] = statistics.median(known) if known else None
        self.record |= {"updated_at": utc_now(), "results": self.results}
        write_json(self.dir / "run.json", finite(self.record))

    def _update_record(self):
        try:
            self._write_record()
        except OSError as error:
            self.warning(f"run.json: {error.strerror}: it keeps what it said before")


def rank_statistics(ranks):
    """What a step's record says of several processes; ranks: see `RunLog.step`.

    ranks: each value of each rank (beyond RANKS_LISTED of them: how they spread), slowest_rank, and communication:
    the means of share and exposed, and waited_for, the rank that waited least for the others: processes that work in
    step all take the same time, and only this tells which one the others wait for.
    """
    ranks = dict(ranks)
    measured = ranks.pop("communication", None) or []
    times = ranks["step_time"]
    values = {"slowest_rank": times.index(max(times))}
    if any(measured):
        for part in ("share", "exposed"):
            ranks[f"communication_{part}"] = [one and one[part] for one in measured]
        known = {rank: one for rank, one in enumerate(measured) if one}
        values["communication"] = {
            **{part: statistics.mean(one[part] for one in known.values()) for part in ("share", "exposed")},
            "waited_for": min(known, key=lambda rank: known[rank]["exposed"])}
    return {"ranks": {name: summarize_ranks(series) for name, series in ranks.items()}, **values}


def summarize_ranks(series):
    """A value of every rank as it is logged: the list, or of a long one {min, median, max, max_rank}."""
    known = [value for value in series if value is not None]
    if len(series) <= RANKS_LISTED:
        return series
    if not known:
        return None
    return {"min": min(known), "median": statistics.median(known), "max": max(known),
            "max_rank": series.index(max(known))}


def finite(value):
    """The same value with every number that JSON has not (nan, inf) as None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment():
    """{versions, git_commit, command}: what it would take to run this again."""
    try:
        git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                             capture_output=True, text=True, timeout=10)
        commit = git.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {"versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
                         "platform": platform.platform()},
            "git_commit": commit, "command": [Path(sys.argv[0]).name, *sys.argv[1:]]}


def print_header(header, config, model, flops, run_dir):
    """What will be trained, on what, at which cost: everything a reader needs before the first step."""
    built = model.infer_config()
    options = built.options()
    forward = sum(flops["forward"].values())
    shares = " · ".join(f"{name} {n / 1e6:,.2f}M ({n / forward:.0%})" for name, n in flops["forward"].items())
    count, hardware, data = header["parameters"], header["hardware"], header["data"]
    peak = hardware["peak_flops"]
    rows = [("architecture", built.arch_name())]
    rows += [(f"  {axis}", f"{getattr(built, axis)} ({o.cls})") for axis, o in options.items()
             if o.label or getattr(built, axis) != "none"]
    kernels = " · ".join(f"{name}: {kernel}" for name, kernel in header["attention_kernels"].items())
    how = [", chosen by auto"] if config.model.attention_backend == "auto" else []
    how += [f"; torch's kernel here: {kernels}"] if kernels else []
    rows = [(name, text + "".join(how) if name == "  attention_backend" else text) for name, text in rows]
    rows += [
        ("  sizes", f"d_ff {built.d_ff} · head_dim {built.head_dim} · kv heads {built.n_kv_head} · "
                    f"vocabulary {built.vocab_size} · block {built.block_size} · "
                    f"bias {'yes' if built.bias else 'no'} · head {'tied' if built.weight_tying else 'untied'}"),
        ("parameters", f"{count['total']:,} · trainable {count['trainable']:,} · "
                       f"without embeddings {count['non_embedding']:,}"),
        ("data", f"{data['dataset']}: {data['train_tokens']:,} training tokens, {data['val_tokens']:,} for validation"),
        ("step", f"{data['tokens_per_step']:,} tokens in {data['sequences_per_step']} sequences; the run sees "
                 f"{data['tokens_per_step'] * config.max_iters:,} tokens, "
                 f"{data['tokens_per_step'] * config.max_iters / data['train_tokens']:.2g} epochs"),
        *((f"  {name}", f"{s['share']:.4g} of the tokens" + (" at the end" if len(config.phases()) > 1 else "")
           + f": {s['planned_tokens']:,} of {s['train_tokens']:,}, {s['planned_epochs']:.2g} epochs")
          for name, s in data["sources"].items() if len(data["sources"]) > 1),
        ("device", f"{hardware['world_size']} × {hardware['name']} ({hardware['device']}), {hardware['dtype']}"
                   f"{', tf32' if hardware['tf32'] else ''}{', compiled' if hardware['compile'] else ''}"),
        ("FLOPs per token", f"forward {forward / 1e6:,.2f}M: {shares}"),
        ("", f"training {flops['train'] / 1e6:,.2f}M (PaLM convention, used for MFU), "
             f"{flops['train_causal'] / 1e6:,.2f}M (causal)"),
        ("MFU divides by", f"{peak / 1e12:,.4g} TFLOP/s ({hardware['peak_source']})" if peak
                           else f"nothing: {hardware['peak_source']}; no MFU"),
        ("run", str(run_dir)),
    ]
    for name, text in rows:
        echo(in_columns(f"{name:<22} ", text))
    for name, reason in config.keys_without_effect().items():
        echo(f"note: {config.explicit[name]}: {name} has no effect here: {reason}")


def utc_now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def find_restarted_run(config, runtime):
    """The name of the run that these processes are to go on with, in place of others that torchrun has lost; or None.

    It is the one that an earlier launch began: a directory that was refused as another run's stays refused.
    """
    def find():
        runs = [Path(config.out_dir, config.run_name)] if config.run_name else sorted(Path(config.out_dir).glob("*"))
        for run in reversed(runs):
            try:
                if json.loads((run / "run.json").read_bytes())["launch"] == runtime.first_launch_id:
                    return run.name
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                continue
        return config.run_name if config.run_name and not run_exists(runs[0]) else None

    # Not by torchrun's own count of restarts: each node has another.
    return runtime.on_rank_zero(find) if runtime.launch_id != runtime.first_launch_id else None
