"""blockgpt/experiments/statistics.py against scipy.stats, closed forms and the definitions."""

import itertools
import math
import random
import statistics as stdlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from blockgpt.experiments import statistics

RNG = np.random.default_rng(0)
SAMPLES = [RNG.normal(0.3, 1, n).tolist() for n in (2, 3, 5, 12, 40)]


@pytest.mark.parametrize("values", SAMPLES, ids=len)
def test_a_mean_has_the_interval_and_p_of_the_t_test(values):
    found, reference = statistics.estimate(values, 0.1), stats.ttest_1samp(values, 0)
    low, high = reference.confidence_interval(0.9)
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high), rel=1e-9)
    assert (found.std, found.n, found.df) == (pytest.approx(np.std(values, ddof=1)), len(values), len(values) - 1)
    assert statistics.t_test(found) == pytest.approx(reference.pvalue, rel=1e-9)
    above = stats.ttest_1samp(values, 0.2, alternative="greater").pvalue
    assert statistics.t_test_above(found, 0.2) == pytest.approx(above, rel=1e-9)
    assert statistics.t_test_below(found, 0.2) == pytest.approx(1 - above, rel=1e-9)


@given(st.floats(-1e6, 1e6), st.lists(st.floats(-1e-3, 1e-3), min_size=2, max_size=9))
def test_the_variance_is_the_exact_one_also_of_values_far_from_zero(offset, distances):
    values = [offset + distance for distance in distances]
    assert statistics.variance(values) == pytest.approx(stdlib.variance(values), rel=1e-12, abs=1e-300)
    assert statistics.variance([offset] * len(values)) == 0


def test_one_value_has_no_interval():
    assert statistics.estimate([2.0]) == (2.0, None, None, None, 1, None, 0)


@pytest.mark.parametrize("first, second", list(itertools.pairwise(SAMPLES)), ids=["2-3", "3-5", "5-12", "12-40"])
def test_welch_is_that_of_scipy(first, second):
    found, reference = statistics.welch(first, second), stats.ttest_ind(first, second, equal_var=False)
    assert statistics.t_test(found) == pytest.approx(reference.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval(0.95)), rel=1e-9)
    assert found.df == pytest.approx(reference.df, rel=1e-9) and found.n == min(len(first), len(second))


@pytest.mark.parametrize("n", [6, 9])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_sign_flips_are_exact(n, shift):
    values = np.random.default_rng(n).normal(0.4, 1, n)
    for alternative, found in (("two-sided", statistics.flip_test(values.tolist(), shift)),
                               ("greater", statistics.flip_test_above(values.tolist(), shift))):
        reference = stats.permutation_test((values - shift,), np.mean, permutation_type="samples",
                                           alternative=alternative, n_resamples=np.inf)
        assert found == pytest.approx(reference.pvalue, abs=1e-12), alternative


def test_sign_flips_count_ties_and_draw_where_there_are_too_many():
    assert statistics.flip_test([0.1] * 6) == 2 / 2**6
    assert statistics.flip_test([0.0] * 6) == 1
    values = np.random.default_rng(1).normal(0.35, 1, 30).tolist()
    assert statistics.flip_test(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.02)


def test_differences_without_spread_are_certain():
    same, shifted = statistics.estimate([0.0] * 3), statistics.estimate([0.5] * 3)
    assert statistics.t_test(same) == 1 and statistics.t_test(shifted) == 0
    for difference, p in ((same, 0.0), (shifted, 1.0)):
        assert statistics.equivalence(lambda shift, d=difference: statistics.t_test_above(d, shift),
                                      lambda shift, d=difference: statistics.t_test_below(d, shift), 0.2) == p


def test_equivalence_is_that_of_two_one_sided_tests():
    values = [0.1, -0.2, 0.15, 0.05]
    found = statistics.estimate(values)
    reference = max(stats.ttest_1samp(values, -0.5, alternative="greater").pvalue,
                    stats.ttest_1samp(values, 0.5, alternative="less").pvalue)
    p = statistics.equivalence(lambda shift: statistics.t_test_above(found, shift),
                               lambda shift: statistics.t_test_below(found, shift), 0.5)
    assert p == pytest.approx(reference, rel=1e-9) and statistics.equivalence(lambda _: 0, lambda _: 0, 0.0) == 1


def test_holm_by_its_definition():
    p_values = [0.01, 0.04, 0.03, 0.005, 0.9]
    # Holm 1979: the sorted p values times 5, 4, 3, 2, 1, made monotone: 0.025, 0.04, 0.09, 0.09, 0.9.
    assert statistics.holm(p_values) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.9])
    assert statistics.holm([]) == [] and statistics.holm([0.6, 0.7]) == [1.0, 1.0]


def test_the_level_is_spent_over_all_looks_and_not_beyond():
    spent = [statistics.spend(0.05, look) for look in range(1, 20_000)]
    assert sum(spent) < 0.05 and sum(spent) == pytest.approx(0.05, rel=1e-3) and spent == sorted(spent, reverse=True)
    assert statistics.spend(0.05, None) == 0.05


def test_the_interval_of_a_standard_deviation_is_that_of_chi_squared():
    values = SAMPLES[2]
    n, std = len(values), np.std(values, ddof=1)
    expected = [std * math.sqrt((n - 1) / stats.chi2.ppf(q, n - 1)) for q in (0.975, 0.025)]
    assert statistics.std_interval(values) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("effect, n", [(0.0, 5), (0.5, 4), (1.0, 10), (-1.0, 10), (3.0, 3), (8.0, 30), (40.0, 900)])
def test_power_is_that_of_the_noncentral_t(effect, n):
    critical = stats.t.ppf(0.975, n - 1)
    reference = stats.nct(n - 1, effect * n**0.5 or 1e-12)
    expected = 1.0 if effect > 5 else reference.sf(critical) + reference.cdf(-critical)
    assert statistics.paired_power(effect, 1.0, n) == pytest.approx(expected, abs=1e-6)


def test_seeds_needed_is_the_smallest_count_and_detectable_difference_its_inverse():
    def power(n):
        return statistics.paired_power(0.8, 1.0, n)

    n = statistics.seeds_needed(power)
    assert power(n) >= 0.8 > power(n - 1)
    assert statistics.detectable_difference(1.0, n) < 0.8 < statistics.detectable_difference(1.0, n - 1)
    assert statistics.paired_power(statistics.detectable_difference(2.0, 5), 2.0, 5) == pytest.approx(0.8, abs=1e-6)
    assert statistics.seeds_needed(lambda n: statistics.paired_power(1e-4, 1.0, n)) is None
    assert statistics.detectable_difference(1.0, 2) is None


def test_power_of_equivalence_agrees_with_a_simulation():
    rng, n, margin = np.random.default_rng(3), 8, 1.0
    values = rng.normal(0.1, 1, (20_000, n))
    half = stats.t.ppf(0.95, n - 1) * values.std(1, ddof=1) / n**0.5
    rate = (np.abs(values.mean(1)) + half < margin).mean()
    assert statistics.equivalence_power(0.1, 1.0, n, margin) == pytest.approx(rate, abs=0.015)


# ---- effects ----

def grid(effect, seeds=4):
    """{variant: {seed: value}} and factors of a 2 × 3 grid with the given value of each cell, and noise of the seed."""
    rng = random.Random(0)
    noise = {seed: rng.gauss(0, 1) for seed in range(seeds)}
    values, factors = {}, {}
    for norm, position in itertools.product(("ln", "rms"), ("abs", "rope", "alibi")):
        name = f"{norm}-{position}"
        factors[name] = {"norm": norm, "position": position}
        values[name] = {seed: effect(norm, position) + noise[seed] for seed in noise}
    return values, factors


def test_main_effects_and_interactions_of_a_grid_are_those_it_was_made_of():
    def value(norm, position):
        return 0.5 * (norm == "rms") - 0.25 * (position == "rope") + 2 * (norm == "rms") * (position == "alibi")

    effects, problem = statistics.grid_effects(*grid(value), "ln-abs")
    found = {tuple(level for _, level in effect.factors.values()): effect.estimate.mean for effect in effects}
    # The main effect of rms is its mean over the three positions, of alibi over the two norms.
    assert found == pytest.approx({("rms",): 0.5 + 2 / 3, ("rope",): -0.25, ("alibi",): 1.0, ("rms", "rope"): 0.0,
                                   ("rms", "alibi"): 2.0}, abs=1e-12)
    assert problem == "" and all(effect.estimate.std < 1e-12 for effect in effects)  # the seed's noise cancels
    assert next(iter(effects)).factors == {"norm": ("ln", "rms")}


def test_a_grid_that_is_not_full_has_no_effects():
    values, factors = grid(lambda *_: 0.0)
    del values["rms-alibi"]
    assert statistics.grid_effects(values, factors, "ln-abs") == ([], "")
    values, factors = grid(lambda *_: 0.0)
    values["rms-rope"] = {9: 1.0}
    assert statistics.grid_effects(values, factors, "ln-abs")[1].startswith("no effects: no seed")


def test_cells_that_differ_in_what_only_some_of_them_have_are_no_grid():
    values, factors = grid(lambda *_: 0.0)
    factors["rms-alibi"] = factors["ln-abs"] | {"bias": "yes"}  # as many cells as a full grid
    assert statistics.grid_effects(values, factors, "ln-abs") == ([], "")


def test_importing_the_statistics_loads_neither_scipy_nor_numpy():
    code = ("import sys\nfrom blockgpt.experiments import verdict_text, verdicts, worth\n"
            "assert not {'scipy', 'numpy', 'torch'} & set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
