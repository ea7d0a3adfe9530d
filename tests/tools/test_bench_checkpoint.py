"""tools.bench_checkpoint: every operation is measured on a small model, and nothing is left on the disk."""

import re

import pytest
import torch

from blockgpt.errors import UserError
from configurator import load_config
from tools import bench_checkpoint

SMALL = ["config/size_tiny.py", "--n_layer=1", "--n_embd=32"]


def test_every_operation_has_its_seconds_per_gigabyte(tmp_path, capsys):
    bench_checkpoint.main([*SMALL, f"--folder={tmp_path}", "--repeat=1"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"0\.0\d GB; seconds per GB, minimum and maximum of 1:", head)
    assert [line.split(":")[0].strip() for line in lines] == [
        "save", "verify", "load, verified before", "checkpoint_async blocks training", "torch.save and fsync"]
    for line in lines:
        low, high = map(float, re.findall(r"\d+\.\d+", line))
        assert 0 <= low <= high
    assert not list(tmp_path.iterdir())


def test_the_optimizer_has_the_state_of_every_parameter():
    model, optimizer = bench_checkpoint.model_and_optimizer(load_config([*SMALL, "--device=cpu"]))
    for p in model.parameters():
        state = optimizer.state[p]
        assert state["exp_avg"].shape == p.shape and torch.all(state["exp_avg_sq"] >= 0)


def test_an_unknown_key_is_named_in_the_error():
    with pytest.raises(UserError, match=r"^--n_layers: no such key"):
        bench_checkpoint.main(["--n_layers=1"])
