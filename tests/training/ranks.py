"""Functions on several ranks, in processes forked from one that has torch loaded."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from forked import SERVER


def on_rank(results: Any, rank: int, env: dict[str, str], path: list[str], function: Callable, args: tuple) -> None:
    """Put (rank, traceback or None) into `results`."""
    os.environ.update(env)
    sys.path[:] = path
    failure = None
    try:
        function(*args)
    except BaseException:
        failure = traceback.format_exc()[-4000:]
    results.put((rank, failure))


def run_ranks(world_size: int, function: Callable, *args: Any, timeout: float = 240) -> None:
    """Run `function(*args)` on `world_size` ranks, as torchrun sets their variables; an error of one is one here.

    function: of a module, as the processes import it.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    results = SERVER.SimpleQueue()
    processes = []
    for rank in range(world_size):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size,
               "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        processes.append(SERVER.Process(target=on_rank, args=(
            results, rank, {k: str(v) for k, v in env.items()}, sys.path, function, args)))
        processes[-1].start()
    for process in processes:
        process.join(timeout)
    alive = [process for process in processes if process.exitcode is None]
    for process in alive:
        process.kill()
        process.join()
    failures = {}
    while not results.empty():
        rank, failure = results.get()
        failures[rank] = failure
    assert not alive and failures == dict.fromkeys(range(world_size)), "\n".join(
        f"rank {rank}: {failures.get(rank, 'no result')}" for rank in range(world_size))
