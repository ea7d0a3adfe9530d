"""The processes of a run: joining torchrun's, what they tell each other, leaving."""

import contextlib
import datetime
import gc
import json
import os
import shutil
import sys
import time
import typing
import uuid
from dataclasses import dataclass

import torch
import torch.distributed as dist

from blockgpt.errors import CheckpointError, ConfigError, PeerLostError, UserError, short_repr
from blockgpt.training.device import choose_device, choose_dtype, cpu_name, process_memory

FIRST_CALL_TIMEOUT = 1800.0  # seconds for what is done for the first time, compilation included, and for joining


@dataclass
class Runtime:
    """What this process computes on. `dtype` is that of the matrix products; weights stay float32."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    tf32: bool
    compile: bool
    tp_size: int = 1  # neighbouring ranks that share each matrix, and read the same data
    launch_id: str | None = None  # under torchrun: the name of this launch, and …
    first_launch_id: str | None = None  # … of the one that its restarts take the place of: see `agree_on_launch_id`
    heartbeat: typing.Callable = bool  # called wherever work goes on, for `Watchdog` to see

    @property
    def is_rank_zero(self):
        return self.rank == 0

    @property
    def dp_rank(self):
        """Which share of a step's micro-batches this process takes …"""
        return self.rank // self.tp_size

    @property
    def dp_size(self):
        """… of how many."""
        return self.world_size // self.tp_size

    def autocast(self):
        """Mixed precision around the forward pass."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def all_reduce_sum(self, *values):
        """The sums of `values` (numbers) over all processes, in float64, as a list."""
        if self.world_size == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def all_gather_object(self, value, group=None):
        """[the `value` of rank 0, of rank 1, …] on every process; a value is what JSON can say.

        group: a process group for tensors on the CPU; without one, that of the run.
        """
        if self.world_size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=group)
        longest = max(map(int, sizes))
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(texts, torch.nn.functional.pad(own, (0, longest - len(own))), group=group)
        return [json.loads(text[:size].numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)]

    def all_gather(self, row):
        """[`row` (numbers) of rank 0, of rank 1, …] on every process, in float64."""
        if self.world_size == 1:
            return [list(map(float, row))]
        rows = [torch.zeros(len(row), dtype=torch.float64) for _ in range(self.world_size)]
        dist.all_gather(rows, torch.tensor(row, dtype=torch.float64))
        return [r.tolist() for r in rows]

    def on_rank_zero(self, function):
        """What `function()` returns on the main process (what JSON can say), or the error that it raises, on all.

        Errors: `UserError` and OSError; any other is the main process's alone.
        """
        outcome = {}
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
            error = UserError(outcome["error"])
            error.exit_code = outcome["exit_code"]
            raise error
        return outcome["result"]

    def name(self):
        """The device, in words."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{cpu_name()}, {torch.get_num_threads()} threads" if self.device.type == "cpu" else "Apple GPU"

    def memory(self):
        """{allocated, peak, reserved} in bytes: of the GPU's allocator, or of this process on a CPU."""
        if self.device.type == "cuda":
            return {"allocated": torch.cuda.memory_allocated(self.device),
                    "peak": torch.cuda.max_memory_allocated(self.device),
                    "reserved": torch.cuda.memory_reserved(self.device)}
        if self.device.type == "mps":
            allocated = torch.mps.current_allocated_memory()
            return {"allocated": allocated, "peak": None, "reserved": torch.mps.driver_allocated_memory()}
        return process_memory()


def init(config):
    """Join the other processes if torchrun started us, choose the device, set the precision: a `Runtime`."""
    rank, local_rank, world_size = (int(os.environ.get(k, d)) for k, d in
                                    (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")))
    device = choose_device(config.device, local_rank)
    dtype = choose_dtype(config.dtype, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    if not config.eval_only:
        config.model.check_trainable_on(device.type)
    compile = device.type == "cuda" and config.tensor_parallel == 1 if config.compile is None else config.compile
    if compile and not any(shutil.which(c) for c in (os.environ.get("CXX"), "g++", "clang++", "gcc", "cl") if c):
        raise ConfigError("compile", "torch.compile needs a C++ compiler and none is on the PATH (--compile=False)")
    missing = [k for k in ("RANK", "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
    if missing and world_size > 1:
        raise UserError(f"WORLD_SIZE={world_size} without {', '.join(missing)}: several processes are started by "
                        "torchrun --nproc_per_node=N train.py …")
    limit = datetime.timedelta(seconds=2 * max(FIRST_CALL_TIMEOUT, config.save_timeout))
    store, names = dist.HashStore() if missing else None, ()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not missing:
        store = connect_store(timeout=limit)
        names = agree_on_launch_id(store, rank, world_size, limit)
        store = dist.PrefixStore(names[0], store)
    if world_size > 1 or config.use_fsdp or config.use_zero1:
        # gloo beside nccl: what processes tell each other about the run never waits for a GPU.
        # The limit is there for what Watch cannot see; Watch's own are shorter.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                device_id=device if device.type == "cuda" else None, timeout=limit,
                                **({"store": store, "rank": rank, "world_size": world_size} if store else {}))
    return Runtime(rank, local_rank, world_size, device, dtype, config.tf32 and device.type == "cuda", compile,
                   config.tensor_parallel, *names)


def connect_store(**options):
    """A new connection to the store of the rendezvous."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                         wait_for_workers=False, **options)


def agree_on_launch_id(store, rank, world_size, limit):
    """(a name that the processes of this launch share and those of no other, that of the first in this `store`).

    torchrun keeps one store over its restarts, and torch its keys there without saying of which: a process would meet
    the address of one that was killed. Here each draws a name; rank 0 answers whoever shows up with its own, until all
    have answered back: those of an earlier launch, which are dead, never do. limit: a timedelta; `PeerLostError` when
    it is over.
    """
    own, until = uuid.uuid4().hex, time.monotonic() + limit.total_seconds()
    if rank:
        store.set(f"here/{rank}", own)
        try:
            store.wait([f"launch/{own}"], limit)
        except dist.DistStoreError:
            raise PeerLostError(f"rank {rank}: no sign of rank 0 in {limit.total_seconds():.0f} s") from None
        launch = store.get(f"launch/{own}").decode()
        store.set(f"joined/{launch}/{rank}", "")
        return launch, store.get("first").decode()
    first = store.compare_set("first", "", own).decode()
    absent = set(range(1, world_size))
    while absent:
        if time.monotonic() > until:
            raise PeerLostError(f"rank 0: no sign of rank {min(absent)} in {limit.total_seconds():.0f} s"
                                + (f", nor of {len(absent) - 1} more" if len(absent) > 1 else ""))
        for peer in sorted(absent):
            if store.check([f"joined/{own}/{peer}"]):
                absent.remove(peer)
            elif store.check([f"here/{peer}"]):
                store.set(f"launch/{store.get(f'here/{peer}').decode()}", own)
        time.sleep(0.01)
    return own, first


def check_same_config(config, runtime):
    """`UserError`, on all processes, unless they were all asked for the same."""
    asked = runtime.all_gather_object(config.flat())
    for rank, other in enumerate(asked):
        for key, value in asked[0].items():
            if other[key] != value:
                raise UserError(f"{key}: is {short_repr(other[key])} on rank {rank} and {short_repr(value)} on rank 0 (start "
                                "every node with the same command, files and run directory)")


def shutdown():
    """Leave the group together. A model or optimizer that outlives it can abort the interpreter at its end."""
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def exit_process(code):
    """End this process. With peers at once: destructors would wait for those that are lost."""
    if not dist.is_initialized():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def run_on_all_ranks(runtime, work, group=None):
    """Run `work()` on every rank at once: [what each returned]; if it failed on any, an error on all alike.

    An OSError, `CheckpointError` or `UserError` is that of the first rank that met one; any other error stays what it
    is where it happened. `work` returns what JSON can say.
    """
    own = told = result = None
    try:
        result = work()
    except Exception as error:  # a rank that left now would let the others wait
        own = error
        told = [type(error).__name__, " ".join(str(error).split()) or type(error).__name__]
    answers = runtime.all_gather_object([told, result], group)
    failed = [(rank, problem) for rank, (problem, _) in enumerate(answers) if problem]
    if own is not None and (runtime.world_size == 1 or not isinstance(own, (OSError, UserError))):
        raise own
    if failed:
        rank, (kind, text) = failed[0]
        if kind in ("CheckpointError", "UserError"):
            raise {"CheckpointError": CheckpointError, "UserError": UserError}[kind](text)
        others = ", ".join(str(r) for r, _ in failed[1:8]) + ", …" * (len(failed) > 8)
        raise OSError(f"rank {rank}: {text}" + (f" (so on rank {others})" if others else ""))
    return [value for _, value in answers]
