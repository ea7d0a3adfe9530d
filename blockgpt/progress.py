"""What people see of a run on the console: the header, the line of each logged step, other lines, the end.

On a terminal the line of a step is rewritten in place; elsewhere every line stays. This module gets plain values.
"""

import shutil
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

from blockgpt.console import echo, human_bytes, human_time, in_columns, is_terminal, percentages

STRAGGLER_RATIO = 1.05  # × the median step time: a rank that the console names


class RunConsole:
    """The console of one run; a quiet one, as on ranks other than zero, prints nothing."""

    def __init__(self, max_iters: int, quiet: bool = False) -> None:
        self.max_iters, self.quiet = max_iters, quiet
        self.live, self.line_open = is_terminal(), False
        self.first_step: tuple[int, float] | None = None

    def info(self, text: str) -> None:
        """A line that stays on the console."""
        if not self.quiet:
            self._clear_line()
            echo(text)

    def warning(self, text: str) -> None:
        """A line on stderr."""
        if not self.quiet:
            self._clear_line()
            echo(f"warning: {text}", sys.stderr)

    def close(self) -> None:
        """End the line that is rewritten in place; it stays."""
        if self.line_open:
            echo("")
            self.line_open = False

    def _clear_line(self) -> None:
        if self.line_open:
            echo("\r\x1b[K", end="")
            self.line_open = False

    def step(self, v: Mapping[str, Any]) -> None:
        """A logged step: the values of its record in metrics.jsonl."""
        if self.quiet:
            return
        if self.first_step is None:
            self.first_step = (v["step"], time.time())
        first, since = self.first_step
        done = v["step"] - first
        left = (time.time() - since) / done * (self.max_iters - v["step"]) if done else None
        mfu = (f"MFU {v['mfu']:.1%}   " if v["mfu"] is not None else "") + f"{v['tflops']:.3g} TFLOP/s"
        if communication := v.get("communication"):
            mfu += f"   communication {communication['share']:.1%}, {communication['exposed']:.1%} exposed"
        if "ranks" in v:
            times = v["ranks"]["step_time"]
            slowest, median = ((times["max"], times["median"]) if isinstance(times, dict)
                               else (max(times), statistics.median_low(times)))
            if slowest > STRAGGLER_RATIO * median:
                mfu += f"   rank {v['slowest_rank']} takes {slowest / median:.2f} × as long"
        line = (f"step {v['step']:>6}/{self.max_iters}   loss {v['loss']:.4f}   "
                f"{v['tokens_per_sec']:>9,.0f} tok/s   {mfu}   left {human_time(left):<7}   "
                f"{v['step_time'] * 1e3:.1f} ms   lr {v['lr']:.2e}   |g| {v['grad_norm']:.2f}   "
                f"{human_bytes(v['memory']['allocated'])}"
                + "".join(f"   {name} {value:.4f}" for name, value in v.get("metrics", {}).items()))
        if self.live:  # rewritten in place, which a line that wraps cannot be
            echo("\r\x1b[K" + line[:shutil.get_terminal_size().columns - 1], end="")
            self.line_open = True
        else:
            echo(line)


def print_header(header: Mapping[str, Any], classes: Mapping[str, str], phases: int, run_dir: str) -> None:
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
        ("device", f"{hardware['world_size']} × {hardware['name']} ({hardware['device']}), {hardware['dtype']}"
                   f"{', tf32' if hardware['tf32'] else ''}{', compiled' if hardware['compile'] else ''}"),
        ("FLOPs per token", f"forward {forward / 1e6:,.2f}M: {percentages(flops['forward'], 'M', 1e6, 2)}"),
        ("", f"training {flops['train'] / 1e6:,.2f}M (PaLM convention, used for MFU), "
             f"{flops['train_causal'] / 1e6:,.2f}M (causal)"),
        ("MFU divides by", f"{peak / 1e12:,.4g} TFLOP/s ({hardware['peak_source']})" if peak
                           else f"nothing: {hardware['peak_source']}; no MFU"),
        ("run", run_dir),
    ]
    for name, text in rows:
        echo(in_columns(f"{name:<22} ", text))
