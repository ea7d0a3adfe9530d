"""blockgpt/experiments/verdicts.py: the rules of a verdict, and by simulation how often it is wrong."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import stats

from blockgpt.errors import UserError
from blockgpt.experiments.records import Point
from blockgpt.experiments.study import Reading, Study, StudyTrial, interpolate, pareto_front, parse_at
from blockgpt.experiments.verdict_text import render_judgement
from blockgpt.experiments.verdicts import judge
from blockgpt.training.criterion import Criterion
from tools.simulate_studies import LOOKS, Scenario, simulate

NOISE = (0.02, -0.01, 0.03, 0.0, -0.04, 0.01, 0.05, -0.02)  # of the seeds
OWN = (0.001, -0.002, 0.0, 0.001, 0.002, -0.001, 0.0, 0.001)  # of a variant


def trials(variant, offset=0.0, seeds=range(5), own=OWN, **fields):
    return [StudyTrial(variant, seed, "finished", 2 + NOISE[seed] + offset + (own[seed] if offset else 0), **fields)
            for seed in seeds]


def one(found):
    assert len(found.verdicts) == 1
    return found.verdicts[0]


def judged(*groups, **options):
    return judge(Study([trial for group in groups for trial in group]), "base", **options)


# ---- the four verdicts ----

@pytest.mark.parametrize("offset, outcome", [(-0.05, "better"), (0.05, "worse")])
def test_a_difference_beyond_the_noise_is_a_verdict(offset, outcome):
    verdict = one(judged(trials("base"), trials("new", offset)))
    assert verdict.outcome == outcome and verdict.method == "paired t"
    assert verdict.difference.mean == pytest.approx(offset + sum(OWN[:5]) / 5)
    more = judge(Study([*trials("base"), *trials("new", offset)], Criterion("accuracy", True)), "base")
    assert one(more).outcome == {"better": "worse", "worse": "better"}[outcome]


def test_pairs_are_by_seed_and_not_by_order():
    shuffled = [trials("new", -0.05)[i] for i in (3, 0, 4, 1, 2)]
    assert one(judged(shuffled, trials("base"))) == one(judged(trials("base"), trials("new", -0.05)))


def test_a_copy_of_the_baseline_is_equal():
    verdict = one(judged(trials("base"), trials("copy")))
    assert verdict.outcome == "equal" and verdict.difference.mean == 0 and verdict.p == 1
    assert verdict.margin == pytest.approx(stats.tstd([2 + noise for noise in NOISE[:5]]))


def test_a_declared_margin_decides_what_is_equal():
    groups = trials("base"), trials("new", 1e-4)
    assert one(judged(*groups, margin=0.01)).outcome == "equal"
    assert one(judged(*groups, margin=0.001)).outcome == "inconclusive"


def test_a_certain_difference_below_the_margin_is_better_and_says_so():
    verdict = one(judged(trials("base"), trials("new", -0.01), margin=0.05))
    assert (verdict.outcome, verdict.within_margin) == ("better", True)


def test_an_inconclusive_verdict_says_how_many_seeds_would_settle_it():
    verdict = one(judged(trials("base"), trials("new", -0.0008), margin=1e-6))
    assert verdict.outcome == "inconclusive" and verdict.needed > 5
    std, mean = verdict.difference.std, abs(verdict.difference.mean)

    def power(n):  # of the two-sided paired t test, from scipy
        critical = stats.t.ppf(0.975, n - 1)
        distribution = stats.nct(n - 1, mean / std * n**0.5)
        return distribution.sf(critical) + distribution.cdf(-critical)

    assert power(verdict.needed) >= 0.8 > power(verdict.needed - 1)


def test_one_or_two_seeds_get_a_number_and_no_verdict():
    for n in (1, 2):
        verdict = one(judged(trials("base", seeds=range(n)), trials("new", -0.5, seeds=range(n))))
        assert verdict.outcome is None and verdict.p is None
        assert verdict.difference.mean == pytest.approx(-0.5, abs=0.01)
        assert "no verdict below 3" in verdict.notes[0]


def test_the_family_is_adjusted_for():
    few = judged(trials("base"), trials("a", -0.0035))
    many = judged(trials("base"), trials("a", -0.0035), *(trials(f"copy {i}") for i in range(9)))
    p = {verdict.variant: verdict for verdict in many.verdicts}["a"]
    assert p.p == one(few).p and p.p_adjusted == pytest.approx(10 * p.p) and one(few).p_adjusted == one(few).p


def test_a_later_look_is_stricter():
    groups = trials("base"), trials("new", -0.0035)
    p = one(judged(*groups)).p
    assert 0.05 * 6 / math.pi**2 / 9 < p < 0.05 * 6 / math.pi**2  # below the first look's level, above the third's
    outcomes = [one(judged(*groups, margin=1e-6, look=look)).outcome for look in (None, 1, 3)]
    assert outcomes == ["better", "better", "inconclusive"]


def test_sign_flips_are_on_request_from_six_pairs():
    few = one(judged(trials("base"), trials("new", -0.05), test="sign_flip"))
    assert few.outcome is None and "below 6" in few.notes[0]
    verdict = one(judged(trials("base", seeds=range(8)), trials("new", -0.05, seeds=range(8)), test="sign_flip"))
    assert (verdict.outcome, verdict.method, verdict.p) == ("better", "sign flips", 2 / 2**8)


def test_where_nothing_pairs_it_is_welch_and_says_so():
    verdict = one(judged(trials("base", seeds=range(4)), trials("new", -0.5, seeds=range(4, 8))))
    assert verdict.outcome == "better" and "Welch" in verdict.method and not verdict.differences
    assert verdict.difference.low < -0.5 < verdict.difference.high


# ---- runs that did not finish ----

def test_a_diverged_run_leaves_no_pair_silently_and_is_worse_than_any_loss():
    group = [*trials("new", -0.05, seeds=range(4)), StudyTrial("new", 4, "diverged")]
    found = judged(trials("base"), group)
    assert one(found).outcome == "inconclusive" and one(found).difference.n == 4
    assert one(found).notes[:2] == ("better where it finished", "diverged with seed 4: 1 half pair")
    worse = [*trials("new", 0.05, seeds=range(4)), StudyTrial("new", 4, "diverged")]
    assert one(judged(trials("base"), worse)).outcome == "worse"
    base = [*trials("base", seeds=range(4)), StudyTrial("base", 4, "diverged")]
    assert one(judged(base, trials("new", 0.05))).outcome == "inconclusive"
    assert one(judged(base, trials("new", -0.05))).outcome == "better"
    assert "4/5 diverged 1" in render_judgement(found)


@pytest.mark.parametrize("status, words", [("failed", "failed with seed 4: 1 half pair"),
                                           ("missing", "is missing with seed 4: 1 half pair")])
def test_a_run_without_a_value_makes_a_half_pair(status, words):
    verdict = one(judged(trials("base"), [*trials("new", -0.05, seeds=range(4)), StudyTrial("new", 4, status)]))
    assert verdict.outcome == "better" and words in verdict.notes and verdict.difference.n == 4


def test_seeds_that_only_one_side_has_are_named():
    verdict = one(judged(trials("base"), trials("new", -0.05, seeds=range(3))))
    assert "it was not run with seeds 3, 4: 2 half pairs" in verdict.notes


def test_of_several_runs_of_a_seed_the_newest_counts_and_the_floor_says_how_far_they_agree():
    again = [StudyTrial("base", 0, "finished", 2.5, created_at="2020")]
    base = trials("base", created_at="2026")
    found = judged([*again, *base], trials("new", -0.05))
    assert found.arms[0].values[0] == base[0].value
    assert found.floors[0].again == ((2.5, base[0].value),) and "MORE THAN THE FLOOR" in render_judgement(found)


# ---- sizes, grids, the front ----

def test_variants_are_compared_within_a_size_and_a_sign_change_is_flagged():
    found = judged(trials("base", size="s"), trials("new", -0.05, size="s"), trials("base", 0.3, size="m"),
                   trials("new", 0.35, size="m"), trials("new", size="xl"))
    assert [(v.size, v.outcome) for v in found.verdicts] == [("s", "better"), ("m", "worse")]
    assert any("the sign changes between sizes" in text for text in found.warnings)
    assert any("not judged at xl: the baseline has no run there" in text for text in found.warnings)
    calm = judged(trials("base", size="s"), trials("new", -0.05, size="s"), trials("base", size="m"),
                  trials("new", -0.03, size="m"))
    assert calm.warnings == ()


def test_what_cannot_be_compared_has_no_verdict_and_says_why():
    study = Study([*trials("base"), *trials("new", -0.05)], excluded={"new": "other validation data"})
    found = judge(study, "base")
    assert found.verdicts == () and found.warnings == ("new: not judged: other validation data",)
    assert "not judged" in render_judgement(found)


def test_the_speed_is_the_geometric_mean_over_pairs_on_one_hardware():
    own, base = [90.0, 110.0, 96.0, 88.0], [100.0, 118.0, 101.0, 97.0]

    def timed(variant, speeds, hardware="cpu"):
        return [dataclasses.replace(trial, tokens_per_sec=speed, hardware=hardware)
                for trial, speed in zip(trials(variant, seeds=range(4)), speeds, strict=True)]

    logs = np.log(np.array(own) / base)
    low, high = stats.t.interval(0.95, 3, logs.mean(), stats.sem(logs))
    found = one(judged(timed("base", base), timed("other", own)[::-1]))
    assert found.speed == pytest.approx(np.exp([logs.mean(), low, high]))
    record = json.loads(render_judgement(judged(timed("base", base), timed("other", own)), "json"))["verdicts"][0]
    assert record["speed_ratio"] == pytest.approx(np.exp(logs.mean()))
    assert f"{found.speed.ratio:.3g} × the tokens/s of the baseline, 95 % [{found.speed.low:.3g}" in render_judgement(
        judged(timed("base", base), timed("other", own)), "table")
    assert one(judged(timed("base", base), timed("other", own, "gpu"))).speed is None
    two = one(judged(timed("base", base)[:2], timed("other", own)[:2])).speed
    assert two == (pytest.approx(np.exp(logs[:2].mean())), None, None)


def test_the_worth_of_pairing_is_a_ratio_of_variances():
    found = judged(trials("base"), trials("other", 1.0), trials("third", 0.1))
    values = {arm.variant: np.array(list(arm.values.values())) for arm in found.arms}
    paired = sum(np.var(values[name] - values["base"], ddof=1) for name in ("other", "third"))
    unpaired = sum(np.var(values[name], ddof=1) + np.var(values["base"], ddof=1) for name in ("other", "third"))
    assert found.pairing == pytest.approx(paired / unpaired) and found.pairing < 1
    text = render_judgement(found, "table")
    assert f"5 pairs tell as much as {5 / found.pairing:.3g} unpaired seeds" in " ".join(text.split())
    assert judged(trials("base", seeds=range(3)), trials("other", seeds=range(3, 6))).pairing is None


def test_the_front_holds_what_nothing_beats_in_everything():
    assert pareto_front({"a": (1, 5), "b": (2, 4), "c": (2, 5), "d": (3, 1), "e": (1, 5)}) == ["a", "e", "b", "d"]
    found = judged(trials("base", tokens_per_sec=10.0, peak_memory=5.0),
                   trials("fast", 0.1, tokens_per_sec=20.0, peak_memory=5.0),
                   trials("bad", 0.1, tokens_per_sec=9.0, peak_memory=6.0))
    assert found.front["", 0.0] == ["base", "fast"]


@pytest.mark.parametrize("options, message", [
    ({"baseline": "bse"}, "did you mean base"), ({"level": 0.0}, "level"), ({"margin": -1.0}, "margin"),
    ({"look": 0}, "look"), ({"test": "z"}, "test")])
def test_a_mistake_is_named(options, message):
    with pytest.raises(UserError, match=message):
        judge(Study(trials("base")), **{"baseline": "base", **options})


def test_every_format_has_every_variant_and_json_has_a_schema_number():
    found = judged(trials("base", horizon=1e6), trials("new_1", -0.05, horizon=1e6))
    for name in ("table", "md", "csv", "latex"):
        text = render_judgement(found, name)
        assert "better" in text and ("new\\_1" if name == "latex" else "new_1") in text
    assert all(len(line) <= 110 for line in render_judgement(found, "table", 110).splitlines())
    record = json.loads(render_judgement(found, "json"))
    assert record["schema_version"] == 1 and record["verdicts"][0]["verdict"] == "better"
    assert record["verdicts"][0]["difference_n"] == 5 and record["floors"][0]["n"] == 5


# ---- reading a curve ----

CURVE = [Point(10, 100.0, 1e3, 1.0, 3.0, 4.0), Point(20, 200.0, 2e3, 2.0, 2.0, 3.0),
         Point(30, 300.0, 3e3, 4.0, 2.5, 3.5)]


@pytest.mark.parametrize("reading, value", [
    (Reading(), 2.0), (Reading(last=1), 2.5), (Reading(last=2), 2.25), (Reading(("tokens", 150)), 2.5),
    (Reading(("tokens", 100)), 3.0), (Reading(("flops", 2500)), 2.25), (Reading(("time", 3.0)), 2.25),
    (Reading(bits_per_byte=True), 3.0)])
def test_the_value_of_a_curve(reading, value):
    assert reading.value(CURVE, Criterion()) == (value, "")


@pytest.mark.parametrize("reading, reason", [
    (Reading(("tokens", 99)), "evaluated from 100 to 300 tokens"), (Reading(("tokens", 301)), "not at 301"),
    (Reading(last=4), "it has 3 finite ones of the last 4")])
def test_a_curve_is_not_extrapolated(reading, reason):
    value, text = reading.value(CURVE, Criterion())
    assert value is None and reason in text
    assert interpolate([(None, 1.0)], "time", 1.0) == (None, "its evaluations do not record time")


def test_at_is_parsed():
    assert parse_at("tokens=1e9") == ("tokens", 1e9)
    for text in ("token=1", "tokens=", "tokens=-1", "tokens=inf", "tokens"):
        with pytest.raises(UserError, match="--at"):
            parse_at(text)


# ---- how often a verdict is wrong ----

def at_most(rate, level, studies):
    """Whether a rate is no larger than the level, but for what chance allows (one in 10,000)."""
    return stats.binomtest(round(rate * studies), studies, level, alternative="greater").pvalue > 1e-4


@pytest.mark.parametrize("variants", [1, 3])
def test_a_baseline_against_itself_is_better_or_worse_no_more_often_than_the_level(variants):
    rate = simulate(Scenario(variants), 400)["decided"]
    assert at_most(rate, 0.05, 400) and rate > 0.005  # the test is not vacuous


@pytest.mark.long
@pytest.mark.parametrize("seeds", [(5,), LOOKS], ids=["one look", "optional stopping"])
@pytest.mark.parametrize("variants", [1, 3, 10])
def test_a_thousand_studies_of_a_baseline_against_itself(variants, seeds):
    assert at_most(simulate(Scenario(variants, seeds), 1000)["decided"], 0.05, 1000)


@pytest.mark.slow
def test_without_spending_optional_stopping_would_not_keep_the_level(monkeypatch):
    monkeypatch.setattr("blockgpt.experiments.statistics.spend", lambda level, look: level)
    assert not at_most(simulate(Scenario(1, LOOKS), 300)["decided"], 0.05, 300)


def test_a_known_effect_is_found_as_often_as_theory_says():
    rate = simulate(Scenario(1, (5,), 1.0), 800)["worse"]
    noncentrality = 1.0 / 0.5**0.5 * 5**0.5  # the differences have std 0.5 * sqrt(2)
    assert rate == pytest.approx(stats.nct.sf(stats.t.ppf(0.975, 4), 4, noncentrality), abs=0.05)


@pytest.mark.grid(4)
@pytest.mark.parametrize("scenario", [
    Scenario(1, (5,), 1.0, 1.0, own_std=0.2), Scenario(1, (8,), 1.0, 1.0, "sign_flip", own_std=0.2),
    Scenario(1, (5,), math.hypot(1.0, 0.1), own_std=0.1), Scenario(3, (10,), math.hypot(1.0, 0.1), own_std=0.1)],
    ids=["declared", "sign flips", "estimated", "estimated, 3 variants"])
def test_a_true_difference_of_the_margin_is_called_equal_no_more_often_than_the_level(scenario):
    assert at_most(simulate(scenario, 400)["equal"], 0.05, 400)


def test_no_difference_at_all_is_called_equal_often():
    assert simulate(Scenario(1, (8,), 0.0, 1.0, own_std=0.2), 100)["equal"] > 0.9
