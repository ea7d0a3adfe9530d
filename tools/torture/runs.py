"""Runs to torment: the server of ranks, torchrun, a trial's directory, and what must hold of a run at its end."""

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
from dataclasses import dataclass, field
from pathlib import Path

import blockgpt.training.checkpoint as checkpoint
from blockgpt.data.prepare import write_dataset
from blockgpt.data.tokenizer import ByteTokenizer
from blockgpt.errors import CheckpointError, UserError

ROOT = Path(__file__).resolve().parents[2]
MODES = {"single": (1, []), "ddp": (2, []), "zero1": (2, ["--use_zero1=True"]), "fsdp": (2, ["--use_fsdp=True"]),
         "tp": (2, ["--tensor_parallel=2"])}
STEPS, EVERY = 12, 2
FLAGS = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=2", "--dropout=0.1",
         "--gradient_accumulation_steps=4", "--eval_tokens=256", "--dataset=text", "--device=cpu", "--mfu_peak=1",
         "--log_interval=1", "--eval_interval=4", f"--checkpoint_interval={EVERY}", f"--max_iters={STEPS}",
         "--warmup_iters=2", "--run_name=run", "--resume=auto", "--rank_timeout=30", "--save_timeout=30"]
PATIENCE = 60.0  # seconds for a launch of a tiny run
GRACE = 10.0  # … for a rank whose peer was killed


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@dataclass
class Rank:
    """A process of the server; code: its return code once it has ended, of a signal the negative number."""

    pid: int
    code: int | None = None


class Server:
    """The process that forks ranks. Its answers are read by a thread, so that several trials can share it."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-m", "tools.torture.ranks"], cwd=ROOT, env=environment(),
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.lock, self.number = threading.Condition(), itertools.count()
        self.alive, self.started = {}, {}
        assert json.loads(self.process.stdout.readline())["ready"]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        for line in self.process.stdout:
            said = json.loads(line)
            with self.lock:
                if "pids" in said:
                    self.started[said["id"]] = [self.alive.setdefault(pid, Rank(pid)) for pid in said["pids"]]
                else:
                    self.alive.pop(said["pid"]).code = said["code"]
                self.lock.notify_all()

    def _ask(self, **what):
        with self.lock:
            try:
                self.process.stdin.write(json.dumps(what) + "\n")
            except BrokenPipeError:
                raise self._gone() from None

    def _gone(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        code = self.process.poll()
        return UserError("the process that forks the ranks " + ("does not answer" if code is None else
                                                               f"ended with exit code {code}"))

    def start(self, ranks):
        number = next(self.number)
        self._ask(id=number, ranks=ranks)
        with self.lock:
            if not self.lock.wait_for(lambda: number in self.started, PATIENCE):
                raise self._gone()
            return self.started.pop(number)

    def signal(self, ranks, number):
        self._ask(signal=int(number), pids=[rank.pid for rank in ranks])

    def close(self):
        self.process.stdin.close()
        self.process.wait(PATIENCE)


@dataclass
class Launch:
    """How one start of a run went. codes: by rank, what it itself said or was ended by; launcher: torchrun's."""

    codes: list
    out: str
    err: str
    fired: list
    steps: list
    counts: list
    wall: float
    launcher: int | None = None
    hung: bool = False  # it had to be ended
    struck: bool = False  # killed from outside, while it ran

    def resumed_at(self):
        """The step it went on from, or None if it did not come so far."""
        for line in self.out.splitlines():
            if "resumed from " in line and " at step " in line:
                return int(line.rsplit(" at step ", 1)[1])
        return 0 if "no checkpoint" in self.out else None

    def announced(self):
        """The newest step of which the console or a rank that was struck said that its checkpoint stands; 0 if none."""
        said = [int(line.split()[1]) for line in self.out.splitlines() if re.match(r"step +\d+   saved", line)]
        return max([*said, *(int(line.split()[-1]) for line in self.fired)], default=0)

    def lines(self, start):
        return [line for line in self.err.splitlines() if line.startswith(start)]


@dataclass
class Trial:
    """One run in a directory of its own, launched as often as it takes. mimic: end the others of a dead rank at once,
    as torchrun does; else they have to notice."""

    tool: "Tool"
    mode: str
    folder: Path
    flags: list = field(default_factory=list)
    torchrun: bool = False
    mimic: bool = False
    out_dir: Path = None
    launches: int = 0
    broken: list = field(default_factory=list)

    def __post_init__(self):
        self.folder.mkdir(parents=True)
        self.out_dir = self.out_dir or self.folder / "runs"
        self.run_dir = self.out_dir / "run"

    @property
    def size(self):
        return MODES[self.mode][0]

    def break_(self, promise, detail=""):
        self.broken.append((promise, f"{self.folder} launch {self.launches}: {detail}"))

    def launch(self, fault=None, kill=None, more=(), patience=PATIENCE):
        """Start the run and wait for its end; a `Launch`.

        fault: what a `Fault` of torture.ranks is made of. kill: (seconds, ranks), kill -9 from outside.
        """
        self.launches += 1
        for stale in [*self.folder.glob("fired*"), *self.folder.glob("rank?.json"), *self.folder.glob("code*"),
                      *self.folder.glob("pid*")]:
            stale.unlink()
        if fault is not None:
            fault = {**fault, "run_dir": str(self.run_dir)}
        argv = [*FLAGS, *MODES[self.mode][1], f"--data_dir={self.tool.data}", f"--out_dir={self.out_dir}", *self.flags,
                *more]
        begin = time.monotonic()
        result = (self._under_torchrun if self.torchrun else self._forked)(argv, fault, kill, patience)
        result.wall = time.monotonic() - begin
        for rank in range(self.size):
            with contextlib.suppress(OSError, ValueError):
                said = json.loads((self.folder / f"rank{rank}.json").read_text())
                result.steps.append(said["step"])
                result.counts.append(said["counts"])
        for path in self.folder.glob("fired*"):
            result.fired += path.read_text().splitlines()
        return result

    def _forked(self, argv, fault, kill, patience):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        place = {"WORLD_SIZE": str(self.size), "LOCAL_WORLD_SIZE": str(self.size), "MASTER_ADDR": "localhost",
                 "MASTER_PORT": str(port)} if self.size > 1 else {}
        output = [str(self.folder / f"launch{self.launches}-rank{rank}") for rank in range(self.size)]
        ranks = self.tool.server.start([
            {"argv": argv, "cwd": str(self.folder), "out": output[rank], "fault": fault,
             "env": {**place, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if place else {})}}
            for rank in range(self.size)])
        begin, dead, hung, struck = time.monotonic(), None, False, False
        while any(rank.code is None for rank in ranks):
            now = time.monotonic()
            if kill and now - begin > kill[0]:
                self.tool.server.signal([ranks[i] for i in kill[1]], signal.SIGKILL)
                kill, struck = None, True
            if dead is None and any(rank.code not in (None, 0) for rank in ranks):
                dead = now
                if self.mimic:
                    self.tool.server.signal(ranks, signal.SIGTERM)
            if now - begin > patience or (dead and now - dead > GRACE):
                hung = True
                self.tool.server.signal(ranks, signal.SIGKILL)
            with self.tool.server.lock:
                self.tool.server.lock.wait(0.005)
        out, err = (Path(output[0] + ".out").read_text(),
                    "".join(Path(path + ".err").read_text() for path in output if Path(path + ".err").exists())
                    ) if Path(output[0] + ".out").exists() else ("", "")
        return Launch([rank.code for rank in ranks], out, err, [], [], [], 0, hung=hung,
                      struck=struck and -signal.SIGKILL in [rank.code for rank in ranks])

    def _under_torchrun(self, argv, fault, kill, patience):
        task = self.folder / "task.json"
        task.write_text(json.dumps({"cwd": str(self.folder), "env": {}, "fault": fault}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.size}",
                   str(ROOT / "tools/torture/ranks.py"), str(task), *argv]
        output = self.folder / f"launch{self.launches}"
        hung = struck = False
        with open(f"{output}.out", "w") as out, open(f"{output}.err", "w") as err:
            launcher = subprocess.Popen(command, cwd=self.folder, env=environment(), stdin=subprocess.DEVNULL,
                                        stdout=out, stderr=err, start_new_session=True)
            begin = time.monotonic()
            while launcher.poll() is None:
                now, pids = time.monotonic(), self._pids()
                if kill and len(pids) == self.size and now - begin > kill[0]:
                    for rank in kill[1]:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pids[rank], signal.SIGKILL)
                            struck = True
                    kill = None
                if now - begin > patience:
                    hung = True
                    launcher.kill()
                time.sleep(0.01)
            # A launcher that was killed leaves its ranks to themselves.
            while any(map(is_alive, self._pids())):
                time.sleep(0.01)
                if time.monotonic() - begin > patience:
                    hung = True
                    for pid in filter(is_alive, self._pids()):
                        os.kill(pid, signal.SIGKILL)
        codes = [int(path.read_text()) if path.exists() else None
                 for path in (self.folder / f"code{rank}" for rank in range(self.size))]
        return Launch(codes, Path(f"{output}.out").read_text(), Path(f"{output}.err").read_text(), [], [], [], 0,
                      launcher=launcher.returncode, hung=hung, struck=struck)

    def _pids(self):
        pids = []
        for rank in range(self.size):
            with contextlib.suppress(OSError, ValueError):
                pids.append(int((self.folder / f"pid{rank}").read_text()))
        return pids

    # ------------------------------------------------------------ what must hold

    def visible(self):
        """The steps under whose name something stands, the newest first."""
        return [step for step, _ in checkpoint.list_checkpoints(self.run_dir)]

    def check_visible(self, at_least=0):
        """What stands under a checkpoint's name is whole, and what stood there before the trouble is there still."""
        for _, path in checkpoint.list_checkpoints(self.run_dir):
            try:
                checkpoint.verify(path)
            except CheckpointError as error:
                self.break_("unusable", error)
        newest = max(self.visible(), default=0)
        if newest < at_least:
            self.break_("lost", f"step {at_least} stood there, now {newest} is the newest")
        return newest

    def check_resumed(self, result, newest):
        """`result`, of a launch, went on from the newest checkpoint."""
        step = result.resumed_at()
        if step is not None and step < newest:
            self.break_("lost", f"resumed at step {step}, {newest} was there")

    def check_end(self, result):
        """The run ended well, as the one that nobody disturbed, and left nothing lying about."""
        if set(result.codes) != {0} or result.launcher or result.hung:
            self.break_("unresumable", f"codes {result.codes}, launcher {result.launcher}: {result.err[-600:]}")
            return
        status = self.read_run()["status"]
        if status != "finished":
            self.break_("unresumable", f"status {status}")
        if (self.run_dir / "model.safetensors").read_bytes() != self.tool.reference(self.mode).weights:
            self.break_("different", "model.safetensors")
        losses = losses_of(self.run_dir)
        if losses != self.tool.reference(self.mode).losses:
            self.break_("different", f"losses {losses}")
        left = [p for p in self.run_dir.rglob("*") if p.name.startswith(".") or p.name.endswith(".tmp")]
        if left:
            self.break_("temporaries", left)
        self.check_visible()

    def read_run(self):
        return json.loads((self.run_dir / "run.json").read_text())


def is_alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    return False


def losses_of(run_dir):
    """{step: loss} that the log says in the end; half a line, of a killed run or a full disk, does not count."""
    losses = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            said = json.loads(line)
            if said["kind"] == "step":
                losses[said["step"]] = said["loss"]
    return losses


@dataclass
class Reference:
    """The run nobody disturbed: weights, losses, events of a whole run by rank and phase, seconds it takes."""

    weights: bytes
    losses: dict
    counts: list
    wall: float


class Tool:
    """What the trials share: the server, a dataset, the undisturbed runs."""

    def __init__(self, folder, seed, scale):
        self.folder, self.seed, self.scale = Path(folder), seed, scale
        self.data = self.folder / "data"
        texts = enumerate(path.read_text() for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("blockgpt/**/[!_]*.py")]))
        with contextlib.redirect_stdout(None):
            write_dataset(self.data / "text", ByteTokenizer(), [("train" if i % 5 else "val", t) for i, t in texts],
                          source="blockGPT")
        self.server, self.references, self.lock = Server(), {}, threading.Lock()
        self.number = itertools.count()

    def reference(self, mode):
        with self.lock:
            if mode not in self.references:
                trial = Trial(self, mode, self.folder / f"reference-{mode}", ["--keep_last=3"])
                result = trial.launch(fault={})
                assert set(result.codes) == {0}, result.err
                self.references[mode] = Reference((trial.run_dir / "model.safetensors").read_bytes(),
                                                  losses_of(trial.run_dir), result.counts, result.wall)
            return self.references[mode]

    def reference_folder(self, mode):
        """The directory of the undisturbed run, with three checkpoints."""
        self.reference(mode)
        return self.folder / f"reference-{mode}/runs/run"

    def trial(self, mode, flags=(), **how):
        return Trial(self, mode, self.folder / f"trial{next(self.number):05d}", list(flags), **how)

    def end(self, trial):
        """Forget a trial that kept every promise."""
        if not trial.broken:
            shutil.rmtree(trial.folder)

    def close(self):
        self.server.close()
