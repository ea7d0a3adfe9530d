"""blockgpt/experiments/worth.py: the law against scipy's fit, and the coverage of its intervals by simulation."""

import math
import random

import numpy as np
import pytest
from scipy.optimize import curve_fit

from blockgpt.experiments.study import Study, StudyTrial
from blockgpt.experiments.verdict_text import ratio_text, render_judgement
from blockgpt.experiments.verdicts import judge
from blockgpt.experiments.worth import Law, Ratio, fit_law, worth
from tools.simulate_studies import simulate_worth

HORIZONS = (1e6, 2e6, 4e6, 8e6, 16e6)


def loss(tokens, e=1.7, a=400.0, alpha=0.34):
    return e + a * tokens**-alpha


def losses(horizons=HORIZONS, noise=0.0, seeds=3, law=loss):
    rng = random.Random(0)
    return {tokens: {seed: law(tokens) + rng.gauss(0, noise) for seed in range(seeds)} for tokens in horizons}


def test_the_law_of_curves_without_noise_is_the_one_they_were_made_by():
    law = fit_law(losses())
    assert (law.irreducible, law.exponent) == pytest.approx((1.7, 0.34), abs=1e-4) and law.full
    assert law.loss(32e6) == pytest.approx(loss(32e6), abs=1e-5) and law.residual < 1e-8
    assert law.formula().startswith("L(D) = 1.7 + 400")


def test_the_law_of_noisy_losses_is_that_of_curve_fit():
    table = losses(noise=0.003)
    law = fit_law(table)
    mean = [np.mean(list(values.values())) for values in table.values()]
    (e, a, alpha), _ = curve_fit(lambda x, e, a, alpha: e + a * x**-alpha, np.array(HORIZONS) / law.reference, mean,
                                 p0=(2, 2, 0.3), xtol=1e-14, ftol=1e-14)
    assert (law.irreducible, law.amplitude, law.exponent) == pytest.approx((e, a, alpha), rel=1e-4)


def test_the_influence_of_a_seed_is_the_derivative_of_the_fit():
    rng = random.Random(0)
    noise = {tokens: rng.gauss(0, 0.003) for tokens in HORIZONS}  # of seed 1; seed 2 has its opposite

    def fit(scale):
        return fit_law({tokens: {0: loss(tokens), 1: loss(tokens) + scale * error, 2: loss(tokens) - error}
                        for tokens, error in noise.items()})

    law, moved, h = fit(1.0), fit(1.01), 0.01
    change = np.subtract((moved.irreducible, moved.amplitude, moved.exponent),
                         (law.irreducible, law.amplitude, law.exponent)) * 3 / h
    assert change == pytest.approx(law.influence[1], rel=0.02)


def test_fewer_than_four_horizons_give_a_law_without_an_irreducible_loss():
    law = fit_law(losses(HORIZONS[:3], law=lambda x: loss(x, e=0.0)))
    assert not law.full and law.irreducible == 0 and law.exponent == pytest.approx(0.34, abs=1e-4)


@pytest.mark.parametrize("table, reason", [
    ({}, "needs runs of it at 2 horizons"), (losses(HORIZONS[:1]), "has 1 horizon:"),
    ({1e6: {0: 3.0}, 2e6: {1: 2.0}}, "no seed of the baseline"),
    (losses(law=lambda x: loss(x, a=-400.0)), "does not fall")])
def test_what_a_law_lacks_is_said(table, reason):
    assert reason in fit_law(table)


def test_worth_is_the_ratio_of_tokens_at_equal_loss():
    law, horizon, longer = fit_law(losses()), 4e6, 4.8e6
    differences = dict.fromkeys(range(3), loss(longer) - loss(horizon))  # as good as the baseline with 1.2 × the tokens
    found = worth(law, horizon, differences, flops_ratio=1.5, log_time_ratios=dict.fromkeys(range(3), math.log(2)))
    assert found.tokens.ratio == pytest.approx(1 / 1.2, rel=1e-3)
    assert (found.flops.ratio, found.time.ratio) == pytest.approx((1.5 / 1.2, 2 / 1.2), rel=1e-3)
    assert found.notes == () and found.tokens.low <= found.tokens.ratio <= found.tokens.high
    far = worth(law, horizon, dict.fromkeys(range(3), loss(64e6) - loss(horizon)))
    assert far.tokens.ratio == pytest.approx(1 / 16, rel=1e-2) and "extrapolated" in far.notes[0]
    assert worth(law, horizon, {0: -10.0}).tokens is None
    few = worth(law, horizon, {0: -0.01, 1: -0.02})
    assert few.tokens.low is None and "no interval" in few.notes[-1]


def test_words_of_a_ratio():
    assert ratio_text(Ratio(0.82, 0.73, 0.91), "tokens", 0.05) == "18 % fewer tokens, 95 % [9, 27]"
    assert ratio_text(Ratio(1.1, 0.95, 1.25), "time", 0.1) == "10 % more time, 90 % [-5, 25]"
    assert ratio_text(Ratio(0.82, None, None), "flops", 0.05) == "18 % fewer FLOPs"


def test_a_judgement_reads_three_columns_off_the_same_pairs():
    rng = random.Random(1)
    trials = []
    for seed in range(4):
        common = rng.gauss(0, 0.003)
        trials += [StudyTrial("base", seed, "finished", loss(tokens) + common, horizon=tokens, flops_per_token=1e6,
                              tokens_per_sec=100.0, hardware="cpu") for tokens in HORIZONS]
        trials += [StudyTrial("new", seed, "finished", loss(4e6) + common - 0.02 + rng.gauss(0, 1e-4), horizon=4e6,
                              flops_per_token=1.2e6, tokens_per_sec=50.0, hardware="cpu")]
    verdict = judge(Study(trials), "base").verdicts[0]
    tokens, flops, time = verdict.worth.tokens.ratio, verdict.worth.flops.ratio, verdict.worth.time.ratio
    assert tokens < 1 and flops == pytest.approx(1.2 * tokens) and time == pytest.approx(2 * tokens)
    text = render_judgement(judge(Study(trials), "base"))
    assert "fewer tokens, 95 % [" in text and "more FLOPs" not in text.split("regime")[0] and "L(D) = " in text
    other = [trial if trial.variant == "base" else StudyTrial(**{**vars(trial), "hardware": "gpu"}) for trial in trials]
    unequal = judge(Study(other), "base").verdicts[0].worth
    assert unequal.time is None and "times are not compared" in unequal.notes[-1]


def test_without_horizons_the_report_says_what_is_needed():
    trials = [StudyTrial(name, seed, "finished", 2 + 0.01 * seed, horizon=1e6) for name in ("base", "new")
              for seed in range(3)]
    assert "the baseline has 1 horizon: its worth in compute needs runs of it at 2" in " ".join(
        render_judgement(judge(Study(trials), "base")).split())


def test_a_law_is_evaluated_where_it_was_fitted():
    law = Law(1.0, 2.0, 0.5, 100.0, (1.0,), (0,), True, 0.0, {})
    assert law.loss(400.0) == pytest.approx(1 + 2 * 0.5) and law.reducible(100.0) == 2.0


@pytest.mark.slow
@pytest.mark.parametrize("seeds, difference", [(3, -0.03), (5, 0.0), (10, -0.15)])
def test_the_interval_holds_the_truth_as_often_as_it_says(seeds, difference):
    coverage, _ = simulate_worth(400, seeds, difference)
    assert 0.92 <= coverage <= 0.98  # 0.95 ± 2.7 standard errors of 400 studies


@pytest.mark.long
@pytest.mark.parametrize("horizons", [(1e6, 2e6, 4e6, 8e6), (5e5, 1e6, 2e6, 4e6, 8e6, 16e6)], ids=len)
@pytest.mark.parametrize("seeds", [3, 6])
def test_the_interval_over_three_thousand_studies(seeds, horizons):
    coverage, _ = simulate_worth(3000, seeds, -0.05, horizons)
    assert 0.935 <= coverage <= 0.97
