"""The optimizer's arithmetic and the learning rate's shape."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgpt.training.optimizers import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from model_builder import build_model
from model_config import get_preset

SIZES = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32)
CPU = torch.device("cpu")


def settings_of(**keys):
    return SimpleNamespace(**{"learning_rate": 1e-2, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99,
                              "use_zero1": False, **keys})


def schedule(**keys):
    return SimpleNamespace(**{"learning_rate": 1.0, "lr_schedule": "cosine", "max_iters": 100, "warmup_iters": 10,
                              "lr_decay_iters": None, "min_lr": None, **keys})


def rates(config, steps=None):
    return [learning_rate(step, config) for step in range(steps or config.max_iters)]


# ---- the optimizer

@pytest.mark.parametrize("preset", ["llama", "gpt2_openai"], ids=["untied", "tied-biases"])
def test_matrices_decay_and_nothing_else_and_each_parameter_is_in_one_group(preset):
    model = build_model(get_preset(preset, **SIZES))
    model.blocks[0].attn.q_proj.weight.requires_grad = False  # frozen: in none
    decay, keep = build_optimizer(model, settings_of(), CPU).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, undecayed = ({names[id(p)] for p in group["params"]} for group in (decay, keep))
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.1, 0.0)
    assert len(decay["params"]) + len(keep["params"]) == len(decayed) + len(undecayed) == len(names) - 1
    assert all("norm" in name or name.endswith(".bias") for name in undecayed)
    assert not any("norm" in name or name.endswith(".bias") for name in decayed)
    assert "blocks.0.attn.q_proj.weight" not in decayed | undecayed and "token_embedding.weight" in decayed


def test_a_group_with_a_smaller_rate_decays_no_less():
    model = build_model(get_preset("llama", init="mup", **{**SIZES, "n_embd": 512}))
    groups = [g for g in build_optimizer(model, settings_of(), CPU).param_groups if g["weight_decay"]]
    assert {g["lr_multiplier"] for g in groups} >= {1.0, 0.5}  # the base width is 256
    assert all(g["lr_multiplier"] * g["weight_decay"] == pytest.approx(0.1) for g in groups)


def test_a_step_is_adamw_as_the_paper_has_it():
    """Loshchilov & Hutter 2019, algorithm 2, with the decay multiplied by the learning rate, in float64."""
    model = build_model(get_preset("llama", **SIZES))
    config = settings_of(weight_decay=0.3)
    optimizer = build_optimizer(model, config, CPU)
    assert all(group["fused"] for group in optimizer.param_groups)
    parameters = dict(model.named_parameters())
    theta = {n: p.detach().double().numpy().copy() for n, p in parameters.items()}
    m, v = ({n: np.zeros_like(t) for n, t in theta.items()} for _ in range(2))
    for t in range(1, 6):
        rate = 1e-2 / t
        set_learning_rate(optimizer, rate)
        for i, (n, p) in enumerate(parameters.items()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i))
            g = p.grad.double().numpy()
            m[n] = 0.9 * m[n] + 0.1 * g
            v[n] = 0.99 * v[n] + 0.01 * g**2
            adam = m[n] / (1 - 0.9**t) / (np.sqrt(v[n] / (1 - 0.99**t)) + 1e-8)
            decay = 0.3 if theta[n].ndim == 2 else 0.0
            theta[n] = theta[n] - rate * (adam + decay * theta[n])
        optimizer.step()
    for n, p in parameters.items():  # five float32 updates of at most 1e-2 each
        np.testing.assert_allclose(p.detach().numpy(), theta[n], rtol=2e-6, atol=2e-8)


def test_clipping_is_torchs():
    def model():
        torch.manual_seed(0)
        m = torch.nn.Linear(4, 3)
        m(torch.ones(2, 4)).square().sum().backward()
        return m

    for max_norm in (0, 0.5, 1e9):
        clipped, reference = model(), model()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm or math.inf)
        assert clip_gradients(clipped, max_norm) == norm.item()
        pairs = zip(clipped.parameters(), reference.parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


# ---- the schedule

def test_the_warm_up_is_a_line_to_the_peak():
    assert rates(schedule())[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    assert rates(schedule(warmup_iters=0))[0] == 1.0
    assert rates(schedule(warmup_iters=200))[-1] == 0.5  # the run ends before the warm-up does


@pytest.mark.parametrize("keys, warmup", [
    ({"max_iters": 2000}, 100), ({"max_iters": 300}, 30), ({"max_iters": 9}, 0), ({"max_iters": 1}, 0),
    ({"max_iters": 2000, "lr_decay_iters": 50}, 5), ({"max_iters": 50, "lr_decay_iters": 2000}, 5),
])
def test_a_warm_up_not_given_is_a_tenth_and_never_outlasts_the_decay(keys, warmup):
    config = schedule(warmup_iters=None, **keys)
    rising = [learning_rate(step, config) for step in range(warmup + 1)]
    assert rising == pytest.approx([*((i + 1) / warmup for i in range(warmup)), 1.0])
    assert learning_rate(warmup + 1, config) < 1.0


def test_the_cosine_goes_from_the_peak_to_the_floor_and_stays():
    config = schedule(warmup_iters=10, lr_decay_iters=50, min_lr=0.2)
    assert learning_rate(10, config) == 1.0 and learning_rate(30, config) == pytest.approx(0.6)
    assert learning_rate(20, config) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates(config)[50:] == [0.2] * 50 and learning_rate(49, config) > 0.2
    assert learning_rate(100, schedule()) == 0.1  # by default a tenth of the peak, at max_iters


def test_constant_is_constant_after_the_warm_up():
    assert rates(schedule(lr_schedule="constant", min_lr=0.5, lr_decay_iters=20))[10:] == [1.0] * 90


def test_a_run_of_one_step_takes_it_at_the_peak():
    assert rates(schedule(max_iters=1, warmup_iters=None)) == [1.0]


@settings(max_examples=200, deadline=None)
@given(peak=st.floats(1e-8, 10), shape=st.sampled_from(["cosine", "constant"]), max_iters=st.integers(1, 400),
       warmup=st.none() | st.integers(0, 200), decay=st.none() | st.integers(1, 400),
       floor=st.none() | st.just(0.0) | st.floats(1e-6, 1))
def test_rates_are_positive_and_rise_to_the_peak_and_fall_from_it(peak, shape, max_iters, warmup, decay, floor):
    decay = decay and max(decay, warmup or 0)  # what the configurator lets through
    config = schedule(learning_rate=peak, lr_schedule=shape, max_iters=max_iters, warmup_iters=warmup,
                      lr_decay_iters=decay, min_lr=None if floor is None else floor * peak)
    found = rates(config, max_iters + 5)
    lowest = peak / 10 if floor is None else floor * peak
    end = decay or max_iters
    ulp = 1e-12 * peak
    assert all(0 <= rate <= peak + ulp for rate in found) and (floor == 0 or min(found) > 0)
    top = found.index(max(found))
    assert all(a <= b for a, b in pairwise(found[:top + 1]))
    assert all(b <= a + ulp for a, b in pairwise(found[top:]))
    if shape == "cosine" and end >= (warmup or 0):
        assert all(rate == lowest for rate in found[max(end, warmup or 0):])
