"""The machine under a run: processes, device, precision, compilation. Under torchrun: DDP."""

import contextlib
import datetime
import gc
import json
import os
import random
import shutil
import sys
import time
import typing
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from blockgpt.errors import ConfigError, PeerLostError, UserError, shown
from blockgpt.training.recompute import recompute
from configurator import begun
from model_config import ATTENTION_BACKEND

START_LIMIT = 1800.0  # seconds for what is done for the first time, compilation included, and for joining


@dataclass
class Machine:
    """What this process computes on. `dtype` is that of the matrix products; weights stay float32."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    tf32: bool
    compile: bool
    tensor_parallel: int = 1  # neighbouring ranks that share each matrix, and read the same data
    launch: str | None = None  # under torchrun: the name of this launch, and …
    first_launch: str | None = None  # … of the one that its restarts take the place of: see `this_launch`
    beat: typing.Callable = bool  # called wherever work goes on, for `Watch` to see

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def data_rank(self):
        """Which share of a step's micro-batches this process takes …"""
        return self.rank // self.tensor_parallel

    @property
    def data_size(self):
        """… of how many."""
        return self.world_size // self.tensor_parallel

    def autocast(self):
        """Mixed precision around the forward pass."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def sum(self, *values):
        """The sums of `values` (numbers) over all processes, in float64, as a list."""
        if self.world_size == 1:
            return [float(v) for v in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def exchange(self, value, group=None):
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

    def gather(self, row):
        """[`row` (numbers) of rank 0, of rank 1, …] on every process, in float64."""
        if self.world_size == 1:
            return [list(map(float, row))]
        rows = [torch.zeros(len(row), dtype=torch.float64) for _ in range(self.world_size)]
        dist.all_gather(rows, torch.tensor(row, dtype=torch.float64))
        return [r.tolist() for r in rows]

    def on_main(self, function):
        """What `function()` returns on the main process (what JSON can say), or the error that it raises, on all.

        Errors: `UserError` and OSError; any other is the main process's alone.
        """
        outcome = {}
        if self.is_main:
            try:
                outcome = {"result": function()}
            except (UserError, OSError) as error:
                if self.world_size == 1:
                    raise
                outcome = {"error": str(error), "exit_code": getattr(error, "exit_code", None)}
        outcome = self.exchange(outcome)[0]
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
    """Join the other processes if torchrun started us, choose the device, set the precision: a `Machine`."""
    rank, local_rank, world_size = (int(os.environ.get(k, d)) for k, d in
                                    (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")))
    device = choose_device(config.device, local_rank)
    dtype = choose_dtype(config.dtype, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    if not config.eval_only:
        check_trainable(config.model, device.type)
    compile = device.type == "cuda" and config.tensor_parallel == 1 if config.compile is None else config.compile
    if compile and not any(shutil.which(c) for c in (os.environ.get("CXX"), "g++", "clang++", "gcc", "cl") if c):
        raise ConfigError("compile", "torch.compile needs a C++ compiler and none is on the PATH (--compile=False)")
    missing = [k for k in ("RANK", "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
    if missing and world_size > 1:
        raise UserError(f"WORLD_SIZE={world_size} without {', '.join(missing)}: several processes are started by "
                        "torchrun --nproc_per_node=N train.py …")
    limit = datetime.timedelta(seconds=2 * max(START_LIMIT, config.save_timeout))
    store, names = dist.HashStore() if missing else None, ()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not missing:
        store = launchers_store(timeout=limit)
        names = this_launch(store, rank, world_size, limit)
        store = dist.PrefixStore(names[0], store)
    if world_size > 1 or config.use_fsdp or config.use_zero1:
        # gloo beside nccl: what processes tell each other about the run never waits for a GPU.
        # The limit is there for what Watch cannot see; Watch's own are shorter.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                device_id=device if device.type == "cuda" else None, timeout=limit,
                                **({"store": store, "rank": rank, "world_size": world_size} if store else {}))
    return Machine(rank, local_rank, world_size, device, dtype, config.tf32 and device.type == "cuda", compile,
                   config.tensor_parallel, *names)


def launchers_store(**options):
    """A new connection to the store of the rendezvous."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                         wait_for_workers=False, **options)


def this_launch(store, rank, world_size, limit):
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


def begun_before(config, machine):
    """The name of the run that these processes are to go on with, in place of others that torchrun has lost; or None.

    It is the one that an earlier launch began: a directory that was refused as another run's stays refused.
    """
    def find():
        runs = [Path(config.out_dir, config.run_name)] if config.run_name else sorted(Path(config.out_dir).glob("*"))
        for run in reversed(runs):
            try:
                if json.loads((run / "run.json").read_bytes())["launch"] == machine.first_launch:
                    return run.name
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                continue
        return config.run_name if config.run_name and not begun(runs[0]) else None

    # Not by torchrun's own count of restarts: each node has another.
    return machine.on_main(find) if machine.launch != machine.first_launch else None


def check_alike(config, machine):
    """`UserError`, on all processes, unless they were all asked for the same."""
    asked = machine.exchange(config.flat())
    for rank, other in enumerate(asked):
        for key, value in asked[0].items():
            if other[key] != value:
                raise UserError(f"{key}: is {shown(other[key])} on rank {rank} and {shown(value)} on rank 0 (start "
                                "every node with the same command, files and run directory)")


def shut_down():
    """Leave the group together. A model or optimizer that outlives it can abort the interpreter at its end."""
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def leave(code):
    """End this process. With peers at once: destructors would wait for those that are lost."""
    if not dist.is_initialized():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def choose_device(name, local_rank):
    """The torch.device that `name` means here; `ConfigError` where it is not to be had."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError("device", f"{name!r} is unknown (one of auto, cpu, cuda, cuda:1, mps)")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("device", f"{name!r}: torch sees no CUDA device here (--device=cpu)")
        processes, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if processes > 1 and device.index is not None:
            raise ConfigError("device", f"{name!r} is one GPU for {processes} processes (--device=cuda: one for each)")
        if processes > count:  # told by every process, not by those alone that find none
            raise ConfigError("device", f"{name!r}: {processes} processes need as many GPUs, here are {count} "
                                        f"(torchrun --nproc_per_node={count})")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= count:
            raise ConfigError("device", f"{name!r} is not among the CUDA devices here, 0 to {count - 1}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device", "'mps': torch sees no Apple GPU here (--device=cpu)")
    return device


def check_trainable(model, device_type):
    """`ConfigError` if the attention backend of the `ModelConfig` has no backward pass on such a device."""
    trains_on = model.options()["attention_backend"].trains_on
    if trains_on and device_type not in trains_on:
        able = [name for name in model.able_backends() if not ATTENTION_BACKEND[name].trains_on]
        raise ConfigError("attention_backend", f"{model.attention_backend!r} has no backward pass on {device_type}: it "
                          f"trains on {' or '.join(trains_on)} ({' or '.join(able)} can here)")


def choose_dtype(name, device):
    """The torch.dtype of the matrix products that `name` means on `device`."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise ConfigError("dtype", "'bfloat16': this GPU has none (--dtype=float16)")
    if name == "float16" and device.type != "cuda":
        raise ConfigError("dtype", f"'float16' trains on CUDA alone, this is {device.type} (--dtype=bfloat16)")
    return getattr(torch, name)


def home(config, machine):
    """The device on which the weights lie."""
    return torch.device("cpu") if config.use_fsdp and config.fsdp_cpu_offload else machine.device


def distribute(model, config, machine):
    """Prepare a model on the meta device for `machine`, before it gets storage: each process then holds its part alone.

    Activation checkpointing, tensor parallelism, FSDP; what is left (compilation, DDP) is `wrap`'s.
    """
    recompute(model, config.activation_checkpointing)
    if config.use_fsdp or machine.tensor_parallel > 1:
        from blockgpt.training.sharding import part  # a second to import, which no other run pays for

        part(model, config, machine)


def wrap(model, config, machine):
    """The module to call: compiled, and under several processes DDP, unless `distribute` has done it all.

    Weights are read from the plain one.
    """
    if config.use_fsdp or machine.tensor_parallel > 1:
        return model
    wrapped = torch.compile(model) if machine.compile else model
    if machine.world_size > 1:
        ids = [machine.device.index] if machine.device.type == "cuda" else None
        wrapped = DistributedDataParallel(wrapped, device_ids=ids, gradient_as_bucket_view=True)  # else held twice
    return wrapped


@contextlib.contextmanager
def synchronise_gradients(wrapped, now):
    """A context in which the backward pass averages gradients over the processes only if `now`."""
    if hasattr(wrapped, "set_requires_gradient_sync"):  # FSDP
        wrapped.set_requires_gradient_sync(now)
    with contextlib.nullcontext() if now or not hasattr(wrapped, "no_sync") else wrapped.no_sync():
        yield


def mode(config, machine):
    """How the processes share the work, in words."""
    if not dist.is_initialized():
        return "single"
    parts = ["FSDP" if config.use_fsdp else "ZeRO-1" if config.use_zero1 else "DDP" if machine.data_size > 1 else ""]
    if machine.tensor_parallel > 1:
        parts.append(f"TP{machine.tensor_parallel}")
    return " × ".join(p for p in parts if p) or "single"


def seed_micro_batch(seed, step, number):
    """Seed dropout as a function of (seed, step, the micro-batch's number in the step): no generator to save.

    The number counts over all processes, so that another number of them draws the same.
    """
    torch.manual_seed(random.Random(f"{seed} {step} {number}").getrandbits(63))


def cpu_name():
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()


def process_memory():
    """{allocated, peak, reserved}: resident bytes of this process now and at their most."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        with open("/proc/self/statm") as f:
            now = int(f.read().split()[1]) * resource.getpagesize()
    except OSError:
        now = None
    return {"allocated": now, "peak": max(peak, now or 0), "reserved": None}  # the kernel counts the two apart
