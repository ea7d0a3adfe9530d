"""tools.list_components: the table has every option, with the costs that the models have."""

import contextlib
import io
import re

import pytest

from blockgpt.errors import UserError
from model_builder import build_model
from model_config import AXES, ModelConfig
from tools import list_components

SIZE = dict(n_layer=2, n_embd=32, n_head=2, block_size=16, vocab_size=64)
FLAGS = [*(f"--{key}={value}" for key, value in SIZE.items()), "--device=cpu"]


def count(**keys):
    return build_model(ModelConfig(**SIZE, **keys)).parameter_counts()["total"]


@pytest.fixture(scope="module")
def table():
    """The output without timing."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        list_components.main([*FLAGS, "--steps=0"])
    return out.getvalue()


@pytest.mark.slow
def test_the_table_has_every_option_with_its_parameters(table):
    for axis, options in AXES.items():
        for name, option in options.items():
            row = re.search(rf"^{axis} +{name} .*{re.escape(option.help)}$", table, re.MULTILINE)
            assert row, (axis, name)
            if axis not in ("rope_scaling", "activation") and "·" not in row[0]:
                assert f" {count(**{axis: name}) - count():+,} " in row[0]


@pytest.mark.slow
def test_the_table_has_the_other_keys_that_have_an_effect_on_their_baseline(table):
    assert re.search(rf"^bias +True +Bias +{re.escape(f'{count(bias=True) - count():+,}')} ", table, re.MULTILINE)
    assert re.search(r"^rope_fraction +0.5 +rot0.5 +\+0 ", table, re.MULTILINE)  # its baseline has RoPE
    keys = {line.split()[0] for line in table.splitlines()[3:-3]}
    unlisted = {"arch_preset", *SIZE, "window_pattern", "rope_theta_local", "rope_scaling_factor",
                "rope_original_context"}  # given by a flag, or without effect on a default model
    assert keys == {*ModelConfig().flat()} - unlisted


def test_an_option_is_timed_against_its_baseline(capsys, monkeypatch):
    monkeypatch.setattr(list_components, "values_to_list", lambda args: {"attention_backend": ("manual", "flex")})
    list_components.main([*FLAGS, "--steps=1", "--batch_size=1"])
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("attention_back")}
    assert re.search(r" \d+\.\d\d  softmax", rows["manual"])
    assert re.search(r" –  torch's flex", rows["flex"])  # it has no backward pass on a CPU


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(UserError, match="--steps: -1 is out of range"):
        list_components.main(["--steps=-1"])
