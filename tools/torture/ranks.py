"""The processes of a tortured run, and the faults that are injected into them.

    python -m tools.torture.ranks                    a server with torch loaded, which forks the ranks it is asked for
    python tools/torture/ranks.py RANK.json FLAGS    a rank under torchrun: train.py FLAGS, with the fault of RANK.json

A rank runs train.py as `__main__` and exits as any interpreter does. Its fault is injected at the n-th event of a
phase: WRAPPED names the functions that are the phases of a save, and a profile function counts their calls that reach
the disk or the other ranks. A new phase is a line of WRAPPED, a new fault a method of `Fault` called by `inject`.
Requests and answers of the server are lines of JSON, for runs.py's `Server`.
"""

import contextlib
import ctypes
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
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
if TYPE_CHECKING:  # the server loads torch after its first lines; a rank under torchrun runs this file as a script
    import torch

    from blockgpt.training.faults import Watchdog
    from blockgpt.training.objectives import LanguageModeling, Metrics

ROOT = Path(__file__).resolve().parents[2]

# The functions whose calls are the phases of a save. "rename" is what `commit_checkpoint` does from
# its call of os.rename on.
WRAPPED = {
    "save": ("blockgpt.checkpoints.saver", "CheckpointSaver._write"),
    "preallocate": ("blockgpt.checkpoints.files", "TensorFile.__init__"),
    "write": ("blockgpt.checkpoints.saver", "write_chunks"),
    "all_gather": ("blockgpt.checkpoints.saver", "run_on_all_ranks"),
    "commit": ("blockgpt.checkpoints.saver", "commit_checkpoint"),
    "verify": ("blockgpt.checkpoints.saver", "verify_written"),
    "prune": ("blockgpt.checkpoints.saver", "CheckpointSaver._prune"),
    "export": ("blockgpt.checkpoints.checkpoint", "write_export"),
}
PHASES = ("preallocate", "write", "all_gather", "commit", "rename", "verify", "prune", "export")
EVENTS = {"open", "write", "fsync", "posix_fallocate", "posix_fadvise", "rename", "replace", "unlink", "rmdir", "mkdir",
          "close", "readinto", "scandir", "lstat", "allgather", "wait"}
NEEDS_SPACE = {"open", "write", "fsync", "posix_fallocate", "rename", "replace", "mkdir"}
PRELOADED = ("blockgpt.checkpoints.manager", "blockgpt.training.faults", "training_logger",
             "blockgpt.training.objectives", "blockgpt.training.optimizers", "blockgpt.training.parallel",
             "blockgpt.accounting.dry_run", "blockgpt.training.sharding", "model_builder", "torch.distributed.optim",
             "torch.distributed.tensor.parallel", "torch._dynamo")

CLONE_NEWNET = 0x40000000  # of Linux


class Fault:
    """A fault of this rank.

    Args:
        spec: {"action", "phase", "n", …}, or {} to only count events. The actions:
            kill: SIGKILL to `victim` (self, other, all ranks).
            signal: `signal` to `victim` (also launcher).
            fill_disk: the free space of the disk is taken by a file `ballast`, which is removed when the rank enters
                its `release`-th step from there (0: never).
            refuse: this event and, up to `failures`, the next ones of the phase raise ENOSPC.
            nonfinite: `value` in the loss, the gradient or the reduced gradient (after the all-reduce), as `where`
                says, at the n-th step from here.
            More phases than those of a save: save (all of them), step, evaluation (n: C calls from the k-th one on).
    """

    def __init__(self, spec: dict[str, Any], rank: int) -> None:
        self.spec, self.rank, self.fired, self.step = spec, rank, False, 0
        self.action, self.phase, self.n = spec.get("action"), spec.get("phase"), spec.get("n", 0)
        self.counts: dict[str, int] = {}  # events by phase
        self.local = threading.local()  # .stack: the phases that this thread is in
        self.times_entered = 0  # of the step or evaluation phase
        self.calls_left: int | None = None  # C calls in this phase until the fault

    def install(self) -> None:
        """Wrap the functions of the program that are phases or are poisoned."""
        from blockgpt.training import faults

        for phase, (module, qualified_name) in WRAPPED.items():
            owner: Any = importlib.import_module(module)
            *class_names, name = qualified_name.split(".")
            for class_name in class_names:
                owner = getattr(owner, class_name)
            setattr(owner, name, self.wrap(phase, getattr(owner, name)))
        watchdog_class: Any = faults.Watchdog
        enter_phase, exit_watchdog = watchdog_class.enter_phase, watchdog_class.__exit__

        def enter_phase_and_inject(watchdog: "Watchdog", phase: str, step: int | None = None) -> None:
            enter_phase(watchdog, phase, step)
            self.step = watchdog.step
            self.on_loop_phase(phase)

        def exit_and_report(watchdog: "Watchdog", *error: Any) -> Any:
            Path(f"rank{self.rank}.json").write_text(json.dumps({"step": watchdog.step, "counts": self.counts}))
            return exit_watchdog(watchdog, *error)

        watchdog_class.enter_phase, watchdog_class.__exit__ = enter_phase_and_inject, exit_and_report
        if self.action == "nonfinite":
            self.poison()

    # ------------------------------------------------------------ in a save

    def wrap(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, the events of its calls counted as those of `phase`."""
        def call(*args: Any, **kwargs: Any) -> Any:
            stack = self.local.__dict__.setdefault("stack", [])
            if not stack and phase not in ("save", "export"):
                return function(*args, **kwargs)  # outside a save, such as the verification before a resume
            if "export" in stack or (phase == "all_gather" and stack and stack[-1] != "save"):
                return function(*args, **kwargs)
            stack.append(phase)
            previous = sys.getprofile()
            sys.setprofile(self.on_call)
            if self.phase == phase == "save" and self.n == 0:
                self.inject(phase)
            try:
                return function(*args, **kwargs)
            finally:
                sys.setprofile(previous)
                stack[:] = stack[:stack.index(phase)]
        return call

    def on_call(self, frame: FrameType, event: str, called: Any) -> None:
        """The profile function of a save: count the events of each phase, and inject the fault at its n-th."""
        if event != "c_call" or called.__name__ not in EVENTS:
            return
        stack = self.local.stack
        if called.__name__ == "rename" and stack[-1] == "commit" and frame.f_code.co_name == "commit_checkpoint":
            stack.append("rename")
        phase = stack[-1]
        self.counts[phase] = self.counts.get(phase, 0) + 1
        if self.phase in (phase, "save"):
            count = self.counts[phase] if self.phase == phase else sum(self.counts.values())
            if count == self.n:
                self.inject(phase)
            elif self.fired and self.action == "refuse" and self.spec["failures"] and called.__name__ in NEEDS_SPACE:
                self.refuse()

    # ------------------------------------------------------------ in the training loop

    def on_loop_phase(self, phase: str) -> None:
        if phase == "step" and self.fired and self.action == "fill_disk" and self.spec["release"]:
            self.spec["release"] -= 1
            if not self.spec["release"]:
                Path(self.spec["ballast"]).unlink(missing_ok=True)
        if self.phase not in ("step", "evaluation") or self.fired:
            return
        if self.calls_left is not None:  # the phase ended before its n-th call
            sys.setprofile(None)
            self.inject(self.phase)
        elif phase == self.phase:
            self.times_entered += 1
            if self.times_entered == self.spec["k"]:
                self.calls_left = self.n
                sys.setprofile(self.count_down)

    def count_down(self, frame: FrameType, event: str, called: Any) -> None:
        assert self.calls_left is not None and self.phase is not None
        self.calls_left -= event == "c_call"
        if self.calls_left <= 0:
            sys.setprofile(None)
            self.inject(self.phase)

    # ------------------------------------------------------------ the faults

    def inject(self, phase: str) -> None:
        if self.fired:
            return
        self.fired = True
        with open(f"fired{self.rank}", "a") as f:  # the launcher counts these
            f.write(f"{phase} {self.step} {newest_step(self.spec['run_dir'])}\n")
        if self.action in ("kill", "signal"):
            self.send_signal(self.spec.get("signal", signal.SIGKILL), self.spec["victim"])
        elif self.action == "fill_disk":
            fill_disk(self.spec["ballast"])
        elif self.action == "refuse":
            self.refuse()

    def send_signal(self, signal_number: int, victim: str) -> None:
        if victim == "all":  # the ranks are a process group
            os.kill(0, signal_number)
        else:
            os.kill({"self": os.getpid, "launcher": os.getppid,
                     "other": lambda: int(Path(f"pid{1 - self.rank}").read_text())}[victim](), signal_number)

    def refuse(self) -> None:
        self.spec["failures"] -= 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def poison(self) -> None:
        """Make the loss or a gradient of one step NaN or infinite."""
        from blockgpt.training import objectives, optimizers

        objective_class: Any = objectives.LanguageModeling
        optimizers_module: Any = optimizers
        loss, clip_gradients, calls = objective_class.loss, optimizers.clip_gradients, [0, 0]
        value, where, micro_steps = float(self.spec["value"]), self.spec["where"], self.spec["micro_steps"]
        call_to_poison = (self.n - 1) * micro_steps + 1 + self.spec["micro"]

        def poisoned_loss(objective: "LanguageModeling", model: "torch.nn.Module",
                          batch: Any) -> "tuple[torch.Tensor, Metrics]":
            micro_loss, metrics = loss(objective, model, batch)
            calls[0] += micro_loss.requires_grad  # not in an evaluation
            if micro_loss.requires_grad and calls[0] == call_to_poison:
                if where == "loss":
                    micro_loss = micro_loss * value if value != value else micro_loss + value
                elif where == "gradient":
                    micro_loss.register_hook(lambda gradient: gradient * value)
            return micro_loss, metrics

        def poisoned_clip(model: "torch.nn.Module", max_norm: float) -> float:
            calls[1] += 1
            if calls[1] == self.n and where == "reduced":
                gradient: Any = [p.grad for p in model.parameters() if p.grad is not None][-1]
                gradient = gradient.to_local() if hasattr(gradient, "to_local") else gradient
                if gradient.numel():
                    gradient.view(-1)[0] = value
            return clip_gradients(model, max_norm)

        objective_class.loss, optimizers_module.clip_gradients = poisoned_loss, poisoned_clip


def newest_step(run_dir: str) -> int:
    """The newest step that has a checkpoint's name, 0 without one."""
    return max((int(path.name[5:]) for path in Path(run_dir, "checkpoints").glob("step_*")), default=0)


def fill_disk(path: str) -> None:
    """Take all free space of the disk with a file, to the last byte."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    size = 1 << 16
    while size:
        try:
            os.write(descriptor, b"\0" * size)
        except OSError:
            size //= 2
    os.close(descriptor)


# ---- a rank

def enter_network(path: str) -> None:
    """Move this process into a network namespace."""
    with open(path) as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), path)


def become_rank(task: dict[str, Any]) -> None:
    """Run train.py with the {argv, env, cwd, out, fault, network} of `task`; network: the file of a namespace."""
    os.chdir(task["cwd"])
    if task.get("network"):
        enter_network(task["network"])
    for signal_number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.default_int_handler if signal_number == signal.SIGINT else signal.SIG_DFL)
    if task.get("out"):
        for descriptor, path in ((0, os.devnull), (1, task["out"] + ".out"), (2, task["out"] + ".err")):
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(opened, descriptor)
            os.close(opened)
    os.environ.update(task["env"])
    rank = int(os.environ.get("RANK", "0"))
    Path(f"pid{rank}").write_text(str(os.getpid()))
    sys.argv = ["train.py", *task["argv"]]
    spec = task.get("fault") or {}
    Fault(spec if rank in spec.get("ranks", [rank]) else {}, rank).install()
    code: Any = 1
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        code = 0
    except SystemExit as exit_:
        code = exit_.code or 0
        raise
    finally:
        Path(f"code{rank}").write_text(str(code))


def serve() -> dict[str, Any] | None:
    """Fork ranks until the input ends: None. In a forked rank, returns its task."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # the ranks share the memory of what is loaded
    children: set[int] = set()
    unread = b""
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
                if "signal" in request:  # only to children that still run: no pid then means another process
                    for pid in children.intersection(request["pids"]):
                        os.kill(pid, request["signal"])
                    continue
                pids: list[int] = []
                for task in request["ranks"]:
                    pid = os.fork()
                    if pid == 0:
                        with contextlib.suppress(OSError):
                            os.setpgid(0, pids[0] if pids else 0)
                        return task
                    with contextlib.suppress(OSError):
                        os.setpgid(pid, (pids or [pid])[0])
                    pids.append(pid)
                children.update(pids)
                answer(id=request["id"], pids=pids)
        for pid in list(children):
            exited, status = os.waitpid(pid, os.WNOHANG)
            if exited:
                children.discard(pid)
                answer(pid=pid, code=os.waitstatus_to_exitcode(status))


def answer(**values: Any) -> None:
    os.write(1, (json.dumps(values) + "\n").encode())


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text()) | {"argv": sys.argv[2:]} if len(sys.argv) > 1 else serve()
    if task is not None:
        become_rank(task)
