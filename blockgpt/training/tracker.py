"""Experiment tracking: the records of a run, sent to Weights & Biases, TensorBoard or Trackio as well.

A tracker may fail, hang or be offline; the run neither waits for it nor changes. Another tracker is a subclass of
`Tracker` with its three methods, and an entry of TRACKERS.
"""

import abc
import contextlib
import importlib.util
import io
import json
import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from blockgpt.errors import ConfigError, did_you_mean, first_line

WANDB_SETTINGS = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off",  # the console belongs to the run's own log
                  "WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "60"}  # a dead network must not block the run
STEP_METRIC = "step"  # the horizontal axis of every chart
QUEUE_SIZE = 1000  # records that may wait for the tracker; further ones are dropped and counted
FINISH_TIMEOUT = 60.0  # seconds that a library may take at the end; wandb has a setting of its own
FINISH_TIMEOUT_FACTOR = 1.25  # × that, after which the run ends without its tracker


class TrackerConfig(Protocol):
    """What the tracker reads of a run's config."""

    @property
    def tracker_project(self) -> str: ...
    @property
    def eval_only(self) -> bool: ...


class Tracker(abc.ABC):
    """Sends the records of a run to a library from a background thread.

    Only `finish` waits for that thread, for at most `_finish_timeout` seconds. The thread prints nothing: its warnings
    are queued, and the main thread prints them with the next record.

    Attributes:
        name: of the tracker, as the key `tracker` has it.
        package: what to install.
    """

    name: str
    package: str

    def __init__(self, config: TrackerConfig, run_dir: Path, record: dict[str, Any],
                 warn: Callable[[str], None]) -> None:
        """Start the thread.

        Args:
            record: the content of run.json, with its `wandb_id`; the caller does not change it afterwards.
            warn: called with one line, from the thread that calls `log` and `finish`.
        """
        self.warn, self.config, self.run_dir, self.record = warn, config, run_dir, record
        self.warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.records: queue.Queue[tuple[str, dict[str, Any]] | None] = queue.Queue(QUEUE_SIZE)
        self.dropped = 0
        self.failed = False
        self.final_record: dict[str, Any] | None = None
        self.tokens = 0  # of the newest record that has them: the second axis
        self.prepare()
        # A daemon thread, so that one that hangs does not block the exit of the interpreter.
        self.thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self.thread.start()

    def log(self, record_type: str, values: dict[str, Any]) -> None:
        """Queue a record; never waits. Its metrics have the names of `usual_names`."""
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
            self.warn(f"{self.name}: not done after {timeout:.3g} s, the run ends without it"
                      + (f" (at least {self.dropped} records were not sent)" if self.dropped else ""))
            threading.Thread(target=self.abandon, name=f"{self.name} teardown", daemon=True).start()
        elif self.dropped:
            self.warn(f"{self.name}: too slow: {self.dropped} records were not sent (metrics.jsonl has them all)")

    def prepare(self) -> None:  # noqa: B027 (most have nothing to prepare)
        """Runs before the thread starts."""

    @abc.abstractmethod
    def start(self) -> None:
        """Import the library and begin, or continue, the run."""

    @abc.abstractmethod
    def send(self, record_type: str, step: int, metrics: dict[str, float]) -> None:
        """Send the metrics of a record at a step; `tokens` are those until then."""

    @abc.abstractmethod
    def end(self, record: dict[str, Any]) -> None:
        """End the run; `record` is the final content of run.json."""

    def abandon(self) -> None:  # noqa: B027 (the same)
        """End what the library runs in the background, without its results."""

    @staticmethod
    def _finish_timeout() -> float:
        return FINISH_TIMEOUT_FACTOR * FINISH_TIMEOUT

    def _print_warnings(self) -> None:
        while not self.warnings.empty():
            self.warn(self.warnings.get())

    def _run(self) -> None:
        """The background thread: every call of the library's is made here."""
        try:
            self.start()
            while item := self._next_record():
                record_type, values = item
                self.tokens = values.get("tokens", self.tokens)
                self.send(record_type, values["step"], usual_names(record_type, values))
            assert self.final_record is not None
            self.end(self.final_record)
        except ImportError as error:
            self._fail(f"{self.name} cannot be imported ({first_line(error)}), continuing without it "
                       f"(pip install {self.package})")
        except BaseException as error:  # no error of the tracker, SystemExit included, ends the run
            self._fail(f"{self.name}: {type(error).__name__}: {first_line(error)}; continuing without it")

    def _next_record(self) -> tuple[str, dict[str, Any]] | None:
        """The next record, or None when the run has ended and all records are sent."""
        if self.final_record is not None and self.records.empty():
            return None
        return self.records.get()

    def _fail(self, message: str) -> None:
        if not self.failed:  # else `finish` no longer waits, and nothing prints warnings
            self.failed = True
            self.warnings.put(message)


class WandbTracker(Tracker):
    """Weights & Biases, offline without an account."""

    name = package = "wandb"

    def prepare(self) -> None:
        for name, value in WANDB_SETTINGS.items():
            os.environ.setdefault(name, value)

    def start(self) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE")  # wandb checks the value
        if mode is None and not wandb.login(prompt=False, verify=False):  # never stop to ask for a key
            mode = "offline"
            self.warnings.put("wandb: not logged in, logging offline (wandb login; wandb sync)")
        self.run = wandb.init(project=self.config.tracker_project, name=self.run_dir.name, dir=str(self.run_dir),
                              mode=mode, id=self.record["wandb_id"], resume="allow", config=self.record,
                              allow_val_change=True)
        # wandb drops what is logged at a step before its newest one, as a resumed run does that goes back. So the
        # steps of the run are a metric, and wandb counts steps of its own. The record `resume` marks where a curve
        # continues. Offline, too. `tokens` is a metric as well, so a chart can have it as its axis.
        self.run.define_metric("*", step_metric=STEP_METRIC)

    def send(self, record_type: str, step: int, metrics: dict[str, float]) -> None:
        self.run.log({STEP_METRIC: step, "tokens": self.tokens, **metrics})

    def end(self, record: dict[str, Any]) -> None:
        self.run.summary.update({"status": record["status"], **record["results"]})
        self.run.finish(exit_code=0 if record["status"] in ("finished", "interrupted") else 1)
        teardown()  # otherwise wandb does it at the interpreter's exit, where nothing limits it

    def abandon(self) -> None:
        teardown()

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


class TensorBoardTracker(Tracker):
    """TensorBoard's event files in <run_dir>/tensorboard: `steps` by step, `tokens` the same values by tokens."""

    name = package = "tensorboard"

    def start(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        resumes = self.record.get("resumes") or []
        # What was logged beyond the step at which a run continues is abandoned: TensorBoard drops it.
        continues = bool(resumes) and not self.config.eval_only
        newest = resumes[-1]["step"] if resumes else 0, (self.record.get("results") or {}).get("tokens", 0)
        self.writers = [SummaryWriter(str(self.run_dir / "tensorboard" / axis),
                                      purge_step=position + 1 if continues else None)
                        for axis, position in zip(("steps", "tokens"), newest, strict=True)]
        self.writers[0].add_text("run.json", "    " + json.dumps(self.record, indent=2).replace("\n", "\n    "))

    def send(self, record_type: str, step: int, metrics: dict[str, float]) -> None:
        for writer, position in zip(self.writers, (step, self.tokens), strict=True):
            for name, value in metrics.items():
                writer.add_scalar(name, value, position)
            if record_type != "step":
                writer.flush()

    def end(self, record: dict[str, Any]) -> None:
        for writer in self.writers:
            writer.close()


class TrackioTracker(Tracker):
    """Trackio's local database; `trackio show` opens its page."""

    name = package = "trackio"

    def start(self) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):  # the console belongs to the run
            self.run = trackio.init(project=self.config.tracker_project, name=self.run_dir.name, resume="allow",
                                    config=self.record, embed=False, auto_log_gpu=False, auto_log_cpu=False)

    def send(self, record_type: str, step: int, metrics: dict[str, float]) -> None:
        self.run.log({"tokens": self.tokens, **metrics}, step=step)

    def end(self, record: dict[str, Any]) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.run.finish()


TRACKERS: dict[str, type[Tracker]] = {"wandb": WandbTracker, "tensorboard": TensorBoardTracker,
                                      "trackio": TrackioTracker}


def tracker_names(text: str) -> list[str]:
    """The trackers that the key `tracker` names, separated by commas; [] for 'none'.

    Raises:
        ConfigError: one is unknown.
    """
    names = [name.strip() for name in text.split(",")]
    if names == ["none"]:
        return []
    for name in names:
        if name not in TRACKERS:
            raise ConfigError("tracker", f"{name!r} is unknown{did_you_mean(name, ['none', *TRACKERS])}")
    return list(dict.fromkeys(names))


def check_installed(names: Iterable[str]) -> None:
    """`ConfigError` for the first tracker whose package is not installed. It is not imported."""
    for name in names:
        package = TRACKERS[name].package
        spec = None if sys.modules.get(package, ...) is None else importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # without an origin: a folder of that name, such as wandb's own
            raise ConfigError("tracker", f"{name} is not installed (pip install {package}, or --tracker=none)")


# The names that dashboards of other projects have: {record type: ((key, its name), …)}; others are <record type>/<key>.
USUAL_NAMES = {"step": {"loss": "train/loss", "lr": "train/lr", "grad_norm": "train/grad_norm", "metrics": "train",
                        "skipped": "train/skipped_steps",
                        "tokens_per_sec": "perf/tokens_per_sec", "mfu": "perf/mfu", "tflops": "perf/tflops",
                        "step_time": "perf/step_time", "memory": "memory", "tokens_per_source": "data",
                        "communication": "perf/communication", "ranks": "perf/ranks",
                        "slowest_rank": "perf/slowest_rank"}}


def usual_names(record_type: str, values: dict[str, Any]) -> dict[str, float]:
    """{name: number} of a record: train/loss, perf/mfu, val/loss for val_loss, …; what is no number is left out."""
    metrics: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("step", "tokens", "val_data", "launch", "changed", "forced"):
            continue
        name = USUAL_NAMES.get(record_type, {}).get(key)
        if record_type in ("eval", "eval_only"):
            name = ("val/" if record_type == "eval" else "eval_only/") + key.removeprefix("val_")
        metrics[name or f"{record_type}/{key}"] = value
    return {name: float(value) for name, value in flatten(metrics).items()
            if isinstance(value, (int, float)) and math.isfinite(value)}


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
