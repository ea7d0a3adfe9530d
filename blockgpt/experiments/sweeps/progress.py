"""The table of a study's runs while they run: redrawn on a terminal, one line for each change elsewhere."""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from blockgpt.console import align_columns, echo, human_time, is_terminal
from blockgpt.experiments.comparison import shorten_middle
from blockgpt.experiments.sweeps.plan import SIZE, PlannedRun
from blockgpt.experiments.sweeps.runner import RunOutcome

REDRAW_SECONDS = 1.0
TAIL_BYTES = 4096  # of metrics.jsonl that are read for the newest step
ORDER = ("running", "elsewhere", "failed", "diverged", "refused", "open", "finished")  # where not all rows fit


def label(run: PlannedRun) -> str:
    """'rmsnorm+rope tiny seed 1', with the purpose of a run that is not judged."""
    names = [run.variant, *([run.size] if run.size != SIZE else []), f"seed {run.seed}"]
    if run.purpose == "horizon":
        names.append(f"horizon {run.horizon:g}")
    elif run.purpose != "judge":
        names.append(run.purpose)
    if run.purpose == "tune":
        names += [word.lstrip("-") for word in run.words if word.startswith("--learning_rate=")][-1:]
    return " ".join(names)


def logged_step(run_dir: Path) -> int:
    """The step of the last complete line of a metrics.jsonl; 0 if there is none."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


class RunTable:
    """Shows the states of runs.

    Args:
        folder: of the study.
        runs: all that are shown, in their order.
    """

    def __init__(self, folder: Path, runs: Sequence[PlannedRun]) -> None:
        self.folder, self.runs = folder, list(runs)
        self.states: dict[str, tuple[str, RunOutcome]] = {}
        self.live, self.drawn, self.drawn_at, self.started = is_terminal(), 0, 0.0, time.monotonic()

    def report(self, run: PlannedRun, state: str, outcome: RunOutcome) -> None:
        """The state of a run has changed.

        On a terminal only what went wrong gets a line that stays. A run that had finished before gets none anywhere.
        """
        before = self.states.get(run.id, ("", outcome))[0]
        self.states[run.id] = ("open" if state in ("again", "interrupted") else state, outcome)
        quiet = self.live and state in ("running", "finished", "elsewhere")
        if state == before or quiet or (state == "finished" and not before):
            return
        self.clear()
        echo(self.line(run, state, outcome))
        self.drawn_at = 0.0

    def line(self, run: PlannedRun, state: str, outcome: RunOutcome) -> str:
        """One change as a line."""
        ended = sum(state not in ("running", "elsewhere", "open") for state, _ in self.states.values())
        text = {"again": "ended early, runs again", "elsewhere": "runs in another process"}.get(state, state)
        if state == "running" and outcome.step:
            text = f"continues after step {outcome.step}"
        if state == "finished" and outcome.value is not None:
            text += f", {outcome.value:.4f}"
        if outcome.reason:
            text += f": {outcome.reason}"
        return f"{time.strftime('%H:%M:%S')}  {ended}/{len(self.runs)}  {label(run)}: {text}"

    def tick(self) -> None:
        """Redraw the table on a terminal, once a second."""
        if self.live and time.monotonic() - self.drawn_at > REDRAW_SECONDS:
            size = shutil.get_terminal_size()
            lines = self.table(size.lines - 2, size.columns - 1)
            self.clear()
            echo("\n".join(lines))
            self.drawn, self.drawn_at = len(lines), time.monotonic()

    def clear(self) -> None:
        """Remove the table from the terminal."""
        if self.drawn:
            echo(f"\x1b[{self.drawn}A\x1b[J", end="")
            self.drawn = 0

    def table(self, height: int, width: int) -> list[str]:
        """At most `height` lines: a summary, and the runs in their order, those that run first where not all fit."""
        states = {run.id: self.states.get(run.id, ("open", RunOutcome("open"))) for run in self.runs}
        counts = Counter(state for state, _ in states.values())
        summary = " · ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
        rows: list[tuple[str, ...]] = [("run", "state", "step", "value", "time")]
        chosen = sorted(self.runs, key=lambda run: ORDER.index(states[run.id][0]))[:max(0, height - 2)]
        for run in self.in_order(chosen):
            state, outcome = states[run.id]
            step = logged_step(self.folder / run.name) if state in ("running", "elsewhere") else outcome.step
            rows.append((shorten_middle(label(run), 50), state, f"{step}/{run.steps}" if step else "-",
                         "-" if outcome.value is None else f"{outcome.value:.4f}",
                         "-" if outcome.seconds is None else human_time(outcome.seconds)))
        elapsed = human_time(time.monotonic() - self.started)
        return [line[:width] for line in [*align_columns(rows, left=(0, 1)), f"{elapsed}   {summary}"][:height]]

    def in_order(self, chosen: Iterable[PlannedRun]) -> list[PlannedRun]:
        """Some of the runs in the order of all."""
        ids = {run.id for run in chosen}
        return [run for run in self.runs if run.id in ids]
