"""The model wing's commands: what they print is what the model says."""

import re

import pytest

from blockgpt.errors import UserError
from model_builder import build_model
from model_config import AXES, ModelConfig
from tools import bench_generate, list_components

SMALL = ["--n_layer=2", "--n_embd=32", "--n_head=2", "--block_size=16", "--vocab_size=64", "--device=cpu"]


def test_the_list_has_every_option_with_its_parameters(capsys):
    list_components.main([*SMALL, "--steps=0"])
    out = capsys.readouterr().out
    base = dict(n_layer=2, n_embd=32, n_head=2, block_size=16, vocab_size=64)
    usual = build_model(ModelConfig(**base)).parameter_counts()["total"]
    for axis, table in AXES.items():
        for name, option in table.items():
            row = re.search(rf"^{axis} +{name} .*{re.escape(option.help)}$", out, re.MULTILINE)
            assert row, (axis, name)
            if axis not in ("rope_scaling", "activation") and "·" not in row[0]:
                own = build_model(ModelConfig(**base, **{axis: name})).parameter_counts()["total"]
                assert f" {own - usual:+,} " in row[0]


def test_an_option_is_timed_beside_its_baseline(capsys):
    list_components.main([*SMALL, "--steps=1", "--batch_size=1"])
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("attention_back")}
    assert re.search(r" \d+\.\d\d  softmax", rows["manual"])
    assert re.search(r" –  torch's flex", rows["flex"])  # it has no backward pass on a CPU


def test_what_cannot_be_timed_is_refused():
    with pytest.raises(UserError, match="--steps: -1 is out of range"):
        list_components.main(["--steps=-1"])
    with pytest.raises(UserError, match="is not a whole number"):
        bench_generate.main(["--new_tokens=many"])


def test_generation_is_timed_both_ways(capsys):
    bench_generate.main([*SMALL, "--new_tokens=3"])
    assert re.search(r"3 new tokens on cpu: .* s with the cache, .* s without", capsys.readouterr().out)
