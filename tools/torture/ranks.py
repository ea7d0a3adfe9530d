"""The processes that tools.torture torments, and what befalls them from within.

    python -m tools.torture.ranks                    a server that has torch loaded: it forks the ranks it is asked for
    python tools/torture/ranks.py RANK.json FLAGS    a rank under torchrun: train.py FLAGS, with the fault of RANK.json

A rank runs train.py as `__main__` and ends as any interpreter does. Its fault happens at the n-th event of a phase:
`enter` wraps the functions that are the phases of a save, and a profile function counts the calls that reach the disk
or the other ranks. Requests and answers of the server are lines of JSON; torture.py's `Server` speaks them.
"""

import contextlib
import errno
import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The phases of a save: where each begins and ends. "rename" is what `finish` does from its os.rename on.
WRAPPED = {
    "save": ("blockgpt.training.checkpoint_saver", "CheckpointSaver._write"),
    "reserve": ("blockgpt.training.checkpoint_files", "TensorFile.__init__"),
    "tensors": ("blockgpt.training.checkpoint_saver", "write_pieces"),
    "exchange": ("blockgpt.training.checkpoint_saver", "together"),
    "index": ("blockgpt.training.checkpoint_saver", "commit"),
    "verify": ("blockgpt.training.checkpoint_saver", "verify_written"),
    "prune": ("blockgpt.training.checkpoint_saver", "CheckpointSaver._prune"),
    "export": ("blockgpt.training.checkpoint", "write_export"),
}
PHASES = ("reserve", "tensors", "exchange", "index", "rename", "verify", "prune", "export")
EVENTS = {"open", "write", "fsync", "posix_fallocate", "posix_fadvise", "rename", "replace", "unlink", "rmdir", "mkdir",
          "close", "readinto", "scandir", "lstat", "allgather", "wait"}
TAKES_ROOM = {"open", "write", "fsync", "posix_fallocate", "rename", "replace", "mkdir"}


class Fault:
    """What befalls this rank; said is {"kind", "phase", "n", …}, or {} to count events alone.

    kill: SIGKILL to `victim` (self, other, all ranks). signal: `number` to `victim` (also launcher). fill: the room of
    the disk is taken by a file `ballast`, removed again when the rank enters its `release`-th step from there (0:
    never). full: that event and, up to `failures`, those after it in the phase meet ENOSPC. nonfinite: `value` in what
    `where` names (loss, gradient, reduced: a gradient that the ranks have already shared) at the n-th step from here.

    Phases beside those of a save: save (all of them), step, evaluation (n then counts C calls from the k-th on).
    """

    def __init__(self, said, rank):
        self.said, self.rank, self.fired, self.step = said, rank, False, 0
        self.kind, self.phase, self.n = said.get("kind"), said.get("phase"), said.get("n", 0)
        self.counts, self.here = {}, threading.local()  # events by phase; the phases this thread is in
        self.entered, self.left_calls = 0, None  # of a phase of the loop: how often it was, C calls to go

    def install(self):
        from blockgpt.training import faults
        from blockgpt.training import objectives as objectives_module
        from blockgpt.training import optimizers as optimizers_module

        for phase, (module, name) in WRAPPED.items():
            owner = importlib.import_module(module)
            *cls, name = name.split(".")
            owner = getattr(owner, cls[0]) if cls else owner
            setattr(owner, name, self.wrapped(phase, getattr(owner, name)))
        enter, leave = faults.Watchdog.enter_phase, faults.Watchdog.__exit__

        def enter_and_look(watchdog, phase, step=None):
            enter(watchdog, phase, step)
            self.step = watchdog.step
            self.loop_enters(phase)

        def leave_and_tell(watchdog, *error):
            Path(f"rank{self.rank}.json").write_text(json.dumps({"step": watchdog.step, "counts": self.counts}))
            return leave(watchdog, *error)

        faults.Watchdog.enter_phase, faults.Watchdog.__exit__ = enter_and_look, leave_and_tell
        if self.kind == "nonfinite":
            self.poison(objectives_module, optimizers_module)

    # ------------------------------------------------------------ in a save

    def wrapped(self, phase, function):
        def call(*args, **kwargs):
            stack = self.here.__dict__.setdefault("stack", [])
            if not stack and phase not in ("save", "export"):
                return function(*args, **kwargs)  # verifying before a resume, say: no save
            if "export" in stack or (phase == "exchange" and stack and stack[-1] != "save"):
                return function(*args, **kwargs)
            stack.append(phase)
            previous = sys.getprofile()
            sys.setprofile(self.see)
            if self.phase == phase == "save" and self.n == 0:
                self.strike(phase)
            try:
                return function(*args, **kwargs)
            finally:
                sys.setprofile(previous)
                stack[:] = stack[:stack.index(phase)]
        return call

    def see(self, frame, event, called):
        if event != "c_call" or called.__name__ not in EVENTS:
            return
        stack = self.here.stack
        if called.__name__ == "rename" and stack[-1] == "index" and frame.f_code.co_name == "finish":
            stack.append("rename")
        phase = stack[-1]
        self.counts[phase] = self.counts.get(phase, 0) + 1
        if self.phase in (phase, "save"):
            now = self.counts[phase] if self.phase == phase else sum(self.counts.values())
            if now == self.n:
                self.strike(phase)
            elif self.fired and self.kind == "full" and self.said["failures"] and called.__name__ in TAKES_ROOM:
                self.no_room()

    # ------------------------------------------------------------ in the loop

    def loop_enters(self, phase):
        if phase == "step" and self.fired and self.kind == "fill" and self.said["release"]:
            self.said["release"] -= 1
            if not self.said["release"]:
                Path(self.said["ballast"]).unlink(missing_ok=True)
        if self.phase not in ("step", "evaluation") or self.fired:
            return
        if self.left_calls is not None:  # the phase ended before its n-th call
            sys.setprofile(None)
            self.strike(self.phase)
        elif phase == self.phase:
            self.entered += 1
            if self.entered == self.said["k"]:
                self.left_calls = self.n
                sys.setprofile(self.count_down)

    def count_down(self, frame, event, called):
        self.left_calls -= event == "c_call"
        if self.left_calls <= 0:
            sys.setprofile(None)
            self.strike(self.phase)

    # ------------------------------------------------------------ what happens

    def strike(self, phase):
        if self.fired:
            return
        self.fired = True
        with open(f"fired{self.rank}", "a") as f:  # the launcher counts these
            f.write(f"{phase} {self.step} {newest(self.said['run_dir'])}\n")
        if self.kind in ("kill", "signal"):
            number = self.said.get("number", signal.SIGKILL)
            if self.said["victim"] == "other":
                os.kill(int(Path(f"pid{1 - self.rank}").read_text()), number)
            elif self.said["victim"] == "all":  # the ranks are a process group
                os.kill(0, number)
            else:
                os.kill(os.getppid() if self.said["victim"] == "launcher" else os.getpid(), number)
        elif self.kind == "fill":
            fill(self.said["ballast"])
        elif self.kind == "full":
            self.no_room()

    def no_room(self):
        self.said["failures"] -= 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def poison(self, objectives, optimizers):
        import torch

        value, micro_steps = float(self.said["value"]), self.said["micro_steps"]
        loss, clip, calls = objectives.LanguageModeling.loss, optimizers.clip_gradients, [0, 0]

        def poisoned_loss(objective, model, batch):
            share = loss(objective, model, batch)
            if torch.is_grad_enabled():
                calls[0] += 1
                if calls[0] == (self.n - 1) * micro_steps + 1 + self.said["micro"]:
                    if self.said["where"] == "loss":
                        share = share * value if value != value else share + value
                    elif self.said["where"] == "gradient":
                        share.register_hook(lambda g: g * value)
            return share

        def poisoned_clip(model, *rest):
            calls[1] += 1
            if calls[1] == self.n and self.said["where"] == "reduced":
                p = [p for p in model.parameters() if p.grad is not None][-1].grad
                p = p.to_local() if hasattr(p, "to_local") else p
                if p.numel():
                    p.view(-1)[0] = value
            return clip(model, *rest)

        objectives.LanguageModeling.loss, optimizers.clip_gradients = poisoned_loss, poisoned_clip


def newest(run_dir):
    """The newest step under a checkpoint's name, 0 without one."""
    return max((int(path.name[5:]) for path in Path(run_dir, "checkpoints").glob("step_*")), default=0)


def fill(path):
    """Take what room the disk has left with a file, to the last byte."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    size = 1 << 16
    while size:
        try:
            os.write(descriptor, b"\0" * size)
        except OSError:
            size //= 2
    os.close(descriptor)


# ---- a rank

def become(rank):
    """Be train.py with these {argv, env, cwd, out, fault}; does not return."""
    os.chdir(rank["cwd"])
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if rank.get("out"):
        for descriptor, path in ((0, os.devnull), (1, rank["out"] + ".out"), (2, rank["out"] + ".err")):
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(opened, descriptor)
            os.close(opened)
    os.environ.update(rank["env"])
    place = int(os.environ.get("RANK", "0"))
    Path(f"pid{place}").write_text(str(os.getpid()))
    sys.argv = ["train.py", *rank["argv"]]
    said = rank.get("fault") or {}
    Fault(said if place in said.get("ranks", [place]) else {}, place).install()
    code = 1
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
        raise
    finally:
        Path(f"code{place}").write_text(str(code))


def serve():
    """Fork ranks until the input ends; in a rank, returns what it is to become."""
    for name in ("blockgpt.training.checkpoint", "blockgpt.training.faults", "training_logger", "blockgpt.training.objectives",
                 "blockgpt.training.optimizers", "blockgpt.training.parallel", "blockgpt.accounting.dry_run", "blockgpt.training.sharding", "model_builder",
                 "torch.distributed.optim", "torch.distributed.tensor.parallel", "torch._dynamo"):
        __import__(name)
    gc.freeze()  # what is loaded stays shared with the ranks
    children, unread = set(), b""
    answer(ready=os.getpid())
    while True:
        if select.select([0], [], [], 0.004 if children else None)[0]:
            data = os.read(0, 1 << 20)
            if not data:
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                return None
            *lines, unread = (unread + data).split(b"\n")
            for request in map(json.loads, lines):
                if "signal" in request:  # only to those that are still there: no number means another process
                    for pid in children.intersection(request["pids"]):
                        os.kill(pid, request["signal"])
                    continue
                pids = []
                for rank in request["ranks"]:
                    pid = os.fork()
                    if pid == 0:
                        with contextlib.suppress(OSError):
                            os.setpgid(0, pids[0] if pids else 0)
                        return rank
                    with contextlib.suppress(OSError):
                        os.setpgid(pid, (pids or [pid])[0])
                    pids.append(pid)
                children.update(pids)
                answer(id=request["id"], pids=pids)
        for pid in list(children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                children.discard(pid)
                answer(pid=pid, code=os.waitstatus_to_exitcode(status))


def answer(**what):
    os.write(1, (json.dumps(what) + "\n").encode())


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text()) | {"argv": sys.argv[2:]} if len(sys.argv) > 1 else serve()
    if task is not None:
        become(task)
