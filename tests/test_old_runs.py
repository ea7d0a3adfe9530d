"""Runs that an older version of the program wrote are verified, compared, sampled and resumed with the same losses.

tests/fixtures/runs were trained for 8 steps when the keys fsdp_replicas, keep_checkpoints, peer_timeout and init_from
had these names. expected.json has what that version logged when it continued them to step 12 in their own mode:
{step: [loss, grad_norm]} and val_loss.
"""

import csv
import io
import json
import shutil
import socket
from pathlib import Path

import pytest
from conftest import environment, records
from forked import SERVER, exec_train

import compare_architectures
import sample
from blockgpt.data.tokenizer import ByteTokenizer
from tools import verify_checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
RUNS = {"gpt2-single": [], "llama-fsdp": ["--use_fsdp=True"], "gemma3-zero1": ["--use_zero1=True"]}  # their modes


@pytest.fixture
def old_run(tmp_path, request):
    """The directory of a copy of the run `request.param`."""
    return shutil.copytree(FIXTURES / "runs" / request.param, tmp_path / "runs" / request.param)


every_old_run = pytest.mark.parametrize("old_run", RUNS, indirect=True)


@every_old_run
def test_an_old_run_verifies(old_run, capsys):
    verify_checkpoint.main([str(old_run)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("ok ") for line in lines)  # its checkpoint and its export


def test_old_runs_are_compared(capsys):
    compare_architectures.main(["--out_dir", str(FIXTURES / "runs"), "--format=csv"])
    out, err = capsys.readouterr()
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(out))}
    assert rows.keys() == RUNS.keys()
    assert err.startswith("warning: gemma3-zero1: not ranked, it was evaluated on other validation data")
    assert len(err.splitlines()) == 1 and [row["rank"] for row in rows.values()] == ["1", "2", ""]
    for name, row in rows.items():
        run = json.loads((FIXTURES / "runs" / name / "run.json").read_text())
        losses = [record["val_loss"] for record in records(FIXTURES / "runs" / name, "eval").values()]
        assert (row["architecture"], int(row["parameters"])) == (run["arch_name"], run["parameters"]["total"])
        assert row["status"] == "finished" and float(row["val_loss"]) == min(losses)


@every_old_run
def test_an_old_run_is_sampled(old_run, capsys):
    sample.main([f"--run={old_run}", "--prompt=a", "--max_new_tokens=5", "--device=cpu"])
    out, err = capsys.readouterr()
    assert out.startswith("a") and err == "", err
    assert len(ByteTokenizer().encode(out)) >= 5


def resume(run_dir, world_size, *flags):
    """Train the run from step 8 to step 12; (stdout of rank zero, {step: [loss, grad_norm]} and val_loss)."""
    argv = ["--resume=must", f"--run_name={run_dir.name}", "--max_iters=12", f"--data_dir={FIXTURES / 'data'}", *flags]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    cwd, processes = run_dir.parents[1], []
    for rank in range(world_size):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost",
                 "LOCAL_WORLD_SIZE": str(world_size), "MASTER_PORT": port} if world_size > 1 else {}
        arguments = (argv, str(cwd), environment(**ranks), str(cwd / f"rank{rank}"))
        processes.append(SERVER.Process(target=exec_train, args=arguments))
        processes[-1].start()
    for process in processes:
        process.join(240)
        if process.exitcode is None:
            process.kill()
    errors = "".join((cwd / f"rank{rank}.err").read_text() for rank in range(world_size))
    assert [process.exitcode for process in processes] == [0] * world_size, errors
    logged = {str(step): [record["loss"], record["grad_norm"]] for step, record in records(run_dir).items() if step > 8}
    logged["val_loss"] = records(run_dir, "eval")[12]["val_loss"]
    return (cwd / "rank0.out").read_text(), logged


def check_losses(logged, expected, rel):
    assert logged.keys() == expected.keys()
    for key, values in expected.items():
        assert logged[key] == pytest.approx(values, rel=rel), key


@pytest.mark.slow
@every_old_run
def test_an_old_run_resumes_with_the_same_losses(old_run):
    flags = RUNS[old_run.name]
    out, logged = resume(old_run, 2 if flags else 1, *flags)
    assert "resumed from " in out and " at step 8" in out
    check_losses(logged, json.loads((old_run / "expected.json").read_text()), rel=1e-6)  # last bits differ among CPUs
    verify_checkpoint.main([str(old_run)])


@pytest.mark.slow
@pytest.mark.parametrize("old_run, world_size, flags", [
    ("llama-fsdp", 1, ["--use_fsdp=False"]),
    pytest.param("gpt2-single", 2, ["--use_fsdp=True"], marks=pytest.mark.long),
    pytest.param("gemma3-zero1", 2, ["--use_zero1=False", "--use_fsdp=True"], marks=pytest.mark.long),
], indirect=["old_run"], ids=lambda value: None if isinstance(value, list) else str(value))
def test_an_old_run_resumes_in_another_mode(old_run, world_size, flags):
    _, logged = resume(old_run, world_size, *flags)
    check_losses(logged, json.loads((old_run / "expected.json").read_text()), rel=2e-6)  # sums in another order
