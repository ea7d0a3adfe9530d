"""Processes that meet, and those that never do: one line with what was tried, exit code 6."""

import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from ranks import rank_variables

from blockgpt.errors import PeerLostError, UserError
from blockgpt.training import rendezvous
from blockgpt.training.rendezvous import Deadline, agree_on_launch_id, open_store, read_ranks

JOINS = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}


@pytest.fixture
def environment(monkeypatch):
    """environment(**variables): exactly these variables of a launch are set."""
    def set_only(**variables):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
    return set_only


@pytest.fixture
def listener():
    """A socket that listens, but is not torch's store."""
    with socket.create_server(("localhost", 0)) as server:
        yield server


def test_without_variables_there_is_one_process(environment):
    environment()
    assert read_ranks() == (0, 0, 1)


@pytest.mark.parametrize("variables, message", [
    ({"WORLD_SIZE": "2"}, r"^WORLD_SIZE=2 is set, but not RANK, MASTER_ADDR, MASTER_PORT \(.*torchrun"),
    ({**JOINS, "MASTER_PORT": ""}, "MASTER_PORT"),
    ({**JOINS, "MASTER_PORT": "http"}, "MASTER_PORT='http' is set, and is no number"),
    ({**JOINS, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
    ({**JOINS, "RANK": "-1"}, "RANK='-1'"), ({**JOINS, "RANK": "2", "MASTER_PORT": "9"}, "RANK=2 is not below"),
    ({**JOINS, "LOCAL_RANK": "x"}, "LOCAL_RANK='x'"), ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'")])
def test_impossible_variables_are_one_line(environment, variables, message):
    environment(**variables)
    with pytest.raises(UserError, match=message):
        read_ranks()


def join_error(rank, seconds=0.3):
    """The message of the error of a rank that opens its store alone."""
    with pytest.raises(PeerLostError) as raised, Deadline(rank, seconds).watch() as deadline:
        open_store(deadline, rank)
    return str(raised.value)


def test_a_port_that_is_taken_is_named(environment, listener):
    environment(**JOINS, MASTER_PORT=listener.getsockname()[1])
    message = join_error(0)
    assert message.startswith(f"rank 0 on {socket.gethostname()}: port {listener.getsockname()[1]} cannot be opened")
    assert "ddress already in use" in message and "MASTER_PORT=another" in message


@pytest.mark.parametrize("address, problem", [
    ("localhost", "Connection refused"), ("no-such-host.invalid", "")])  # how a name fails depends on the system
def test_a_rank_zero_that_is_not_there_is_named_with_its_address_and_the_reason(environment, address, problem):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    environment(RANK=1, WORLD_SIZE=2, MASTER_ADDR=address, MASTER_PORT=port)
    message = join_error(1)
    assert f"no connection to rank 0 at {address}:{port} (MASTER_ADDR, MASTER_PORT): {problem}" in message
    assert " for 0 s " in message and "--join_timeout=SECONDS" in message


def test_a_call_of_torch_that_never_returns_ends_at_the_deadline(capsys, monkeypatch):
    monkeypatch.setattr(rendezvous, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(rendezvous, "NOTE_SECONDS", 0.0)
    left = []
    with Deadline(1, 0.01, left.append).watch() as deadline:
        deadline.wait_for("nobody came", "call them")
        while not left:
            time.sleep(0.01)
    assert left == [PeerLostError.exit_code]
    output = capsys.readouterr()
    assert output.out == f"rank 1 on {socket.gethostname()}: waiting: nobody came\n"
    assert output.err == (f"error: rank 1 on {socket.gethostname()}: nobody came for 0 s (call them; "
                          "--join_timeout=SECONDS waits longer)\n")


def test_the_interface_is_named_when_processes_do_not_reach_each_other(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert "GLOO_SOCKET_IFNAME=ib0" in rendezvous.no_connection(2)[0]
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    with pytest.raises(PeerLostError, match=r"(?s)all 2 processes are here.*boom.*GLOO_SOCKET_IFNAME"):  # noqa: SIM117
        with Deadline(0, 60).watch() as deadline:
            deadline.wait_for(*rendezvous.no_connection(2))
            raise RuntimeError("boom")


def test_errors_of_the_user_pass_through():
    with pytest.raises(UserError, match=r"^mine$"), Deadline(0, 60).watch():
        raise UserError("mine")


# ---- the ids of launches

def join_launch(store, ranks, world_size, seconds=60.0):
    """What `agree_on_launch_id` returns on each of `ranks`, or the message of its error; they join at random times."""
    def join(rank):
        time.sleep(random.random() / 20)
        try:
            return agree_on_launch_id(store, rank, world_size, Deadline(rank, seconds))
        except PeerLostError as error:
            return str(error).partition(": ")[2].partition(" (")[0]

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(join, ranks))


@pytest.mark.slow
def test_each_launch_has_its_own_id_in_a_store_that_outlives_it():
    store, launches = dist.HashStore(), []
    for world_size in (1, 4, 4, 2, 5):
        ids, *others = join_launch(store, range(world_size), world_size)
        assert others == [ids] * (world_size - 1)
        launches.append(ids)
        if world_size > 2:  # a launch that fails leaves its keys in the store
            assert join_launch(store, [0, 1], world_size, 0.3) == [
                "rank 2 did not join" + (f", nor did {world_size - 3} more" if world_size > 3 else "") + " for 0 s",
                f"fewer than {world_size} processes joined for 0 s"]
            assert set(join_launch(store, range(1, world_size), world_size, 0.3)) == {"rank 0 did not join for 0 s"}
    first_id = launches[0][0]
    assert len({launch_id for launch_id, _ in launches}) == 5 and {first for _, first in launches} == {first_id}


def test_the_variables_of_the_tests_are_those_of_a_launch(environment):
    for rank, variables in enumerate(rank_variables(2)):
        environment(**{name: value for name, value in variables.items() if name != "LOCAL_WORLD_SIZE"})
        assert read_ranks() == (rank, rank, 2)
