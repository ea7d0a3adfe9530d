"""Runs what a plan asks for: claims runs, starts them, resumes what was killed, retries what failed. No torch.

All state is in the run directories: train.py's own files say how a run ended, `sweep/attempts.jsonl` how often it was
tried, and the lock of `sweep/` who runs it now. The kernel frees that lock when its holder ends, so any number of
processes, on every computer that sees the folder, can work at one plan, and none has to end in good order.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import math
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from blockgpt.errors import UserError, error_text
from blockgpt.experiments.sweeps.launchers import Handle, Job, Launcher
from blockgpt.experiments.sweeps.plan import PlannedRun
from blockgpt.files import FolderLock, exists, find

TICK = 0.2  # seconds between looks at what runs
ELSEWHERE_SECONDS = 2.0  # between looks at a run that another process has claimed
CONSOLE_BYTES = 2**16  # of a run's output that are searched for why it ended
MAX_ATTEMPTS = 2  # a failed run is retried once
FINAL_EXIT_CODES = {2: "refused", 5: "diverged"}  # it would be the same again
ENDED = ("finished", "diverged", "refused", "failed")


class RunOutcome(NamedTuple):
    """What the directory of a run says of it.

    Attributes:
        state: finished, diverged, refused (exit code 2), failed (as often as it is tried); or open: it is to be run,
            from its beginning or its newest checkpoint.
        reason: why it is not finished, in one line.
        step: the last one that was recorded.
        value: of the criterion, the best of its evaluations.
        seconds: of training, over all launches.
        step_time: median, in seconds.
        overhead: seconds of the last launch that were no steps, such as its start.
        peak_memory: in bytes.
    """

    state: str
    reason: str = ""
    step: int = 0
    value: float | None = None
    seconds: float | None = None
    step_time: float | None = None
    overhead: float | None = None
    peak_memory: int | None = None


def read_outcome(run_dir: Path) -> RunOutcome:
    """What became of a run, by its directory alone. Never raises for the content of its files."""
    attempts = read_attempts(run_dir)
    failures = [a for a in attempts if a.get("state") in ("failed", "diverged", "refused")]
    record: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((run_dir / "run.json").read_bytes())
        record = found if isinstance(found, dict) else {}
    results, criterion = (section if isinstance(section := record.get(name), dict) else {}
                          for name in ("results", "criterion"))
    more_is_better = criterion.get("more_is_better") is True
    metric = criterion.get("metric", "val_loss")
    names = (f"best_{metric}" if f"best_{metric}" in results else metric, "step", "wall_time", "step_time",
             "peak_memory")
    value, step, seconds, step_time, peak_memory = (finite_value(results.get(name)) for name in names)
    last = attempts[-1] if attempts else {}
    duration, from_step = finite_value(last.get("seconds")), finite_value(last.get("from_step"))
    overhead = None
    if duration is not None and step_time is not None and step:
        overhead = max(0.0, duration - step_time * (step - (from_step or 0)))
    outcome = RunOutcome("open", "", int(step or 0), (-value if more_is_better and value is not None else value),
                         seconds, step_time, overhead, peak_memory)
    if record.get("status") == "finished":
        return outcome._replace(state="finished")
    if failures and (failures[-1]["state"] != "failed" or len(failures) >= MAX_ATTEMPTS):
        return outcome._replace(state=failures[-1]["state"], reason=str(failures[-1].get("reason", "")), value=None)
    return outcome


def finite_value(value: Any) -> Any:
    """A finite number of a file that may be damaged, else None."""
    return value if type(value) in (int, float) and math.isfinite(value) else None


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's attempts.jsonl since the last `retry`; a damaged line is left out."""
    attempts: list[dict[str, Any]] = []
    with contextlib.suppress(OSError):
        for line in (run_dir / "sweep/attempts.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                attempt = json.loads(line)
                if isinstance(attempt, dict):
                    attempts = [] if attempt.get("state") == "retry" else [*attempts, attempt]
    return attempts


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append an object to a file of lines; several processes may do so at once."""
    with open(path, "ab") as file:
        with contextlib.suppress(OSError):  # a file system without locks: O_APPEND alone
            fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(values, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def utc_seconds() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---- one run that is under way


@dataclass
class Attempt:
    """One launch of a run by this process.

    Attributes:
        lock: of the run's `sweep/`.
        from_step: at which it continues.
        started: time.monotonic().
        console_start: bytes that its console.txt had.
    """

    run: PlannedRun
    run_dir: Path
    handle: Handle
    lock: FolderLock
    from_step: int
    started: float
    console_start: int

    def finish(self, exit_code: int, stopping: bool) -> RunOutcome:
        """Record how it ended, and free the claim.

        A run that was stopped by this process, with the study, is no failure.
        """
        ended = read_outcome(self.run_dir)
        state, reason = "finished", ""
        if exit_code in FINAL_EXIT_CODES:
            state = FINAL_EXIT_CODES[exit_code]
        elif ended.state != "finished":
            state = "interrupted" if stopping else "failed"
        elif exit_code:  # such as a save that failed after the last step
            state = "failed"
        if state != "finished":
            how = f"exit code {exit_code}" if exit_code >= 0 else f"signal {-exit_code}"
            reason = f"{last_error(self.run_dir / 'sweep/console.txt', self.console_start) or 'ended'} ({how})"
        append_line(self.run_dir / "sweep/attempts.jsonl", {
            "state": state, "exit_code": exit_code, "reason": reason, "ended_at": utc_seconds(),
            "seconds": round(time.monotonic() - self.started, 3), "from_step": self.from_step,
            "host": socket.gethostname()})
        self.lock.release()
        outcome = read_outcome(self.run_dir)
        return outcome._replace(reason=reason) if state != "finished" else outcome


def last_error(console: Path, start: int = 0) -> str:
    """The last `error:` line of a console.txt from byte `start` on, else its last line; "" if it has none."""
    try:
        with open(console, "rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - CONSOLE_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    lines = ["".join(c if c.isprintable() else "?" for c in line).strip() for line in lines]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return next(filter(None, [*errors[::-1], *lines[::-1]]), "")[:300]


# ---- all runs


class SweepRunner:
    """Runs planned runs until each has ended, or the study is stopped.

    Args:
        folder: of the study; the directories of its runs are in it.
        launcher: starts them.
        root: the project's folder, with train.py.
        environment: variables of the runs.
        report: called with (run, state, outcome) when the state of a run changes: running, elsewhere, or a state of
            `RunOutcome`.
        check: called before a run is started; raises `UserError` if it would not be the run that was planned.
    """

    def __init__(self, folder: Path, launcher: Launcher, root: Path, environment: Mapping[str, str],
                 report: Callable[[PlannedRun, str, RunOutcome], None],
                 check: Callable[[PlannedRun], None] = lambda run: None) -> None:
        self.check = check
        self.folder, self.launcher, self.root, self.environment = folder, launcher, root, environment
        self.report = report
        self.running: list[Attempt] = []
        self.stopping, self.active = False, False
        self.looked: dict[str, float] = {}  # {id: when it was last found to be claimed elsewhere}

    def stop(self) -> None:
        """Start nothing more and ask what runs to save and end; once more, to end at once."""
        self.stopping = True
        for attempt in self.running:
            attempt.handle.stop()

    def run(self, runs: Sequence[PlannedRun], tick: Callable[[], None] = lambda: None) -> dict[str, RunOutcome]:
        """Run them in order; returns {id: outcome}. A run that another process has claimed is waited for.

        Args:
            tick: called several times a second.

        Raises:
            UserError: a file cannot be written. What runs is asked to save and end.
        """
        waiting, outcomes = list(runs), dict[str, RunOutcome]()
        self.active = True
        try:
            while (waiting and not self.stopping) or self.running:
                for attempt in [*self.running]:
                    exit_code = attempt.handle.poll()
                    if exit_code is not None:
                        self.running.remove(attempt)
                        outcome = attempt.finish(exit_code, self.stopping)
                        again = "interrupted" if self.stopping else "again"
                        self.report(attempt.run, outcome.state if outcome.state in ENDED else again, outcome)
                        if outcome.state in ENDED:
                            outcomes[attempt.run.id] = outcome
                        else:
                            waiting.insert(0, attempt.run)  # next to the rest of its pair
                if not self.stopping:
                    self.start_waiting(waiting, outcomes)
                tick()
                time.sleep(TICK if self.running or waiting else 0)
        except BaseException as error:
            self.abandon()
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                raise UserError(f"{error.filename or self.folder}: {error_text(error)} (the same command continues "
                                "after a fix)") from None
            raise
        finally:
            self.active = False
        return {run.id: outcomes.get(run.id) or read_outcome(self.folder / run.name) for run in runs}

    def start_waiting(self, waiting: list[PlannedRun], outcomes: dict[str, RunOutcome]) -> None:
        """Start the first runs that can be, as many as there are free slots; those that have ended leave the list."""
        for run in [*waiting]:
            if len(self.running) >= self.launcher.slots:
                return
            if time.monotonic() - self.looked.get(run.id, -ELSEWHERE_SECONDS) < ELSEWHERE_SECONDS:
                continue
            outcome = read_outcome(self.folder / run.name)
            if outcome.state in ENDED:
                waiting.remove(run)
                outcomes[run.id] = outcome
                self.report(run, outcome.state, outcome)
            elif attempt := self.claim(run):
                waiting.remove(run)
                self.running.append(attempt)
                self.report(run, "running", outcome)
            else:
                self.looked[run.id] = time.monotonic()
                self.report(run, "elsewhere", outcome)

    def claim(self, run: PlannedRun) -> Attempt | None:
        """Start a run; None if another process has claimed it or trains in its directory."""
        run_dir = self.folder / run.name
        sweep = run_dir / "sweep"
        sweep.mkdir(parents=True, exist_ok=True)
        self.check(run)
        lock = try_lock(sweep)
        if lock is None:
            return None
        outcome = read_outcome(run_dir)
        if outcome.state in ENDED or is_training(run_dir):  # it has ended meanwhile, or outlives who started it
            lock.release()
            return None
        with contextlib.suppress(FileNotFoundError):
            (sweep / "stop").unlink()
        command = (sys.executable, str(self.root / "train.py"), *run.words, f"--out_dir={self.folder.resolve()}",
                   f"--run_name={run.name}", "--resume=auto")
        console_start = status.st_size if (status := find(sweep / "console.txt")) else 0
        job = Job(command, sweep.resolve(), Path.cwd(), self.environment)
        try:
            handle = self.launcher.start(job)
        except BaseException:
            lock.release()
            raise
        return Attempt(run, run_dir, handle, lock, outcome.step, time.monotonic(), console_start)

    def abandon(self) -> None:
        """An error of this process: ask what it runs to end, so that nothing trains unwatched."""
        for attempt in self.running:
            with contextlib.suppress(Exception):
                attempt.handle.stop()


def try_lock(folder: Path) -> FolderLock | None:
    """The lock of a folder; None if another process holds it."""
    try:
        return FolderLock(folder, "works at it", wait=0)
    except UserError:
        return None


def is_training(run_dir: Path) -> bool:
    """Whether a process trains in a run's directory."""
    if not exists(run_dir / ".lock"):
        return False
    lock = try_lock(run_dir)
    if lock is not None:
        lock.release()
    return lock is None


def allow_retries(folder: Path, runs: Iterable[PlannedRun]) -> None:
    """Let runs that have failed, diverged or been refused be tried again."""
    for run in runs:
        if read_outcome(folder / run.name).state in ("failed", "diverged", "refused"):
            append_line(folder / run.name / "sweep/attempts.jsonl", {"state": "retry", "ended_at": utc_seconds()})


# ---- pairs and looks


def incomplete_blocks(runs: Iterable[PlannedRun], outcomes: Mapping[str, RunOutcome]) -> list[str]:
    """One line for each block, the variants of one seed, of which some runs have finished and others have not."""
    blocks: dict[str, list[PlannedRun]] = {}
    for run in runs:
        if run.block is not None:
            blocks.setdefault(run.block, []).append(run)
    lines = []
    for name, block in blocks.items():
        missing = [run for run in block if outcomes[run.id].state != "finished"]
        if missing and len(missing) < len(block):
            states = "; ".join(f"{run.variant} {outcomes[run.id].state}" for run in missing)
            lines.append(f"{name} is not a whole block: {states}")
    return lines


def record_look(folder: Path, runs: Iterable[PlannedRun], outcomes: Mapping[str, RunOutcome]) -> int:
    """Record that the verdicts on the judged runs are looked at; returns how many looks there were, this one included.

    Another look at the same finished runs is none: it can show nothing new. The study's looks.jsonl has one line for
    each, {look, at, runs, seeds: {"size/variant": finished runs}, digest of the finished runs}.
    """
    finished = judged_and_finished(runs, outcomes)
    digest = runs_digest(finished)
    seeds = Counter(f"{run.size}/{run.variant}" for run in finished)
    try:
        with FolderLock(folder, "records a look at the verdicts", wait=60):
            looks = read_looks(folder)
            before = look_at(looks, digest)
            if before is not None:
                return before
            append_line(folder / "looks.jsonl", {"look": len(looks) + 1, "at": utc_seconds(), "runs": len(finished),
                                                 "seeds": seeds, "digest": digest})
            return len(looks) + 1
    except OSError as error:
        raise UserError(f"{folder}: a look at the verdicts cannot be recorded: {error_text(error)} (no verdict without "
                        "a record of it)") from None


def recorded_look(folder: Path, runs: Iterable[PlannedRun], outcomes: Mapping[str, RunOutcome]) -> int | None:
    """Which recorded look was at exactly the runs that have finished now; None if none was."""
    return look_at(read_looks(folder), runs_digest(judged_and_finished(runs, outcomes)))


def judged_and_finished(runs: Iterable[PlannedRun], outcomes: Mapping[str, RunOutcome]) -> list[PlannedRun]:
    """What a look is at: the judged runs that have finished, by id."""
    return sorted((run for run in runs if run.purpose == "judge" and outcomes[run.id].state == "finished"),
                  key=lambda run: run.id)


def runs_digest(finished: Iterable[PlannedRun]) -> str:
    """The digest of the finished runs of a look."""
    return hashlib.sha256(" ".join(run.id for run in finished).encode()).hexdigest()[:16]


def look_at(looks: Iterable[Mapping[str, Any]], digest: str) -> int | None:
    """The index, from 1, of the look at the finished runs that a digest names."""
    return next((i for i, look in enumerate(looks, 1) if look.get("digest") == digest), None)


def read_looks(folder: Path) -> list[dict[str, Any]]:
    """The lines of a study's looks.jsonl; a damaged one is a look, too."""
    path = folder / "looks.jsonl"
    if not exists(path):
        return []
    looks = []
    for line in path.read_bytes().splitlines():
        look: Any = None
        with contextlib.suppress(ValueError):
            look = json.loads(line)
        looks.append(look if isinstance(look, dict) else {})
    return looks
