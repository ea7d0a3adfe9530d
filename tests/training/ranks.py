"""Several ranks, without torchrun, in processes forked from one that has torch loaded."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import environment
from forked import SERVER, exec_train


def rank_variables(world_size: int) -> list[dict[str, str]]:
    """The variables that torchrun would set, by rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
             "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            for rank in range(world_size)]


def start_train(world_size: int, argv: list[str], cwd: Path) -> list[Any]:
    """Start `train.py *argv` on every rank; its output goes to rank<N>.out and rank<N>.err in `cwd`.

    Returns:
        The multiprocessing processes, by rank. Kill those that do not end.
    """
    processes = [SERVER.Process(target=exec_train, args=(argv, str(cwd), environment(**variables), f"{cwd}/rank{rank}"))
                 for rank, variables in enumerate(rank_variables(world_size))]
    for process in processes:
        process.start()
    return processes


def run_ranks(world_size: int, function: Callable, *args: Any, timeout: float = 240) -> None:
    """Run `function(*args)` on every rank; if it raises on one, this raises.

    Args:
        function: defined in a module, which the processes import.
    """
    results = SERVER.SimpleQueue()
    processes = [SERVER.Process(target=run_function, args=(results, variables, sys.path, function, args))
                 for variables in rank_variables(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    unfinished = [process for process in processes if process.exitcode is None]
    for process in unfinished:
        process.kill()
        process.join()
    errors = dict.fromkeys(range(world_size), "no result")
    while not results.empty():
        rank, error = results.get()
        errors[rank] = error
    assert not unfinished and not any(errors.values()), "\n".join(
        f"rank {rank}: {error}" for rank, error in errors.items())


def run_function(results: Any, variables: dict[str, str], path: list[str], function: Callable, args: tuple) -> None:
    """In the process of a rank: run the function, put (rank, traceback or None) into `results`."""
    os.environ.update(variables, OMP_NUM_THREADS="1")
    sys.path[:] = path
    error = None
    try:
        function(*args)
    except BaseException:
        error = traceback.format_exc()[-4000:]
    results.put((int(variables["RANK"]), error))
