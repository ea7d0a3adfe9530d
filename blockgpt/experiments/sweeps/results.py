"""The results of planned runs: as the trials that verdicts.py judges, and as what more runs can be expected to show."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from blockgpt.experiments.judgement import Judgement
from blockgpt.experiments.records import Run
from blockgpt.experiments.statistics import MIN_SEEDS, detectable_difference, spend
from blockgpt.experiments.study import Study, StudyTrial, trial_of_run
from blockgpt.experiments.sweeps.plan import COPY, SHUFFLED, Plan, PlannedRun, pooled_spread
from blockgpt.experiments.sweeps.runner import RunOutcome
from blockgpt.files import exists

STATUSES = {"diverged": "diverged", "failed": "failed", "refused": "failed", "open": "missing"}
POWER = 0.8


def study_of_plan(plan: Plan, runs: Sequence[PlannedRun], outcomes: Mapping[str, RunOutcome], folder: Path,
                  load_run: Callable[[Path], Run]) -> Study:
    """The judged runs and the baseline's horizons as a `Study`. A run without a result stays in it, with the reason.

    Args:
        outcomes: {id: outcome}.
        folder: of the study.
        load_run: reads a run directory.
    """
    tokens = {run.size: run.tokens for run in runs if run.variant == plan.baseline and run.purpose == "judge"}
    factors = factors_of(plan)
    trials, criteria = [], []
    for run in runs:
        outcome, run_dir = outcomes[run.id], folder / run.name
        # Variants are compared at the baseline's horizon, also where --equal gives them other steps.
        horizon = float(tokens[run.size] if run.purpose == "judge" else run.tokens)
        size = run.size if len(plan.sizes) > 1 else ""
        if exists(run_dir / "run.json"):
            loaded = load_run(run_dir)
            criteria += [loaded["criterion"]] if outcome.state == "finished" else []
            trial = trial_of_run(loaded, run.variant, run.seed, size, horizon, factors.get(run.variant))
        else:
            trial = StudyTrial(run.variant, run.seed, "missing", size=size, horizon=horizon, name=run.name,
                               factors=factors.get(run.variant, {}))
        if outcome.state != "finished":
            trial = dataclasses.replace(trial, status=STATUSES[outcome.state], value=None, reason=outcome.reason)
        trials.append(trial)
    return Study(trials, criteria[0]) if criteria else Study(trials)


def factors_of(plan: Plan) -> dict[str, dict[str, str]]:
    """{variant: {key: value}} of a grid, whose variants all set the same keys; {} for other plans."""
    variants = {name: keys for name, keys in plan.variants.items() if not (plan.control and name in (COPY, SHUFFLED))}
    names = {tuple(sorted(keys)) for keys in variants.values()}
    if len(names) > 1 or names == {()}:
        return {}
    return {variant: {key: str(value) for key, value in keys.items()} for variant, keys in variants.items()}


def pair_differences(plan: Plan, runs: Iterable[PlannedRun], outcomes: Mapping[str, RunOutcome]) -> list[list[float]]:
    """For each variant and size, variant - baseline of the finished pairs. A copy of the baseline has none."""
    values = {(run.variant, run.size, run.seed): outcomes[run.id].value for run in runs
              if run.purpose == "judge" and outcomes[run.id].state == "finished"}
    differences: dict[tuple[str, str], list[float]] = {}
    for (variant, size, seed), value in values.items():
        base = values.get((plan.baseline, size, seed))
        if variant not in (plan.baseline, COPY) and value is not None and base is not None:
            differences.setdefault((variant, size), []).append(value - base)
    return [*differences.values()]


def detectable_text(plan: Plan, differences: Sequence[Sequence[float]], look: int) -> str:
    """The smallest difference that the study's seeds can be expected to show, in words.

    Args:
        differences: of finished pairs, see `pair_differences`.
        look: which look at the verdicts the next one is.
    """
    n, family = len(plan.seeds), max(1, len(plan.others) * len(plan.sizes))
    if n < MIN_SEEDS:
        return f"none with {n} seeds: a verdict takes {MIN_SEEDS}"
    level = spend(plan.level, look) / family
    pairs = sum(len(values) for values in differences if len(values) > 1)
    spread, source = plan.spread, "declared"
    if spread is None:
        spread, source = pooled_spread(differences), f"of the {pairs} pairs that have finished"
    terms = (f"{POWER:.0%} power, level {plan.level:g} divided over {family} comparison{'s' * (family > 1)}, "
             f"look {look}")
    ratio = detectable_difference(1.0, n, level, POWER) or float("inf")
    if spread is None:
        return (f"{ratio:.1f} × the standard deviation of a pair's difference, which the first runs, or --spread, give "
                f"({n} seeds, {terms})")
    return f"{ratio * spread:.4f} with {n} seeds ({terms}, standard deviation {spread:.4f} {source})"


def control_lines(judgement: Judgement) -> tuple[list[str], bool]:
    """(one line for each part of the negative control, whether it passed).

    The copy of the baseline must have no verdict but equal or inconclusive, the shuffled tokens must be worse.
    """
    lines, passed = [], True
    for verdict in judgement.verdicts:
        if verdict.variant in (COPY, SHUFFLED):
            wanted = (None, "equal", "inconclusive") if verdict.variant == COPY else ("worse",)
            good = verdict.outcome in wanted
            passed &= good
            where = f", size {verdict.size}" if verdict.size else ""
            must = "tie" if verdict.variant == COPY else "lose"
            lines.append(f"control {'passed' if good else 'FAILED'}: {verdict.variant}{where} is "
                         f"{verdict.outcome or 'without a verdict'} (it must {must})")
    return lines, passed
