"""What people see of a run on the console: the header, the progress, lines that stay, the end.

On a terminal one line is rewritten in place: what the run does (WORDS), a bar, and the values of the newest logged
step. A line stays for every HISTORY-th of the run and at every evaluation. Elsewhere every logged step is a line. This
module gets plain values. A new value is a `Field` of `step_fields`.
"""

import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TextIO

from blockgpt.console import (
    can_rewrite,
    clear_line,
    echo,
    give_up,
    human_bytes,
    human_time,
    in_columns,
    paint,
    percentages,
    rewrite_line,
    terminal_width,
)

STRAGGLER_RATIO = 1.05  # × the median step time: a rank that the console names
DRAW_SECONDS = 0.1  # between two drawings of the line that is rewritten
HISTORY = 20  # a line stays on a terminal for every 20th of the run
MIN_BAR, MAX_BAR = 10, 40  # characters
WORDS = {"start": "starting", "data": "loading data", "build": "building", "restore": "restoring", "wrap": "preparing",
         "step": "training", "evaluation": "evaluating", "save": "saving", "verify": "verifying",
         "export": "exporting"}  # of the phases of `Watchdog.enter_phase` and `Runtime.activity`; others have none
COMPILING = "compiling"  # the first step and evaluation of a model that is compiled


class Field(NamedTuple):
    """A value on a line. In a line that is too narrow, the fields of the highest rank are left out, as a whole."""

    text: str
    rank: int


def fit_fields(fields: Sequence[Field], width: int, separator: str) -> list[Field]:
    """Those of the fields that fit into a line, in their order: the lowest ranks, and of equal ranks the first."""
    chosen: set[int] = set()
    length = -len(separator)
    for index in sorted(range(len(fields)), key=lambda i: fields[i].rank):
        length += len(separator) + len(fields[index].text)
        if length > width:
            break
        chosen.add(index)
    return [field for index, field in enumerate(fields) if index in chosen]


def step_fields(v: Mapping[str, Any], max_iters: int, left: float | None) -> list[Field]:
    """The fields of a logged step.

    Args:
        v: its record in metrics.jsonl.
        left: seconds that the run will take from here on; None is unknown.
    """
    fields = [Field(f"step {v['step']:>6}/{max_iters}", 0), Field(f"loss {v['loss']:.4f}", 1),
              Field(f"{v['tokens_per_sec']:>9,.0f} tok/s", 3)]
    if v["mfu"] is not None:
        fields.append(Field(f"MFU {v['mfu']:.1%}", 4))
    fields.append(Field(f"{v['tflops']:.3g} TFLOP/s", 9))
    if communication := v.get("communication"):
        fields.append(Field(f"communication {communication['share']:.1%}, {communication['exposed']:.1%} exposed", 11))
    if "ranks" in v:
        times = v["ranks"]["step_time"]
        slowest, median = ((times["max"], times["median"]) if isinstance(times, dict)
                           else (max(times), statistics.median_low(times)))
        if slowest > STRAGGLER_RATIO * median:
            fields.append(Field(f"rank {v['slowest_rank']} takes {slowest / median:.2f} × as long", 10))
    fields += [Field(f"left {human_time(left):<7}", 2), Field(f"{v['step_time'] * 1e3:.1f} ms", 5),
               Field(f"lr {v['lr']:.2e}", 7), Field(f"|g| {v['grad_norm']:.2f}", 6),
               Field(human_bytes(v["memory"]["allocated"]), 8)]
    return fields + [Field(f"{name} {value:.4f}", 12) for name, value in v.get("metrics", {}).items()]


class RunConsole:
    """The console of one run; a quiet one, as on ranks other than zero, prints nothing."""

    def __init__(self, max_iters: int, quiet: bool = False, compiled: bool = False) -> None:
        self.max_iters, self.quiet, self.compiled = max_iters, quiet, compiled
        self.live = can_rewrite() and not quiet
        self.word = ""
        self.entered: set[str] = set()  # phases
        self.done: int | None = None  # steps; None before the first one begins
        self.first_step: tuple[int, float] | None = None
        self.newest: Mapping[str, Any] | None = None  # the record of the newest logged step
        self.history_step = 0  # of the newest step whose line stays
        self.drawn = 0.0

    # ------------------------------------------------------------ lines that stay

    def info(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            self._print(text)

    def warning(self, text: str) -> None:
        """A line on stderr."""
        if not self.quiet:
            self._print(paint("warning:", "yellow", sys.stderr) + f" {text}", sys.stderr)

    def step(self, v: Mapping[str, Any]) -> None:
        """A logged step: the values of its record in metrics.jsonl."""
        if self.quiet:
            return
        self.newest, self.done = v, v["step"]
        if self.first_step is None:
            self.first_step = (v["step"], time.time())
        if not self.live:
            self._print("   ".join(field.text for field in step_fields(v, self.max_iters, self.seconds_left())))
        elif v["step"] * HISTORY // self.max_iters > self.history_step * HISTORY // self.max_iters:
            self.keep_step()
        self.refresh()

    def keep_step(self) -> None:
        """Let the line of the newest logged step stay on the terminal, once."""
        if self.live and self.newest and self.newest["step"] > self.history_step:
            self.history_step = self.newest["step"]
            fields = step_fields(self.newest, self.max_iters, self.seconds_left())
            line = "   ".join(field.text for field in fit_fields(fields, terminal_width() - 1, "   "))
            self._print(line.rstrip())

    def close(self) -> None:
        """Remove the line that is rewritten; the newest logged step stays."""
        self.keep_step()
        self.live = False
        clear_line()

    @staticmethod
    def _print(text: str, stream: TextIO | None = None) -> None:
        """`echo`; when nobody reads the pipe any more, the run goes on without output."""
        try:
            echo(text, stream)
        except BrokenPipeError as error:
            give_up(stream or sys.stdout, error)

    # ------------------------------------------------------------ the line that is rewritten

    def enter_phase(self, phase: str, step: int | None = None) -> None:
        """What the run does from now on is a phase of WORDS; `step` is the one that begins, counted from 1."""
        if not self.live:
            return
        word = COMPILING if self.compiled and phase in ("step", "evaluation") and phase not in self.entered \
            else WORDS.get(phase, "")
        new = phase not in self.entered
        self.entered.add(phase)
        if step is not None:
            self.done = step - 1
        if word == self.word:
            return self.refresh()
        self.word = word
        if word != WORDS["step"] or new:  # it may take long, without another call: show it at once
            self.drawn = 0.0
        self.refresh()

    def refresh(self) -> None:
        """Rewrite the line, unless it was a moment ago."""
        if self.live and time.monotonic() - self.drawn >= DRAW_SECONDS:
            self.drawn = time.monotonic()
            rewrite_line(self.line(terminal_width() - 1))

    def seconds_left(self) -> float | None:
        """The seconds until max_iters, from those that the steps of this process took; None is unknown."""
        if self.first_step is None or self.done is None or self.done <= self.first_step[0]:
            return None
        steps, seconds = self.done - self.first_step[0], time.time() - self.first_step[1]
        return seconds / steps * (self.max_iters - self.done)

    def line(self, width: int) -> str:
        """The line that is rewritten, of at most `width` characters."""
        training = self.word == WORDS["step"]
        if self.done is None:
            return f"{self.word} …"[:max(width, 0)]
        fields = [Field(f"{self.word:<{MIN_BAR}}", 4 if training else 0), Field("━" * MIN_BAR, 5),
                  Field(f"{100 * self.done // self.max_iters:>3}%", 0), Field(f"{self.done}/{self.max_iters}", 3),
                  Field(f"left {human_time(self.seconds_left())}", 1)]
        if self.newest:
            v = self.newest
            fields += [Field(f"loss {v['loss']:.4f}", 2), Field(f"{v['tokens_per_sec']:,.0f} tok/s", 6)]
            known = {"MFU": 7, "ms": 8, "|g|": 9, "lr": 10}
            for field in step_fields(v, self.max_iters, None):
                label = next((label for label in known if label in field.text.split()), None)
                if label:
                    fields.append(Field(field.text, known[label]))
        chosen = fit_fields(fields, width, "  ")
        free = width - sum(len(field.text) for field in chosen) - 2 * (len(chosen) - 1)
        return "  ".join(self.bar(min(MAX_BAR, MIN_BAR + max(free, 0))) if field is fields[1]
                         else paint(field.text, "yellow") if field is fields[0] and not training
                         else field.text for field in chosen)

    def bar(self, length: int) -> str:
        """A bar of `length` characters."""
        done = length * min(self.done or 0, self.max_iters) // self.max_iters
        return paint("━" * done, "green") + paint("─" * (length - done), "dim")


def print_end(console: RunConsole, results: Mapping[str, Any], metric: str, seconds: float,
              commands: Sequence[Sequence[str]]) -> None:
    """How a run has ended and what can be done next.

    Args:
        results: of run.json.
        metric: of the criterion.
        seconds: that the run took, over all its launches.
        commands: to paste, as words.
    """
    best, last = results.get(f"best_{metric}"), results.get(metric)
    if best is not None:
        console.info(paint(f"best {metric} {best:.4f}", "bold") + f" at step {results['best_step']}"
                     + (f", at the end {last:.4f}" if last is not None and last != best else ""))
    if results.get("tokens"):
        speed = results.get("tokens_per_sec")
        console.info(f"{results['step']:,} steps, {results['tokens']:,} tokens in {human_time(seconds)}"
                     + (f", {speed:,.0f} tokens/s" if speed else ""))
    console.info("next:")
    for words in commands:
        console.info(paint(f"  {shlex.join(words)}", "cyan"))


def print_header(console: RunConsole, header: Mapping[str, Any], classes: Mapping[str, str], phases: int,
                 run_dir: str) -> None:
    """What will be trained, on what, at which cost: everything a reader needs before the first step.

    Args:
        header: the content of run.json.
        classes: {axis: name of the class that implements its option}, of the axes to print.
        phases: of the data mixture.
    """
    model, config, flops = header["model"], header["config"], header["flops_per_token"]
    forward = sum(flops["forward"].values())
    count, hardware, data = header["parameters"], header["hardware"], header["data"]
    peak = hardware["peak_flops"]
    run_tokens = data["tokens_per_step"] * config["max_iters"]
    rows = [("architecture", header["arch_name"])]
    rows += [(f"  {axis}", f"{model[axis]} ({class_name})") for axis, class_name in classes.items()]
    kernels = " · ".join(f"{name}: {kernel}" for name, kernel in header["attention_kernels"].items())
    how = ", chosen by auto" if config["attention_backend"] == "auto" else ""
    how += f"; torch's kernel here: {kernels}" if kernels else ""
    rows = [(name, text + how if name == "  attention_backend" else text) for name, text in rows]
    rows += [
        ("  sizes", f"d_ff {model['d_ff']} · head_dim {model['head_dim']} · kv heads {model['n_kv_head']} · "
                    f"vocabulary {model['vocab_size']} · block {model['block_size']} · "
                    f"bias {'yes' if model['bias'] else 'no'} · head {'tied' if model['weight_tying'] else 'untied'}"),
        ("parameters", f"{count['total']:,} · trainable {count['trainable']:,} · "
                       f"without embeddings {count['non_embedding']:,}"),
        ("data", f"{data['dataset']}: {data['train_tokens']:,} training tokens, {data['val_tokens']:,} for validation"),
        ("step", f"{data['tokens_per_step']:,} tokens in {data['sequences_per_step']} sequences; the run sees "
                 f"{run_tokens:,} tokens, {run_tokens / data['train_tokens']:.2g} epochs"),
        *((f"  {name}", f"{s['share']:.4g} of the tokens" + (" at the end" if phases > 1 else "")
           + f": {s['planned_tokens']:,} of {s['train_tokens']:,}, {s['planned_epochs']:.2g} epochs")
          for name, s in data["sources"].items() if len(data["sources"]) > 1),
        ("device", f"{hardware['world_size']} × {hardware['name']} ({hardware['device']}), "
                   f"{hardware['threads']} CPU thread{'s' * (hardware['threads'] > 1)}, {hardware['dtype']}"
                   f"{', tf32' if hardware['tf32'] else ''}{', compiled' if hardware['compile'] else ''}"),
        *(("kernels", f"{family}: {kernel}{kernel_times_text(header['kernel_times'].get(family, {}))}")
          for family, kernel in header.get("kernels", {}).items() if header["kernel_times"] or kernel == "triton"),
        ("FLOPs per token", f"forward {forward / 1e6:,.2f}M: {percentages(flops['forward'], 'M', 1e6, 2)}"),
        ("", f"training {flops['train'] / 1e6:,.2f}M (PaLM convention, used for MFU), "
             f"{flops['train_causal'] / 1e6:,.2f}M (causal)"),
        ("MFU divides by", f"{peak / 1e12:,.4g} TFLOP/s ({hardware['peak_source']})" if peak
                           else f"nothing: {hardware['peak_source']}; no MFU"),
        ("run", run_dir),
    ]
    for name, text in rows:
        console.info(in_columns(f"{name:<22} ", text))


def kernel_times_text(times: Mapping[str, float]) -> str:
    """', chosen by auto: torch 0.120 ms, triton 0.085 ms', or nothing if nothing was measured."""
    measured = ", ".join(f"{name} {1000 * seconds:,.3f} ms" for name, seconds in times.items())
    return f", chosen by auto: {measured}" if measured else ""
