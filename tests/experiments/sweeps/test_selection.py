"""What variants spend alike, which of them go on, and what a study costs: properties of the figures."""

import math

import pytest
from dataset_helpers import refusal
from hypothesis import example, given
from hypothesis import strategies as st

from blockgpt.errors import UserError
from blockgpt.experiments.sweeps.plan import PlannedRun
from blockgpt.experiments.sweeps.selection import (
    PARAMETER_TOLERANCE,
    Budget,
    Cost,
    affordable,
    at_the_edge,
    choose_rates,
    equal_keys,
    expense,
    halving,
    parse_budget,
    solve_width,
    survivors,
)

amounts = st.floats(1e-3, 1e3)


def cost(**fields):
    return Cost(**{"parameters": 100, "flops_per_token": 600.0, "tokens_per_step": 64, "steps": 1000,
                   "eval_tokens": 640, "evaluations": 4, "memory": 1, "available": 2, "step_time": 0.1, "overhead": 3.0,
                   **fields})


def planned(variant="a", seed=1, size="s", steps=1000, words=(), name=None):
    name = name or f"{variant}{seed}{size}{words}"
    return PlannedRun(name, name, variant, size, seed, words, steps=steps, tokens=64 * steps)


# ---- --equal


@given(amounts, st.integers(1, 4096), amounts, st.integers(1, 10_000))
def test_equal_spend_is_within_half_a_step(flops, tokens_per_step, step_time, steps):
    costs = {("a", "s"): cost(steps=steps), ("b", "s"): cost(steps=steps, flops_per_token=flops, step_time=step_time,
                                                             tokens_per_step=tokens_per_step)}
    spends = {"tokens": lambda c: c.tokens_per_step, "flops": lambda c: c.tokens_per_step * c.flops_per_token,
              "time": lambda c: c.step_time}
    for equal, spend in spends.items():
        keys = equal_keys(equal, costs, "a", costs)
        assert ("a", "s") not in keys
        found = keys.get(("b", "s"), {"max_iters": steps})["max_iters"]
        target = steps * spend(costs["a", "s"])
        assert abs(found * spend(costs["b", "s"]) - target) <= 0.5000001 * spend(costs["b", "s"]) or found == 1


def test_equal_time_without_a_probe_is_refused():
    costs = {("a", "s"): cost(step_time=None), ("b", "s"): cost(step_time=None)}
    assert "--equal=time" in refusal(equal_keys, "time", costs, "a", costs, error=UserError)


def gpt(keys, n_layer=4, n_head=4, n_embd=128, d_ff=512, gated=False, vocab=320):
    """Parameters of a GPT, by the usual formula."""
    width, hidden = keys.get("n_embd", n_embd), keys.get("d_ff", keys.get("n_embd", n_embd) * d_ff // n_embd)
    return n_layer * (4 * width**2 + (3 if gated else 2) * width * hidden + 2 * width) + vocab * width


@example(64, False, 299_169)  # which d_ff = 1 would nearly reach
@given(st.integers(64, 4096), st.booleans(), st.integers(10_000, 5_000_000))
def test_a_solved_width_has_the_target_within_the_tolerance_or_is_refused(d_ff, gated, target):
    def count(keys):
        return gpt(keys, d_ff=d_ff, gated=gated)

    try:
        keys = solve_width(target, count, d_ff, 128, 4)
    except UserError as error:
        assert "neither by d_ff nor by n_embd" in str(error)
        return
    assert abs(count(keys) - target) <= PARAMETER_TOLERANCE * target
    if list(keys) == ["d_ff"]:
        step = count({"d_ff": 2}) - count({"d_ff": 1})
        assert abs(count(keys) - target) <= step / 2


def test_the_width_is_solved_for_where_the_study_varies_d_ff():
    assert list(solve_width(2_000_000, gpt, 512, 128, 4, fixed=["d_ff"])) == ["n_embd"]
    assert list(solve_width(2_000_000, gpt, 512, 128, 4)) == ["d_ff"]
    assert solve_width(gpt({}), gpt, 512, 128, 4) == {}


# ---- learning rates


def test_the_rate_with_the_best_mean_wins_and_one_that_diverged_once_cannot():
    runs = [planned("a", seed, words=(rate,)) for rate in (1.0, 2.0, 3.0) for seed in (1, 2)]
    values = dict(zip((run.id for run in runs), [2.0, 2.2, 2.1, 2.0, 1.0, None], strict=True))
    assert choose_rates(runs, values, lambda run: run.words[0]) == {("a", "s"): 2.0}
    assert choose_rates(runs, values | {runs[5].id: 1.0}, lambda run: run.words[0]) == {("a", "s"): 3.0}
    assert "variant a, size s: no learning rate finished" in refusal(
        choose_rates, runs, {}, lambda run: run.words[0], error=UserError)


def test_a_best_rate_at_the_edge_of_the_sweep_is_said():
    lines = at_the_edge({("a", "s"): 1.0, ("b", "s"): 2.0, ("c", "s"): 3.0}, (1.0, 2.0, 3.0))
    assert [line.split(",")[0] for line in lines] == ["variant a", "variant c"]
    assert "smallest" in lines[0] and "largest" in lines[1]


# ---- successive halving


@given(st.integers(1, 100), st.integers(1, 100))
def test_halving_ends_with_the_judged_ones_and_doubles_the_horizon(others, judged):
    judged = min(judged, others)
    rungs = halving(others, judged)
    assert others - sum(rung.leavers for rung in rungs) == judged
    assert all(rung.leavers <= rung.entrants / 2 + 0.5 and rung.leavers > 0 for rung in rungs)
    assert [rung.horizon for rung in rungs] == [0.5 ** (len(rungs) - i) for i in range(len(rungs))]
    assert len(rungs) == math.ceil(math.log2(others / judged)) or len(rungs) <= math.log2(others / judged) + 1


def test_survivors_are_the_best_against_the_baseline_over_all_sizes():
    values = {("base", "s"): 2.0, ("base", "t"): 4.0, ("a", "s"): 1.9, ("a", "t"): 4.4, ("b", "s"): 2.02,
              ("b", "t"): 3.9, ("c", "s"): 1.0, ("c", "t"): None}
    assert survivors(["a", "b", "c"], "base", ["s", "t"], values, 1) == ["b"]
    assert survivors(["a", "b", "c"], "base", ["s", "t"], values, 2) == ["a", "b"]


# ---- budgets


@pytest.mark.parametrize("text, budget", [("2h", Budget(7200, "seconds")), ("90m", Budget(5400, "seconds")),
                                          ("1.5 d", Budget(129600, "seconds")), ("30S", Budget(30, "seconds")),
                                          ("1e15", Budget(1e15, "flops")), ("3e12 flops", Budget(3e12, "flops"))])
def test_a_budget_is_a_time_or_flops(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "h", "-1h", "0", "2 weeks", "1e999", "..h", "nan"])
def test_another_budget_is_one_line(text):
    assert "is neither a time (2h, 90m, 30s) nor a number of FLOPs" in refusal(parse_budget, text, error=UserError)


def test_the_expense_of_runs_is_their_steps_start_and_evaluations():
    costs = {("a", "s"): cost()}
    runs = [planned(steps=1000), planned(steps=500)]
    # 1000 steps of 0.1 s, 3 s beside them, 4 evaluations of 640 tokens at a third of 0.1 s / 64 tokens each
    full, half = 100 + 3 + 4 * 640 * 0.1 / 64 / 3, 50 + 3 + 2 * 640 * 0.1 / 64 / 3
    assert expense(runs, costs, 2, "seconds") == pytest.approx((full + half) / 2)
    assert expense(runs, costs, 2, "flops") == 1500 * 64 * 600
    assert expense(runs, {("a", "s"): cost(step_time=None)}, 2, "seconds") is None


def test_as_many_variants_are_judged_as_the_budget_affords():
    budget = Budget(10, "seconds")
    assert affordable(budget, 8, lambda judged: 2.0 * judged) == 5
    assert affordable(budget, 3, lambda judged: 2.0 * judged) == 3
    assert "not enough for one variant" in refusal(affordable, budget, 8, lambda judged: 11.0, error=UserError)
    assert "drop --no_probe" in refusal(affordable, budget, 8, lambda judged: None, error=UserError)
