"""The runs to torture: the server of ranks, torchrun, a trial's directory, and the promises that are checked.

A new promise is a `check_…` method of `Trial`, which calls `report_broken`. A new parallel mode is a line of MODES.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockgpt.checkpoints import checkpoint
from blockgpt.data.prepare import write_dataset
from blockgpt.data.tokenizer import ByteTokenizer
from blockgpt.errors import CheckpointError, UserError
from blockgpt.experiments.records import read_log

ROOT = Path(__file__).resolve().parents[2]
MODES: dict[str, tuple[int, list[str]]] = {  # {name: (processes, flags)}
    "single": (1, []), "ddp": (2, []), "zero1": (2, ["--use_zero1=True"]), "fsdp": (2, ["--use_fsdp=True"]),
    "tp": (2, ["--tensor_parallel=2"])}
STEPS, CHECKPOINT_INTERVAL = 12, 2
FLAGS = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=2", "--dropout=0.1",
         "--gradient_accumulation_steps=4", "--eval_tokens=256", "--dataset=text", "--device=cpu", "--mfu_peak=1",
         "--log_interval=1", "--eval_interval=4", f"--checkpoint_interval={CHECKPOINT_INTERVAL}",
         f"--max_iters={STEPS}", "--warmup_iters=2", "--run_name=run", "--resume=auto", "--rank_timeout=30",
         "--save_timeout=30"]
LAUNCH_TIMEOUT = 60.0  # seconds for a launch of a tiny run
PEER_TIMEOUT = 10.0  # seconds for a rank whose peer was killed


Schedule = list[tuple[float, Callable[[], None]]]  # what happens how many seconds after a launch


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@dataclass
class Rank:
    """A process of the server; `code` is its exit code once it has ended, negative for a signal."""

    pid: int
    code: int | None = None


class Server:
    """The process that forks ranks. A thread reads its answers, so several trials can use it at once."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-m", "tools.torture.ranks"], cwd=ROOT,
                                        env=child_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, bufsize=1)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.condition, self.request_ids = threading.Condition(), itertools.count()
        self.running: dict[int, Rank] = {}  # by pid
        self.forked: dict[int, list[Rank]] = {}  # by request id
        assert json.loads(self.stdout.readline())["ready"]
        threading.Thread(target=self._read_answers, daemon=True).start()

    def _read_answers(self) -> None:
        for line in self.stdout:
            answer = json.loads(line)
            with self.condition:
                if "pids" in answer:
                    self.forked[answer["id"]] = [self.running.setdefault(pid, Rank(pid)) for pid in answer["pids"]]
                else:
                    self.running.pop(answer["pid"]).code = answer["code"]
                self.condition.notify_all()

    def _request(self, **values: Any) -> None:
        with self.condition:
            try:
                self.stdin.write(json.dumps(values) + "\n")
            except BrokenPipeError:
                raise self._error() from None

    def _error(self) -> UserError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        code = self.process.poll()
        return UserError("the process that forks the ranks " + ("does not answer" if code is None else
                                                               f"ended with exit code {code}"))

    def fork(self, tasks: list[dict[str, Any]]) -> list[Rank]:
        """Start a rank for each task of `tools.torture.ranks.become_rank`."""
        request_id = next(self.request_ids)
        self._request(id=request_id, ranks=tasks)
        with self.condition:
            if not self.condition.wait_for(lambda: request_id in self.forked, LAUNCH_TIMEOUT):
                raise self._error()
            return self.forked.pop(request_id)

    def signal(self, ranks: Iterable[Rank], signal_number: int) -> None:
        self._request(signal=int(signal_number), pids=[rank.pid for rank in ranks])

    def close(self) -> None:
        self.stdin.close()
        self.process.wait(LAUNCH_TIMEOUT)


@dataclass
class LaunchResult:
    """How one launch of a run ended."""

    codes: list[int | None]  # exit codes by rank
    out: str
    err: str
    launcher: int | None = None  # torchrun's exit code
    hung: bool = False  # it was killed at the timeout
    killed: bool = False  # a rank was killed from outside while it ran
    fired: list[str] = field(default_factory=list)  # "phase step newest-checkpoint" of each fault
    steps: list[int] = field(default_factory=list)  # the last step of each rank
    counts: list[dict[str, int]] = field(default_factory=list)  # events by rank and phase
    wall: float = 0.0  # seconds

    def resumed_at(self) -> int | None:
        """The step at which it resumed; None if it ended before."""
        for line in self.out.splitlines():
            if "resumed from " in line and " at step " in line:
                return int(line.rsplit(" at step ", 1)[1])
        return 0 if "no checkpoint" in self.out else None

    def newest_saved(self) -> int:
        """The newest step whose checkpoint existed, by the console and by the ranks with a fault; 0 if none."""
        saved = [int(line.split()[1]) for line in self.out.splitlines() if re.match(r"step +\d+   saved", line)]
        return max([*saved, *(int(line.split()[-1]) for line in self.fired)], default=0)

    def lines(self, prefix: str) -> list[str]:
        """The lines of stderr that begin with `prefix`."""
        return [line for line in self.err.splitlines() if line.startswith(prefix)]


class Trial:
    """A run in its own directory, launched as often as necessary.

    Args:
        flags: of train.py, in addition to FLAGS and the mode's.
        torchrun: launch with torchrun; else the server forks the ranks.
        terminate_peers: terminate the other ranks as soon as one has failed, as torchrun does. If False, they have to
            detect the failure themselves.
        out_dir: the parent of the run directory; default: in `folder`.
    """

    def __init__(self, harness: "Harness", mode: str, folder: Path, flags: Sequence[str] = (), torchrun: bool = False,
                 terminate_peers: bool = False, out_dir: Path | None = None) -> None:
        self.harness, self.mode, self.folder, self.flags = harness, mode, folder, list(flags)
        self.torchrun, self.terminate_peers, self.out_dir = torchrun, terminate_peers, out_dir or folder / "runs"
        self.world_size, self.run_dir, self.launches = MODES[mode][0], self.out_dir / "run", 0
        self.broken: list[tuple[str, str]] = []  # (promise, details)
        self.nodes: tuple[list[dict[str, str]], list[Path]] | None = None  # variables, and network namespace, by rank
        self.ranks: list[Rank] = []  # of the launch, unless it is by torchrun
        folder.mkdir(parents=True)

    def report_broken(self, promise: str, details: object = "") -> None:
        self.broken.append((promise, f"{self.folder} launch {self.launches}: {details}"))

    def launch(self, fault: Mapping[str, Any] | None = None, kill: tuple[float, list[int]] | None = None,
               timeout: float = LAUNCH_TIMEOUT, peer_timeout: float = PEER_TIMEOUT,
               schedule: Schedule | None = None) -> LaunchResult:
        """Start the run and wait for its end.

        Args:
            fault: the spec of a `tools.torture.ranks.Fault`.
            kill: (seconds, ranks): SIGKILL from outside.
            peer_timeout: seconds for a rank after another has failed.
            schedule: what else happens, in the order of time; not with torchrun.
        """
        self.launches += 1
        for pattern in ("fired*", "rank?.json", "code*", "pid*"):
            for stale in self.folder.glob(pattern):
                stale.unlink()
        if fault is not None:
            fault = {**fault, "run_dir": str(self.run_dir)}
        argv = [*FLAGS, *MODES[self.mode][1], f"--data_dir={self.harness.data_dir}", f"--out_dir={self.out_dir}",
                *self.flags]
        started = time.monotonic()
        if self.torchrun:
            result = self._launch_torchrun(argv, fault, kill, timeout)
        else:
            result = self._launch_forked(argv, fault, kill, timeout, peer_timeout, list(schedule or ()))
        result.wall = time.monotonic() - started
        for rank in range(self.world_size):
            with contextlib.suppress(OSError, ValueError):
                report = json.loads((self.folder / f"rank{rank}.json").read_text())
                result.steps.append(report["step"])
                result.counts.append(report["counts"])
        for path in self.folder.glob("fired*"):
            result.fired += path.read_text().splitlines()
        return result

    def _launch_forked(self, argv: list[str], fault: Mapping[str, Any] | None, kill: tuple[float, list[int]] | None,
                       timeout: float, peer_timeout: float, schedule: Schedule) -> LaunchResult:
        server, outputs = self.harness.server, [str(self.folder / f"launch{self.launches}-rank{rank}")
                                                for rank in range(self.world_size)]
        envs, namespaces = self.nodes or (rank_environments(self.world_size), [])
        self.ranks = ranks = server.fork([
            {"argv": argv, "cwd": str(self.folder), "out": output, "fault": fault, "env": env,
             "network": str(namespaces[rank]) if namespaces else None}
            for rank, (output, env) in enumerate(zip(outputs, envs, strict=True))])
        started, failed_at, hung, killed = time.monotonic(), None, False, False
        while any(rank.code is None for rank in ranks):
            now = time.monotonic()
            if kill and now - started > kill[0]:
                server.signal([ranks[i] for i in kill[1]], signal.SIGKILL)
                kill, killed = None, True
            while schedule and now - started > schedule[0][0]:
                schedule.pop(0)[1]()
            if failed_at is None and any(rank.code not in (None, 0) for rank in ranks):
                failed_at = now
                if self.terminate_peers:
                    server.signal(ranks, signal.SIGTERM)
            if now - started > timeout or (failed_at is not None and now - failed_at > peer_timeout):
                hung = True
                server.signal(ranks, signal.SIGKILL)
            with server.condition:
                server.condition.wait(0.005)
        out, *_ = (read_if_exists(f"{output}.out") for output in outputs)
        err = "".join(read_if_exists(f"{output}.err") for output in outputs)
        codes = [rank.code for rank in ranks]
        return LaunchResult(codes, out, err, hung=hung, killed=killed and -signal.SIGKILL in codes)

    def _launch_torchrun(self, argv: list[str], fault: Mapping[str, Any] | None, kill: tuple[float, list[int]] | None,
                         timeout: float) -> LaunchResult:
        task = self.folder / "task.json"
        task.write_text(json.dumps({"cwd": str(self.folder), "env": {}, "fault": fault}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.world_size}",
                   str(ROOT / "tools/torture/ranks.py"), str(task), *argv]
        output = self.folder / f"launch{self.launches}"
        hung = killed = False
        with open(f"{output}.out", "w") as out, open(f"{output}.err", "w") as err:
            launcher = subprocess.Popen(command, cwd=self.folder, env=child_environment(), stdin=subprocess.DEVNULL,
                                        stdout=out, stderr=err, start_new_session=True)
            started = time.monotonic()
            while launcher.poll() is None:
                now, pids = time.monotonic(), self._pids()
                if kill and len(pids) == self.world_size and now - started > kill[0]:
                    for rank in kill[1]:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pids[rank], signal.SIGKILL)
                            killed = True
                    kill = None
                if now - started > timeout:
                    hung = True
                    launcher.kill()
                time.sleep(0.01)
            # A launcher that was killed leaves its ranks running.
            while any(map(is_running, self._pids())):
                time.sleep(0.01)
                if time.monotonic() - started > timeout:
                    hung = True
                    for pid in filter(is_running, self._pids()):
                        os.kill(pid, signal.SIGKILL)
        codes = [int(path.read_text()) if path.exists() else None
                 for path in (self.folder / f"code{rank}" for rank in range(self.world_size))]
        return LaunchResult(codes, Path(f"{output}.out").read_text(), Path(f"{output}.err").read_text(),
                            launcher=launcher.returncode, hung=hung, killed=killed)

    def _pids(self) -> list[int]:
        pids = []
        for rank in range(self.world_size):
            with contextlib.suppress(OSError, ValueError):
                pids.append(int((self.folder / f"pid{rank}").read_text()))
        return pids

    # ------------------------------------------------------------ the promises

    def checkpoint_steps(self) -> list[int]:
        """The steps that have a checkpoint's name, the newest first."""
        return [step for step, _ in checkpoint.list_checkpoints(self.run_dir)]

    def check_checkpoints(self, at_least: int = 0) -> int:
        """Whatever has a checkpoint's name verifies, and one of step `at_least` or later exists; the newest step."""
        for _, path in checkpoint.list_checkpoints(self.run_dir):
            try:
                checkpoint.verify(path)
            except CheckpointError as error:
                self.report_broken("unusable", error)
        newest = max(self.checkpoint_steps(), default=0)
        if newest < at_least:
            self.report_broken("lost", f"step {at_least} existed, now {newest} is the newest")
        return newest

    def check_resumed(self, result: LaunchResult, newest: int) -> None:
        """The launch resumed from the newest checkpoint."""
        step = result.resumed_at()
        if step is not None and step < newest:
            self.report_broken("lost", f"resumed at step {step}, {newest} existed")

    def check_end(self, result: LaunchResult) -> None:
        """The run finished with the weights and losses of an undisturbed run, and left no temporary files."""
        if set(result.codes) != {0} or result.launcher or result.hung:
            self.report_broken("unresumable", f"codes {result.codes}, launcher {result.launcher}: {result.err[-600:]}")
            return
        status = self.read_run()["status"]
        if status != "finished":
            self.report_broken("unresumable", f"status {status}")
        reference = self.harness.reference(self.mode)
        if (self.run_dir / "model.safetensors").read_bytes() != reference.weights:
            self.report_broken("different", "model.safetensors")
        losses = read_losses(self.run_dir)
        if losses != reference.losses:
            self.report_broken("different", f"losses {losses}")
        stale = [p for p in self.run_dir.rglob("*")
                 if p.name != ".lock" and (p.name.startswith(".") or p.suffix == ".tmp")]
        if stale:
            self.report_broken("temporaries", stale)
        self.check_checkpoints()

    def read_run(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "run.json").read_text())


def rank_environments(world_size: int) -> list[dict[str, str]]:
    """The variables that torchrun sets, by rank; none for a single process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    if world_size == 1:
        return [{}]
    return [{"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost",
             "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def read_if_exists(path: str) -> str:
    """A text file; "" where a rank was killed before it made it."""
    return Path(path).read_text() if Path(path).exists() else ""


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    return False


def read_steps(run_dir: Path) -> list[dict[str, Any]]:
    """The records of steps. The incomplete line of a killed run or a full disk is skipped."""
    records, _ = read_log(run_dir / "metrics.jsonl")
    return [record for record in records if record["kind"] == "step"]


def read_losses(run_dir: Path) -> dict[int, float]:
    """{step: loss} by the last record of each step."""
    return {record["step"]: record["loss"] for record in read_steps(run_dir)}


def read_step_times(run_dir: Path) -> list[float]:
    return [record["step_time"] for record in read_steps(run_dir)]


@dataclass
class Reference:
    """An undisturbed run."""

    weights: bytes
    losses: dict[int, float]  # by step
    counts: list[dict[str, int]]  # events by rank and phase
    wall: float  # seconds


class Harness:
    """What the trials share: options, the server of ranks, a dataset, the undisturbed runs."""

    def __init__(self, folder: Path, seed: int, scale: float, jobs: int, modes: Sequence[str], phases: Sequence[str],
                 torchrun: bool) -> None:
        self.folder, self.seed, self.scale, self.jobs = folder, seed, scale, jobs
        self.modes, self.phases, self.torchrun = tuple(modes), tuple(phases), torchrun
        self.data_dir = self.folder / "data"
        texts = enumerate(path.read_text() for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("blockgpt/**/[!_]*.py")]))
        with contextlib.redirect_stdout(None):
            write_dataset(self.data_dir / "text", ByteTokenizer(),
                          [("train" if i % 5 else "val", text) for i, text in texts], source="blockGPT")
        self.server, self.lock, self.trial_ids = Server(), threading.Lock(), itertools.count()
        self.references: dict[str, Reference] = {}

    def reference(self, mode: str) -> Reference:
        with self.lock:
            if mode not in self.references:
                trial = Trial(self, mode, self.folder / f"reference-{mode}", ["--keep_last=3"])
                result = trial.launch(fault={})
                assert set(result.codes) == {0}, result.err
                self.references[mode] = Reference((trial.run_dir / "model.safetensors").read_bytes(),
                                                  read_losses(trial.run_dir), result.counts, result.wall)
            return self.references[mode]

    def reference_run_dir(self, mode: str) -> Path:
        """The directory of the undisturbed run, with three checkpoints."""
        self.reference(mode)
        return self.folder / f"reference-{mode}/runs/run"

    def events(self, mode: str, phase: str) -> list[tuple[int, int]]:
        """[(rank, its events in `phase` of an undisturbed run)] of the ranks that have any."""
        counts = [dict(count, save=sum(count.values())) for count in self.reference(mode).counts]
        return [(rank, count[phase]) for rank, count in enumerate(counts) if count.get(phase)]

    def new_trial(self, mode: str, flags: Sequence[str] = (), torchrun: bool = False, terminate_peers: bool = False,
                  out_dir: Path | None = None) -> Trial:
        folder = self.folder / f"trial{next(self.trial_ids):05d}"
        return Trial(self, mode, folder, flags, torchrun, terminate_peers, out_dir)

    def end_trial(self, trial: Trial) -> None:
        """Remove the directory of a trial unless it has broken promises."""
        if not trial.broken:
            shutil.rmtree(trial.folder)

    def close(self) -> None:
        self.server.close()
