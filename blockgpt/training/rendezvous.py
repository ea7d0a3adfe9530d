"""How the processes of a run meet: through the store of torchrun's agent, or one in rank zero.

All of it has one deadline, the key `join_timeout`. What is waited for is said after NOTE_SECONDS, and by the error.
"""

import contextlib
import datetime
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch.distributed as dist

from blockgpt.console import echo
from blockgpt.errors import PeerLostError, UserError, error_text, first_line, report_error
from blockgpt.training.background import BackgroundThread
from blockgpt.training.clock import RunningClock
from blockgpt.training.device import is_out_of_memory

HEARTBEAT_SECONDS = 0.5
POLL_SECONDS = 0.02
NOTE_SECONDS = 10.0  # after which a process says what it waits for
GRACE_SECONDS = 1.0  # after the deadline, for a main thread that can raise the error itself
CONNECT_SECONDS = 5.0  # of one attempt to connect
NEVER = datetime.timedelta(days=30)  # torch's own timeouts: a stopped job may continue after a night


class Ranks(NamedTuple):
    """Which process this is."""

    rank: int
    local_rank: int
    world_size: int


def read_ranks() -> Ranks:
    """This process's ranks, from the variables that torchrun sets.

    Raises:
        UserError: they are incomplete, or no possible numbers.
    """
    environment = os.environ
    values = {}
    for variable, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_PORT", "0")):
        text = environment.get(variable, default)
        if not text.strip().isdecimal():
            raise UserError(f"{variable}={text!r} is set, and is no number (unset it, or start with torchrun)")
        values[variable] = int(text)
    rank, world_size = values["RANK"], values["WORLD_SIZE"]
    missing = [variable for variable in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(variable)]
    if missing and world_size > 1:
        raise UserError(f"WORLD_SIZE={world_size} is set, but not {', '.join(missing)} (start several processes with "
                        "torchrun --nproc_per_node=N train.py …)")
    if rank >= world_size:
        raise UserError(f"RANK={rank} is not below WORLD_SIZE={world_size} (ranks count from 0)")
    if values["MASTER_PORT"] > 65535:
        raise UserError(f"MASTER_PORT={values['MASTER_PORT']} is no port (at most 65535)")
    return Ranks(rank, values["LOCAL_RANK"], world_size)


class Deadline:
    """Ends this process with exit code 6 if the processes do not meet in time.

    A call of torch that waits for another process cannot be interrupted: a thread ends the process then.

    Args:
        exit_process: ends the process.
    """

    def __init__(self, rank: int, seconds: float, exit_process: Callable[[int], object] = os._exit) -> None:
        self.rank, self.seconds, self.exit_process = rank, seconds, exit_process
        self.waiting_for, self.advice = "nothing", ""
        self.clock, self.met = RunningClock(), threading.Event()

    def wait_for(self, what: str, advice: str) -> None:
        """Remember what the process waits for from now on, and what to do if it never comes."""
        self.waiting_for, self.advice = what, advice

    def poll(self) -> None:
        """A short sleep between two looks at something; raises `PeerLostError` once the time is over."""
        if self.clock.time() > self.seconds:
            raise self._error(f" for {self.seconds:.0f} s", "; --join_timeout=SECONDS waits longer")
        time.sleep(POLL_SECONDS)

    def _error(self, outcome: str, more_advice: str = "") -> PeerLostError:
        return PeerLostError(f"rank {self.rank} on {socket.gethostname()}: {self.waiting_for}{outcome} "
                             f"({self.advice}{more_advice})")

    @contextlib.contextmanager
    def watch(self) -> Iterator["Deadline"]:
        """For the block in which the processes meet; what torch raises in it becomes a `PeerLostError`."""
        thread = BackgroundThread(self._watch, "join deadline")
        try:
            yield self
        except (RuntimeError, OSError, ValueError) as error:
            if isinstance(error, UserError) or is_out_of_memory(error):
                raise
            raise self._error(f": {first_line(error)}") from None
        finally:
            self.met.set()
        thread.join()
        thread.check()

    def _watch(self) -> None:
        noted = False
        while not self.met.wait(HEARTBEAT_SECONDS):
            seconds = self.clock.time()
            if not noted and seconds > NOTE_SECONDS:
                noted = True
                echo(f"rank {self.rank} on {socket.gethostname()}: waiting: {self.waiting_for}")
            if seconds > self.seconds + GRACE_SECONDS:
                report_error(self._error(f" for {self.seconds:.0f} s", "; --join_timeout=SECONDS waits longer"))
                self.exit_process(PeerLostError.exit_code)
                return


def has_agent_store() -> bool:
    """Whether torchrun's agent has a store for its processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and "MASTER_ADDR" in os.environ


def no_connection(world_size: int) -> tuple[str, str]:
    """What `Deadline.wait_for` says while torch connects every process with every other."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    used = f"GLOO_SOCKET_IFNAME={interface}" if interface else f"the address of the name {socket.gethostname()}"
    return (f"all {world_size} processes are here, but cannot connect with each other over {used}",
            "GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME for GPUs: the interface between the hosts, see `ip address`")


def connect_store() -> dist.TCPStore:
    """A new connection to the store at MASTER_ADDR:MASTER_PORT."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=NEVER,
                         wait_for_workers=False)


def open_store(deadline: Deadline, rank: int) -> dist.Store:
    """The store of this launch: that of torchrun's agent, or else one that rank zero opens.

    Raises:
        PeerLostError: rank zero's port is taken.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0 and not has_agent_store():
        deadline.wait_for(f"port {port} cannot be opened (MASTER_ADDR={host}, MASTER_PORT={port})",
                          "another program may have taken it: MASTER_PORT=another one, on every process")
        # It listens on all interfaces; its own connection needs neither the network nor a name.
        return dist.TCPStore("localhost", port, is_master=True, timeout=NEVER, wait_for_workers=False)
    owner = "torchrun's agent" if has_agent_store() else "rank 0"
    where = f"{owner} at {host}:{port} (MASTER_ADDR, MASTER_PORT)"
    advice = "is rank 0 started, and is this its address?"
    deadline.wait_for(f"no connection to {where}", advice)
    while True:
        try:
            socket.create_connection((host, port), CONNECT_SECONDS).close()
            break
        except OSError as error:
            deadline.wait_for(f"no connection to {where}: {error_text(error)}", advice)
        deadline.poll()
    deadline.wait_for(f"{where} does not answer as torch's store", "another program may listen there")
    return connect_store()


def agree_on_launch_id(store: dist.Store, rank: int, world_size: int, deadline: Deadline) -> tuple[str, str]:
    """Agree on an id that all processes of this launch share, and those of no other launch.

    torchrun keeps one store over its restarts, and torch stores its keys without naming the launch: a process would
    read the address of one that was killed. So each process generates an id. Rank 0 sends its own id to every rank
    that it finds, until all have confirmed it; processes of an earlier launch are dead and never confirm.

    Returns:
        The id of this launch, and that of the first launch in this store.

    Raises:
        PeerLostError: a rank did not join in time.
    """
    own_id, advice = uuid.uuid4().hex, f"start {world_size} processes, RANK=0 to {world_size - 1}"
    if rank > 0:
        store.set(f"candidate/{rank}", own_id)
        deadline.wait_for("rank 0 did not join", advice)
        while not store.check([f"launch/{own_id}"]):
            deadline.poll()
        launch_id = store.get(f"launch/{own_id}").decode()
        store.set(f"joined/{launch_id}/{rank}", "")
        deadline.wait_for(f"fewer than {world_size} processes joined", advice)
        while not store.check([f"complete/{launch_id}"]):
            deadline.poll()
        return launch_id, store.get("first").decode()
    first_id = store.compare_set("first", "", own_id).decode()
    absent = set(range(1, world_size))
    while absent:
        deadline.wait_for(f"rank {min(absent)} did not join"
                          + (f", nor did {len(absent) - 1} more" if len(absent) > 1 else ""), advice)
        for peer in sorted(absent):
            if store.check([f"joined/{own_id}/{peer}"]):
                absent.remove(peer)
            elif store.check([f"candidate/{peer}"]):
                store.set(f"launch/{store.get(f'candidate/{peer}').decode()}", own_id)
        if absent:
            deadline.poll()
    store.set(f"complete/{own_id}", "")
    return own_id, first_id
