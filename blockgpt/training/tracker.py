"""Experiment tracking: the records of a run, sent to Weights & Biases as well.

A tracker may fail, hang or be offline; the run neither waits for it nor changes. Another tracker is a class with the
methods `log` and `finish` of `WandbTracker`.
"""

import contextlib
import math
import os
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from blockgpt.errors import first_line

WANDB_SETTINGS = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off",  # the console belongs to the run's own log
                  "WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "60"}  # a dead network must not block the run
STEP_METRIC = "step"  # the horizontal axis of every chart
QUEUE_SIZE = 1000  # records that may wait for the tracker; further ones are dropped and counted
FINISH_TIMEOUT_FACTOR = 1.25  # × WANDB_FINISH_TIMEOUT seconds, after which the run ends without its tracker


class TrackerConfig(Protocol):
    """What the tracker reads of a run's config."""

    @property
    def wandb_project(self) -> str: ...


class WandbTracker:
    """Sends the records of a run to Weights & Biases from a background thread.

    Only `finish` waits for that thread, for at most FINISH_TIMEOUT_FACTOR * WANDB_FINISH_TIMEOUT seconds. The thread
    prints nothing: its warnings are queued, and the main thread prints them with the next record.
    """

    def __init__(self, config: TrackerConfig, run_dir: Path, record: dict[str, Any],
                 warn: Callable[[str], None]) -> None:
        """Start the thread.

        Args:
            record: the content of run.json, with its `wandb_id`; the caller does not change it afterwards.
            warn: called with one line, from the thread that calls `log` and `finish`.
        """
        self.warn = warn
        self.warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.records: queue.Queue[tuple[str, dict[str, Any]] | None] = queue.Queue(QUEUE_SIZE)
        self.dropped = 0
        self.failed = False
        self.final_record: dict[str, Any] | None = None
        for name, value in WANDB_SETTINGS.items():
            os.environ.setdefault(name, value)
        # A daemon thread, so that one that hangs does not block the exit of the interpreter.
        self.thread = threading.Thread(target=self._run, args=(config, run_dir, record), name="wandb", daemon=True)
        self.thread.start()

    def log(self, record_type: str, values: dict[str, Any]) -> None:
        """Queue a record; never waits. Its metrics are named `record_type`/key."""
        if not self.failed:
            try:
                self.records.put_nowait((record_type, values))
            except queue.Full:
                self.dropped += 1
        self._print_warnings()

    def finish(self, record: dict[str, Any]) -> None:
        """Wait for the tracker to end, at most its timeout.

        Args:
            record: the final content of run.json.
        """
        self.final_record = record
        with contextlib.suppress(queue.Full):
            self.records.put_nowait(None)  # wakes a thread that waits; a busy one looks at `final_record`
        timeout = self._finish_timeout()
        self.thread.join(timeout)
        self._print_warnings()
        if self.thread.is_alive():
            self.failed = True
            self.dropped += sum(item is not None for item in [*self.records.queue])
            self.warn(f"wandb: not done after {timeout:.3g} s, the run ends without it"
                      + (f" (at least {self.dropped} records were not sent)" if self.dropped else ""))
            threading.Thread(target=teardown, name="wandb teardown", daemon=True).start()
        elif self.dropped:
            self.warn(f"wandb: too slow: {self.dropped} records were not sent (metrics.jsonl has them all)")

    @staticmethod
    def _finish_timeout() -> float:
        """Seconds that `finish` waits."""
        try:
            seconds = float(os.environ["WANDB_FINISH_TIMEOUT"])
        except ValueError:  # wandb itself reports it
            seconds = math.nan
        if not 0 < seconds < threading.TIMEOUT_MAX / 2:
            seconds = float(WANDB_SETTINGS["WANDB_FINISH_TIMEOUT"])
        return FINISH_TIMEOUT_FACTOR * seconds

    def _print_warnings(self) -> None:
        while not self.warnings.empty():
            self.warn(self.warnings.get())

    def _run(self, config: TrackerConfig, run_dir: Path, record: dict[str, Any]) -> None:
        """The background thread: every call of wandb's is made here."""
        try:
            import wandb

            mode: Any = os.environ.get("WANDB_MODE")  # wandb checks the value
            if mode is None and not wandb.login(prompt=False, verify=False):  # never stop to ask for a key
                mode = "offline"
                self.warnings.put("wandb: not logged in, logging offline (wandb login; wandb sync)")
            run = wandb.init(project=config.wandb_project, name=run_dir.name, dir=str(run_dir), mode=mode,
                             id=record["wandb_id"], resume="allow", config=record, allow_val_change=True)
            # wandb drops what is logged at a step before its newest one, as a resumed run does that goes back. So the
            # steps of the run are a metric, and wandb counts steps of its own. The record `resume` marks where a curve
            # continues. Offline, too.
            run.define_metric("*", step_metric=STEP_METRIC)
            while item := self._next_record():
                record_type, values = item
                metrics = {f"{record_type}/{k}": v for k, v in flatten(values).items() if k != "step"}
                run.log({STEP_METRIC: values["step"], **metrics})
            assert self.final_record is not None
            status = self.final_record["status"]
            run.summary.update({"status": status, **self.final_record["results"]})
            run.finish(exit_code=0 if status in ("finished", "interrupted") else 1)
            teardown()  # otherwise wandb does it at the interpreter's exit, where nothing limits it
        except ImportError as error:
            self._fail(f"wandb cannot be imported ({first_line(error)}), continuing without it (pip install wandb)")
        except BaseException as error:  # no error of the tracker, SystemExit included, ends the run
            self._fail(f"wandb: {type(error).__name__}: {first_line(error)}; continuing without it")

    def _next_record(self) -> tuple[str, dict[str, Any]] | None:
        """The next record, or None when the run has ended and all records are sent."""
        if self.final_record is not None and self.records.empty():
            return None
        return self.records.get()

    def _fail(self, message: str) -> None:
        if not self.failed:  # else `finish` no longer waits, and nothing prints warnings
            self.failed = True
            self.warnings.put(message)


def teardown() -> None:
    """End wandb's service process now. Otherwise wandb waits for it at the interpreter's exit, without a limit."""
    with contextlib.suppress(Exception):
        getattr(sys.modules["wandb"], "teardown", lambda: None)()


def flatten(values: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}, 'c': [2, 3]} -> {'a/b': 1, 'c/0': 2, 'c/1': 3}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        value = dict(enumerate(value)) if isinstance(value, list) else value
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
