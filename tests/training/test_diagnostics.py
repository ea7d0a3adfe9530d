"""Loss spikes, gradient statistics, and the error of a step that is not finite."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from blockgpt.training.diagnostics import LossSpikeDetector, gradient_statistics, is_usable, non_finite_error
from blockgpt.training.faults import StepStatus
from model_builder import build_model
from model_config import get_preset

SIZES = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32)


def test_gradient_statistics_equal_the_norms_of_each_layer():
    model = build_model(get_preset("llama", **SIZES))
    x = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(1))
    model(x[:, :-1], x[:, 1:]).backward()
    model.lm_head.weight.grad = None  # a layer without gradients has no statistics
    statistics = gradient_statistics(model)
    assert set(statistics) == {"token_embedding", "blocks.0", "blocks.1", "final_norm"}
    for layer, measured in statistics.items():
        own = [p for name, p in model.named_parameters() if name.startswith(layer + ".")]
        grads, weights = (torch.cat([t.detach().double().flatten() for t in ts])
                          for ts in ([p.grad for p in own], own))
        assert measured == {"grad_norm": pytest.approx(grads.norm().item(), rel=1e-5),
                           "grad_max": pytest.approx(grads.abs().max().item()),
                           "weight_norm": pytest.approx(weights.norm().item(), rel=1e-5)}


def noise(n, seed=0):
    return (3.0 + 0.1 * torch.randn(n, generator=torch.Generator().manual_seed(seed))).tolist()


def test_a_spike_is_a_loss_far_above_its_running_mean():
    spikes = LossSpikeDetector(6.0)
    assert [spikes.z_score(loss) for loss in noise(500)] == [None] * 500  # six standard deviations of normal noise
    assert spikes.state["mean"] == pytest.approx(3.0, abs=0.05) and spikes.state["variance"] ** 0.5 == pytest.approx(
        0.1, rel=0.3)
    assert spikes.z_score(2.0) is None  # downwards is progress
    assert spikes.z_score(float("nan")) is None and spikes.z_score(float("inf")) is None
    assert math.isfinite(spikes.state["mean"])
    assert spikes.z_score(4.5) > 6.0
    assert spikes.z_score(3.0) is None


def test_the_first_losses_are_no_spikes_and_a_new_level_soon_stops_being_one():
    spikes = LossSpikeDetector(6.0)
    assert [spikes.z_score(loss) for loss in (10.0, 3.0, 30.0, 5.0)] == [None] * 4
    spikes = LossSpikeDetector(6.0)
    for loss in noise(300):
        spikes.z_score(loss)
    found = [spikes.z_score(loss + 2.0) is not None for loss in noise(300, seed=1)]
    assert found[0] and not any(found[100:])
    constant = LossSpikeDetector(6.0)
    assert [constant.z_score(1.0) for _ in range(200)] == [None] * 200
    assert constant.z_score(1.001) is None  # without noise there is no scale to judge by


def test_a_detector_continues_from_its_state():
    losses = noise(250)
    whole, first = LossSpikeDetector(2.0), LossSpikeDetector(2.0)
    found = [whole.z_score(loss) for loss in losses]
    for loss in losses[:170]:
        first.z_score(loss)
    rest = LossSpikeDetector(2.0, json.loads(json.dumps(first.state)))
    assert [rest.z_score(loss) for loss in losses[170:]] == found[170:] and any(found[170:])


def status(loss=1.0, grad_norms=(1.0, 1.0), nonfinite_micro_steps=(-1, -1)):
    return StepStatus(loss, list(grad_norms), list(nonfinite_micro_steps), None, False, [0.1, 0.1], [0.0, 0.0])


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"loss": -math.inf}, {"grad_norms": (1.0, math.inf)},
                                 {"grad_norms": (math.nan, 1.0)}])
def test_a_step_that_is_not_finite_on_any_rank_is_unusable_unless_the_loss_scale_may_be_to_blame(bad):
    plain = SimpleNamespace(is_enabled=lambda: False)
    assert is_usable(status(), plain) and not is_usable(status(**bad), plain)
    for scale, usable in ((2.0**16, True), (1.0, False)):
        scaler = SimpleNamespace(is_enabled=lambda: True, get_scale=lambda scale=scale: scale)
        assert is_usable(status(**bad), scaler) == usable


def test_the_error_names_step_rate_and_the_data_on_each_rank():
    objective = SimpleNamespace(locate=lambda step, micro_step, dp_rank: f"<{step} {micro_step} {dp_rank}>")
    bad = status(math.nan, (2.0, math.inf), (-1, 3))
    error = non_finite_error(bad, 8, 1e-3, objective, SimpleNamespace(tp_size=1), 5)
    assert error.exit_code == 5
    assert str(error).startswith("step 8: loss nan, gradient norm inf at learning rate 0.001 on rank 1: <7 3 1>: ")
    assert str(error).endswith("checkpoint: step 5)")
    assert "checkpoint: none" in str(non_finite_error(bad, 8, 1e-3, objective, SimpleNamespace(tp_size=2), None))
