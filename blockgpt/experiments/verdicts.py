"""Judges a study: for every variant better, worse, equal within the margin, or inconclusive. docs/EXPERIMENTS.md.

The rules, each verified by simulation in tests/experiments/test_verdicts.py:

- Trials are paired by seed, within a size and a horizon. Better and worse take a p of the paired differences, adjusted
  by Holm over every verdict of the study, below the level.
- Equal takes two one-sided tests against the margin, adjusted likewise. A margin that was not declared is the standard
  deviation of the baseline over its seeds, and then the level is split: half for the lower confidence bound of the
  margin, half for the tests against this bound. So a true difference of the margin is called equal no more often than
  the level.
- Fewer than three pairs have no verdict.
- A diverged run is worse than any loss: its variant can be worse or inconclusive, and never better or equal.
- With `look`, this is one of any number of looks at a growing study: see `statistics.spend`.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from blockgpt.errors import UserError, did_you_mean
from blockgpt.experiments import statistics
from blockgpt.experiments.judgement import Arm, Cell, Judgement, NoiseFloor, Regime, Verdict, cell_text
from blockgpt.experiments.statistics import MIN_FLIPS, MIN_SEEDS, Effect, Estimate, std_deviation, variance
from blockgpt.experiments.study import Study, StudyTrial, duplicates, pareto_front
from blockgpt.experiments.worth import Law, Ratio, Worth, fit_law, worth
from blockgpt.training.criterion import Criterion

TESTS = ("t", "sign_flip")
POWER = 0.8  # of finding what the number of seeds to settle a verdict promises


# ---- arms ----

def mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def make_arm(trials: Sequence[StudyTrial], level: float) -> Arm:
    """The trials of one variant, size and horizon, one of each seed."""
    first = trials[0]
    values = {trial.seed: trial.value for trial in sorted(trials, key=lambda trial: trial.seed)
              if trial.value is not None}

    def seeds(status: str) -> tuple[int, ...]:
        return tuple(sorted(trial.seed for trial in trials if trial.status == status))

    regime = Regime(first.horizon or None, mean_of([trial.unique_tokens for trial in trials]),
                    mean_of([trial.parameters for trial in trials]))
    unread = {trial.seed: trial.reason for trial in trials if trial.status == "finished" and trial.value is None}
    return Arm(first.variant, first.size, first.horizon,
               statistics.estimate(list(values.values()), level) if values else None, values, seeds("diverged"),
               seeds("failed"), seeds("missing"), unread, mean_of([trial.tokens_per_sec for trial in trials]),
               mean_of([trial.peak_memory for trial in trials]), mean_of([trial.flops_per_token for trial in trials]),
               regime)


def arms_of(study: Study, level: float = 0.05) -> list[Arm]:
    """The arms of a study, without a baseline."""
    return [make_arm(trials, level) for trials in group_trials(duplicates(study.trials)[0]).values()]


def group_trials(trials: Sequence[StudyTrial]) -> dict[tuple[str, str, float], list[StudyTrial]]:
    """{(variant, size, horizon): its trials}."""
    groups: dict[tuple[str, str, float], list[StudyTrial]] = {}
    for trial in trials:
        groups.setdefault((trial.variant, trial.size, trial.horizon), []).append(trial)
    return groups


def noise_floor(arm: Arm, again: Sequence[tuple[float, float]], level: float) -> NoiseFloor:
    values = list(arm.values.values())
    if len(values) < 2:
        return NoiseFloor(arm.size, arm.horizon, len(values), None, None, None, tuple(again))
    std = std_deviation(values)
    return NoiseFloor(arm.size, arm.horizon, len(values), std, *statistics.std_interval(values, level), tuple(again))


# ---- verdicts ----

class Margin(NamedTuple):
    """What equality is tested against.

    Attributes:
        value: declared, or the baseline's standard deviation over seeds; None if it has fewer than MIN_SEEDS.
        tested: the margin of the tests: `value`, or its lower confidence bound if it was estimated.
        split: by how much the level of the tests is divided.
        n: seeds that it was estimated from; 0 if it was declared.
    """

    value: float | None
    tested: float
    split: float
    n: int


def margin_of(declared: float | None, floor: NoiseFloor | None, level: float) -> Margin:
    """The margin at one size and horizon; an estimated one's lower bound holds at confidence 1 - level / 2."""
    if declared is not None:
        return Margin(declared, declared, 1.0, 0)
    if floor is None or floor.std is None or floor.n < MIN_SEEDS:
        return Margin(None, 0.0, 2.0, 0)
    return Margin(floor.std, lower_bound(floor.std, floor.n, level / 2), 2.0, floor.n)


def lower_bound(std: float, n: int, level: float) -> float:
    """One-sided confidence bound of a standard deviation of n values."""
    return std * math.sqrt((n - 1) / statistics.chi2_quantile(1 - level, n - 1))


def half_pairs(arm: Arm, base: Arm) -> list[str]:
    """One line for every reason why a seed of one has no partner in the other."""
    notes = []
    for own, other in ((arm, base), (base, arm)):
        name = "" if own is arm else "the baseline "
        for word, seeds in (("diverged", own.diverged), ("failed", own.failed), ("is missing", own.missing),
                            ("cannot be read", tuple(own.unread))):
            if seeds:
                halves = [seed for seed in seeds if seed in other.values]
                text = f"{name}{word} with seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
                reason = f" ({next(iter(own.unread.values()))})" if word == "cannot be read" else ""
                notes.append(text + reason + (f": {len(halves)} half pair{'s' * (len(halves) > 1)}" if halves else ""))
        known = {*own.values, *own.diverged, *own.failed, *own.missing, *own.unread}
        alone = [seed for seed in other.values if seed not in known]
        if alone and own.values.keys() & other.values.keys():
            notes.append(f"{name or 'it '}was not run with seed{'s' * (len(alone) > 1)} "
                         f"{', '.join(map(str, alone))}: {len(alone)} half pair{'s' * (len(alone) > 1)}")
    return notes


def compare_arms(arm: Arm, base: Arm, margin: Margin, test: str, level: float) -> Verdict:
    """The difference of a variant from the baseline, with p values that are not adjusted yet."""
    differences = {seed: value - base.values[seed] for seed, value in arm.values.items() if seed in base.values}
    notes = half_pairs(arm, base)
    verdict = Verdict(arm.variant, arm.size, arm.horizon, None, regime=arm.regime, differences=differences,
                      margin=margin.value, notes=tuple(notes))
    if differences:
        difference = statistics.estimate(list(differences.values()), level)
        verdict = dataclasses.replace(verdict, difference=difference, method="paired t")
        if difference.n < MIN_SEEDS:
            text = f"{difference.n} pair{'s' * (difference.n > 1)}: no verdict below {MIN_SEEDS}"
            return dataclasses.replace(verdict, notes=(text, *notes))
        if test == "sign_flip":
            if difference.n < MIN_FLIPS:
                text = f"{difference.n} pairs: no verdict of sign flips below {MIN_FLIPS}"
                return dataclasses.replace(verdict, notes=(text, *notes))
            values = list(differences.values())
            return dataclasses.replace(
                verdict, method="sign flips", p=statistics.flip_test(values), p_equal=statistics.equivalence(
                    lambda shift: statistics.flip_test_above(values, shift),
                    lambda shift: statistics.flip_test_above([-value for value in values], -shift), margin.tested))
    elif min(len(arm.values), len(base.values)) >= 2:
        difference = statistics.welch(list(arm.values.values()), list(base.values.values()), level)
        verdict = dataclasses.replace(verdict, difference=difference, method="Welch's t, as no seed is in both")
        if difference.n < MIN_SEEDS:
            text = f"{difference.n} seeds, of which none pairs: no verdict below {MIN_SEEDS}"
            return dataclasses.replace(verdict, notes=(text, *notes))
    else:
        missing = "neither has" if not arm.values and not base.values else "no pair:"
        return dataclasses.replace(verdict, notes=(f"{missing} a value with a seed that both have", *notes))
    return dataclasses.replace(
        verdict, p=statistics.t_test(difference), p_equal=statistics.equivalence(
            lambda shift: statistics.t_test_above(difference, shift),
            lambda shift: statistics.t_test_below(difference, shift), margin.tested))


def decide(verdict: Verdict, arm: Arm, base: Arm, criterion: Criterion, level: float, margin: Margin, family: int
           ) -> Verdict:
    """The outcome of a verdict whose p values are adjusted."""
    difference = verdict.difference
    if verdict.p_adjusted is None or verdict.p_equal_adjusted is None or difference is None:
        return verdict
    notes = list(verdict.notes)
    is_equal = margin.value is not None and verdict.p_equal_adjusted < level / margin.split
    outcome = "inconclusive"
    if verdict.p_adjusted < level:
        outcome = "better" if criterion.sort_key(difference.mean) < 0 else "worse"
    elif is_equal:
        outcome = "equal"
    # A run that diverged is worse than any loss, and cannot be averaged away.
    if arm.diverged and outcome in ("better", "equal"):
        notes.insert(0, f"{outcome} where it finished")
        outcome = "inconclusive"
    if base.diverged and outcome in ("worse", "equal"):
        notes.insert(0, f"{outcome} where the baseline finished")
        outcome = "inconclusive"
    needed = None
    if outcome == "inconclusive" and not arm.diverged and not base.diverged:
        needed = seeds_to_settle(difference, level, margin, family)
    return dataclasses.replace(verdict, outcome=outcome, needed=needed, notes=tuple(notes),
                               within_margin=is_equal and outcome in ("better", "worse"))


def seeds_to_settle(difference: Estimate, level: float, margin: Margin, family: int) -> int:
    """Seeds with which the verdict would be better, worse or equal with power POWER, if the true mean and spread of the
    differences are those observed. By the t test, at the level of the first step of Holm's adjustment."""
    assert difference.std_error is not None
    std = difference.std if difference.std is not None else difference.std_error * math.sqrt(difference.n)
    effect = abs(difference.mean)

    def equal(n: int) -> float:
        if margin.value is None:
            return 0.0
        tested = lower_bound(margin.value, n, level / 2 / family) if margin.n else margin.value
        return statistics.equivalence_power(effect, std, n, tested, level / margin.split / family)

    needed = [statistics.seeds_needed(lambda n: statistics.paired_power(effect, std, n, level / family), POWER),
              statistics.seeds_needed(equal, POWER)]
    least = min((n for n in needed if n is not None), default=statistics.MAX_SEEDS + 1)
    return max(least, difference.n + 1)


# ---- worth ----

def log_seconds(verdict: Verdict, baseline: str, trials: Mapping[tuple[str, int], StudyTrial]
                ) -> tuple[dict[int, float], set[str | None]]:
    """({seed: logarithm of the variant's seconds per token, relative to the baseline's}, the hardware of the pairs)."""
    logs, hardware = {}, set()
    for seed in verdict.differences:
        own, other = trials[verdict.variant, seed], trials[baseline, seed]
        hardware |= {own.hardware, other.hardware}
        if own.tokens_per_sec and other.tokens_per_sec:
            logs[seed] = math.log(other.tokens_per_sec / own.tokens_per_sec)
    return logs, hardware


def speed_of(verdict: Verdict, baseline: str, trials: Mapping[tuple[str, int], StudyTrial], level: float
             ) -> Ratio | None:
    """Tokens/s relative to the baseline: the geometric mean over the pairs, with its t interval."""
    logs, hardware = log_seconds(verdict, baseline, trials)
    if not logs or len(hardware) > 1:
        return None
    found = statistics.estimate([-log for log in logs.values()], level)
    if found.low is None or found.high is None or found.n < MIN_SEEDS:
        return Ratio(math.exp(found.mean), None, None)
    return Ratio(*map(math.exp, (found.mean, found.low, found.high)))


def pairing_of(verdicts: Sequence[Verdict], arms: Mapping[tuple[str, str, float], Arm], baseline: str) -> float | None:
    """Variance of the paired differences relative to that of as many unpaired seeds, both summed over the verdicts."""
    paired = unpaired = 0.0
    for verdict in verdicts:
        if len(verdict.differences) > 1:
            paired += variance(list(verdict.differences.values()))
            unpaired += sum(variance([arms[variant, verdict.size, verdict.horizon].values[seed]
                                      for seed in verdict.differences]) for variant in (verdict.variant, baseline))
    return paired / unpaired if unpaired else None


def worth_of(verdict: Verdict, arm: Arm, base: Arm, law: Law | str, trials: Mapping[tuple[str, int], StudyTrial],
             criterion: Criterion, level: float) -> Worth:
    if criterion.more_is_better:
        return Worth(notes=(f"worth is defined for losses, and more of {criterion.metric} is better",))
    if isinstance(law, str):
        return Worth(notes=(law,))
    if not verdict.differences:
        return Worth(law=law, notes=("worth needs pairs: seeds that both have",))
    flops = (arm.flops_per_token / base.flops_per_token if arm.flops_per_token and base.flops_per_token else None)
    log_times, hardware = log_seconds(verdict, base.variant, trials)
    found = worth(law, verdict.horizon, verdict.differences, flops, log_times if len(hardware) == 1 else None, level)
    if len(hardware) > 1:
        found = dataclasses.replace(found, notes=(*found.notes, "times are not compared: the pairs ran on "
                                                  + ", ".join(sorted(map(str, hardware)))))
    return found


def sign_changes(verdicts: Sequence[Verdict], level: float) -> list[str]:
    """One line for each variant whose difference changes its sign between two sizes, where that is more than noise.

    It is more than noise if Welch's test tells the differences at the two sizes apart, or one of them is a verdict of
    better or worse.
    """
    lines = []
    by_variant: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_variant.setdefault(verdict.variant, []).append(verdict)
    for own in by_variant.values():
        for one, other in itertools.combinations(own, 2):
            if (one.size == other.size or one.difference is None or other.difference is None
                    or one.difference.mean * other.difference.mean >= 0):
                continue
            here, elsewhere = list(one.differences.values()), list(other.differences.values())
            apart = (min(len(here), len(elsewhere)) >= MIN_SEEDS
                     and statistics.t_test(statistics.welch(here, elsewhere)) < level)
            if apart or {one.outcome, other.outcome} & {"better", "worse"}:
                certain = "" if apart else ", though the two sizes do not differ for certain"
                lines.append(f"{one.variant}: the sign changes between sizes: {one.difference.mean:+.4g} at "
                             f"{one.size}, {other.difference.mean:+.4g} at {other.size}{certain}")
    return lines


# ---- the judgement ----

def judge(study: Study, baseline: str, margin: float | None = None, level: float = 0.05, look: int | None = None,
          test: str = "t") -> Judgement:
    """Judge every variant of a study against the baseline.

    Args:
        study: see `Study`.
        baseline: name of a variant.
        margin: that was declared before the runs, in units of the criterion; None: the baseline's standard deviation
            over seeds, estimated from this study.
        level: probability of any false better or worse in the study, and of any false equal.
        look: None if the study is looked at once; else which look at it this is (1, 2, …). A look at results that were
            all seen before is not a new one.
        test: "t", or "sign_flip" for the exact permutation test of the pairs.

    Raises:
        UserError: there is no such baseline, or an argument is out of range.
    """
    variants = study.variants()
    if baseline not in variants:
        raise UserError(f"baseline: no variant is named {baseline!r}{did_you_mean(baseline, variants)}")
    if test not in TESTS:
        raise UserError(f"test: {test!r} is unknown{did_you_mean(test, list(TESTS))}")
    if not 0 < level < 1:
        raise UserError(f"level: {level} is out of range, must be between 0 and 1")
    if margin is not None and not 0 < margin < math.inf:
        raise UserError(f"margin: {margin} is out of range, must be positive")
    if look is not None and look < 1:
        raise UserError(f"look: {look} is out of range, must be at least 1")
    counting, earlier = duplicates(study.trials)
    groups = group_trials(counting)
    arms = {key: make_arm(trials, level) for key, trials in groups.items()}
    bases = {(size, horizon): arm for (variant, size, horizon), arm in arms.items() if variant == baseline}
    again: dict[Cell, list[tuple[float, float]]] = {}
    for trial, last in earlier:
        if trial.variant == baseline and trial.value is not None and last.value is not None:
            again.setdefault((trial.size, trial.horizon), []).append((trial.value, last.value))
    floors = {cell: noise_floor(arm, again.get(cell, []), level) for cell, arm in bases.items()}

    share_of_look = statistics.spend(level, look)
    judged = [arm for arm in arms.values() if arm.variant != baseline and arm.variant not in study.excluded
              and (arm.size, arm.horizon) in bases]
    family = max(1, len(judged))
    margins = {cell: margin_of(margin, floors[cell], share_of_look / len(bases)) for cell in bases}
    verdicts = [compare_arms(arm, bases[arm.size, arm.horizon], margins[arm.size, arm.horizon], test, level)
                for arm in judged]
    verdicts = adjust(verdicts)
    laws: dict[str, Law | str] = {}
    for size in dict.fromkeys(size for size, _ in bases):
        laws[size] = fit_law({horizon: arm.values for (own, horizon), arm in bases.items()
                              if own == size and horizon > 0 and arm.values})
    decided = []
    for verdict, arm in zip(verdicts, judged, strict=True):
        base, cell_margin = bases[arm.size, arm.horizon], margins[arm.size, arm.horizon]
        final = decide(verdict, arm, base, study.criterion, share_of_look, cell_margin, family)
        trials = {(trial.variant, trial.seed): trial for variant in (arm.variant, baseline)
                  for trial in groups[variant, arm.size, arm.horizon]}
        caution = [f"it differs in {study.cautions[arm.variant]}"] if arm.variant in study.cautions else []
        decided.append(dataclasses.replace(
            final, worth=worth_of(final, arm, base, laws[arm.size], trials, study.criterion, level),
            speed=speed_of(final, baseline, trials, level), notes=(*final.notes, *caution)))

    notes, warnings = [], [*study.warnings]
    warnings += [f"{variant}: not judged: {reason}" for variant, reason in study.excluded.items()]
    warnings += [f"{arm.variant}: not judged at {cell_text(arm.size, arm.horizon)}: the baseline has no run there"
                 for arm in arms.values() if arm.variant != baseline and (arm.size, arm.horizon) not in bases]
    warnings += sign_changes(decided, level)
    factors = {trial.variant: dict(trial.factors) for trial in counting}
    effects: dict[Cell, list[Effect]] = {}
    front: dict[Cell, list[str]] = {}
    for cell in bases:
        here = [arm for arm in arms.values() if (arm.size, arm.horizon) == cell and arm.variant not in study.excluded]
        effects[cell], problem = statistics.grid_effects({arm.variant: arm.values for arm in here}, factors, baseline,
                                                         level)
        notes += [problem] * bool(problem)
        front[cell] = front_of(here, study.criterion)
    return Judgement(baseline, study.criterion, test, level, look, share_of_look, margin, tuple(arms.values()),
                     tuple(decided), tuple(floors.values()), effects, front, pairing_of(decided, arms, baseline),
                     tuple(notes), tuple(warnings))


def adjust(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Holm's adjustment of both p values over the verdicts that have them."""
    tested = [verdict for verdict in verdicts if verdict.p is not None]
    adjusted = zip(statistics.holm([verdict.p or 0.0 for verdict in tested]),
                   statistics.holm([verdict.p_equal or 0.0 for verdict in tested]), strict=True)
    return [dataclasses.replace(verdict, p_adjusted=values[0], p_equal_adjusted=values[1])
            if verdict.p is not None and (values := next(adjusted)) else verdict
            for verdict in verdicts]


def front_of(arms: Sequence[Arm], criterion: Criterion) -> list[str]:
    """The variants on the Pareto front of the criterion, tokens/s and memory, of those that recorded all three."""
    costs = {arm.variant: (criterion.sort_key(arm.estimate.mean), -arm.tokens_per_sec, arm.peak_memory) for arm in arms
             if arm.estimate is not None and arm.tokens_per_sec is not None and arm.peak_memory is not None}
    return pareto_front(costs) if len(costs) > 1 else []
