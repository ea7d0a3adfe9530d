"""The processes of a run: start-up, collectives, exit.

`init` gives each process its `Runtime`, which is passed to every other module. Values that all ranks share go through
the runtime's collectives. These run on the CPU (gloo), so they never wait for a GPU; all ranks must call them in the
same order.
"""

import contextlib
import gc
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from blockgpt.errors import CheckpointError, ConfigError, UserError, short_repr
from blockgpt.training import rendezvous
from blockgpt.training.clock import RunningClock
from blockgpt.training.device import choose_device, choose_dtype, cpu_name, process_memory

FIRST_CALL_TIMEOUT = 1800.0  # seconds for each phase the first time, which may include compilation

T = TypeVar("T")


def no_heartbeat() -> None:
    """`Runtime.heartbeat` while no watchdog runs."""


@dataclass
class Runtime:
    """What this process runs on: its rank, device and precision, and the collectives of the run.

    Attributes:
        dtype: the dtype of the matrix products; parameters stay float32.
        tp_size: the number of adjacent ranks that share each matrix and read the same data.
        launch_id: of several processes, and under torchrun; a restart has another. See `agree_on_launch_id`.
        first_launch_id: the id of the launch that torchrun's restarts replace.
        heartbeat: called wherever a phase makes progress; set by `Watchdog`.
        clock: seconds, not counting those that this process was stopped.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    tf32: bool
    compile: bool
    tp_size: int = 1
    launch_id: str | None = None
    first_launch_id: str | None = None
    heartbeat: Callable[[], None] = no_heartbeat
    clock: RunningClock = field(default_factory=RunningClock)

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """Which of a step's `dp_size` groups of micro-batches this process computes."""
        return self.rank // self.tp_size

    @property
    def dp_size(self) -> int:
        return self.world_size // self.tp_size

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Mixed precision for the forward pass."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def all_reduce_sum(self, *values: float) -> list[float]:
        """The sum of each value over all ranks, computed in float64."""
        if self.world_size == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def all_gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of rank 0, of rank 1, …, in float64; all ranks pass equally many."""
        if self.world_size == 1:
            return [list(map(float, values))]
        rows = [torch.zeros(len(values), dtype=torch.float64) for _ in range(self.world_size)]
        dist.all_gather(rows, torch.tensor(values, dtype=torch.float64))
        return [row.tolist() for row in rows]

    def all_gather_object(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """The value of rank 0, of rank 1, ….

        Args:
            value: can be pickled.
            group: a gloo process group of all ranks; default: that of the run.
        """
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group)
        return values

    def on_rank_zero(self, function: Callable[[], T]) -> T:
        """Run `function()` on rank zero; returns its result on all ranks.

        Raises:
            UserError, OSError: on all ranks, if `function` raised it. Any other error is raised on rank zero only.
        """
        outcome: dict[str, Any] = {}
        if self.is_rank_zero:
            try:
                outcome = {"result": function()}
            except (UserError, OSError) as error:
                if self.world_size == 1:
                    raise
                outcome = {"error": str(error), "exit_code": getattr(error, "exit_code", None)}
        outcome = self.all_gather_object(outcome)[0]
        if "error" in outcome:
            if outcome["exit_code"] is None:
                raise OSError(outcome["error"])
            user_error = UserError(outcome["error"])
            user_error.exit_code = outcome["exit_code"]
            raise user_error
        return outcome["result"]

    def name(self) -> str:
        """The name of the device."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return cpu_name() if self.device.type == "cpu" else "Apple GPU"

    def memory(self) -> dict[str, int | None]:
        """{allocated, peak, reserved} in bytes: of the GPU's allocator; on a CPU, of this process."""
        if self.device.type == "cuda":
            return {"allocated": torch.cuda.memory_allocated(self.device),
                    "peak": torch.cuda.max_memory_allocated(self.device),
                    "reserved": torch.cuda.memory_reserved(self.device)}
        if self.device.type == "mps":
            return {"allocated": torch.mps.current_allocated_memory(), "peak": None,
                    "reserved": torch.mps.driver_allocated_memory()}
        return process_memory()


# ---------------------------------------------------------------- joining


def init(config: Any) -> Runtime:
    """Choose device and precision, and join the other processes if torchrun started this one."""
    rank, local_rank, world_size = rendezvous.read_ranks()
    device = choose_device(config.device, local_rank)
    dtype = choose_dtype(config.dtype, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    if not config.eval_only:
        config.model.check_trainable_on(device.type)
    runtime = Runtime(rank, local_rank, world_size, device, dtype, tf32=config.tf32 and device.type == "cuda",
                      compile=choose_compile(config, device), tp_size=config.tensor_parallel)
    init_process_group(runtime, config)
    return runtime


def choose_compile(config: Any, device: torch.device) -> bool:
    """Whether the model is compiled: by default on CUDA, except under tensor parallelism."""
    compiled = config.compile
    if compiled is None:
        compiled = device.type == "cuda" and config.tensor_parallel == 1
    compilers = (os.environ.get("CXX"), "g++", "clang++", "gcc", "cl")
    if compiled and not any(shutil.which(compiler) for compiler in compilers if compiler):
        raise ConfigError("compile", "torch.compile needs a C++ compiler, and none is on the PATH (--compile=False)")
    return compiled


def init_process_group(runtime: Runtime, config: Any) -> None:
    """Start torch.distributed where the run needs it, and set the launch ids of `runtime`.

    Raises:
        PeerLostError: the processes did not meet in time.
    """
    rank, world_size = runtime.rank, runtime.world_size
    on_cuda = runtime.device.type == "cuda"
    needs_group = world_size > 1 or config.use_fsdp or config.use_zero1
    with rendezvous.Deadline(rank, config.join_timeout).watch() as deadline:
        store: dist.Store = dist.HashStore()
        if world_size > 1 or rendezvous.has_agent_store():
            agent_store = rendezvous.open_store(deadline, rank)
            runtime.launch_id, runtime.first_launch_id = rendezvous.agree_on_launch_id(agent_store, rank, world_size,
                                                                                       deadline)
            store = dist.PrefixStore(runtime.launch_id, agent_store)
        if needs_group:
            deadline.wait_for(*rendezvous.no_connection(world_size))
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=rendezvous.NEVER, store=store,
                                    rank=rank, world_size=world_size, device_id=runtime.device if on_cuda else None)


# ---------------------------------------------------------------- all ranks


def check_same_config(config: Any, runtime: Runtime) -> None:
    """Raise `UserError` on all ranks unless all have the same config."""
    configs = runtime.all_gather_object(config.flat())
    for rank, other in enumerate(configs):
        for key, value in configs[0].items():
            if other[key] != value:
                raise UserError(f"{key}: is {short_repr(other[key])} on rank {rank} and {short_repr(value)} on rank 0 "
                                "(start every node with the same command, files and run directory)")


def run_on_all_ranks(runtime: Runtime, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Run `work()` on every rank; returns the result of each rank, or raises on all ranks if it failed on any.

    Args:
        group: a gloo process group of all ranks, for calls from a background thread.

    Raises:
        OSError, UserError, CheckpointError: the error of the first rank that raised one of them. Any other error is
            raised unchanged on the rank where it happened, and as an OSError on the others.
    """
    own_error: Exception | None = None
    own_failure: tuple[str, str] | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as error:  # raising it here would leave the other ranks waiting
        own_error, own_failure = error, (type(error).__name__, " ".join(str(error).split()) or type(error).__name__)
    outcomes = runtime.all_gather_object((own_failure, result), group)
    if own_error is not None and (runtime.world_size == 1 or not isinstance(own_error, (OSError, UserError))):
        raise own_error
    failed = [(rank, failure) for rank, (failure, _) in enumerate(outcomes) if failure]
    if failed:
        rank, (error_name, message) = failed[0]
        if error_name in ("CheckpointError", "UserError"):
            raise {"CheckpointError": CheckpointError, "UserError": UserError}[error_name](message)
        others = ", ".join(str(r) for r, _ in failed[1:8]) + ", …" * (len(failed) > 8)
        raise OSError(f"rank {rank}: {message}" + (f" (also on rank {others})" if others else ""))
    return [value for _, value in outcomes]


# ---------------------------------------------------------------- the exit


def wait_for_all() -> None:
    """Wait until every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        gc.collect()  # a model or optimizer that outlives the group can abort the interpreter at its exit
        dist.destroy_process_group()


def exit_process(code: int) -> None:
    """End this process; in a process group without destructors, which would wait for lost ranks."""
    if not dist.is_initialized():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
