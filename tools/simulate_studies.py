"""How often the verdicts are wrong: simulated studies whose truth is known, judged as real ones are.

    python -m tools.simulate_studies                    prints the rates of docs/EXPERIMENTS.md
    python -m tools.simulate_studies --studies 200      faster
    python -m tools.simulate_studies --runs 'ablations/aa/*' --seeds 3      real runs of one baseline with itself

The loss of a simulated run is a term of its seed, which all variants share, plus a term of its own, both normal. Real
runs must differ in the seed alone. Every comparison takes runs of its own, as many for both sides as --seeds says, so
that no two seeds are equal and nothing pairs (Welch's t).
"""

import dataclasses
import math
import os
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.console import ArgumentParser, check_ranges
from blockgpt.errors import UserError, exit_on_user_error
from blockgpt.experiments.arms import find_arms
from blockgpt.experiments.judgement import Verdict
from blockgpt.experiments.study import Study, StudyTrial
from blockgpt.experiments.verdict_text import interval_text, outcome_text
from blockgpt.experiments.verdicts import judge
from blockgpt.experiments.worth import fit_law, worth
from compare_architectures import load_runs, select_runs

SEED_STD, OWN_STD = 1.0, 0.5  # of the two terms, in units of the loss


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What is simulated.

    Attributes:
        variants: besides the baseline.
        seeds: of the study at each look; more than one entry is optional stopping, which ends a study at the first look
            that calls a variant better or worse.
        effect: true difference of every variant.
        margin: declared; None: estimated.
        test: see `judge`.
        own_std: of a run's own term.
    """

    variants: int = 1
    seeds: tuple[int, ...] = (5,)
    effect: float = 0.0
    margin: float | None = None
    test: str = "t"
    own_std: float = OWN_STD


def simulate(scenario: Scenario, studies: int, seed: int = 0) -> dict[str, float]:
    """{outcome: proportion of the studies in which a variant had it at a look}; "decided" is better or worse.

    A worse variant that is also within the margin counts as equal, too.
    """
    counts = dict.fromkeys(("better", "worse", "equal", "inconclusive", "decided"), 0)
    for i in range(studies):
        rng = random.Random(seed * 1_000_003 + i)
        outcomes: set[str | None] = set()
        trials: list[StudyTrial] = []
        for look, n in enumerate(scenario.seeds, 1):
            for s in range(len({trial.seed for trial in trials}), n):
                common = rng.gauss(0, SEED_STD)
                trials += [StudyTrial(f"variant {v}" if v else "baseline", s, "finished", common + rng.gauss(
                    scenario.effect if v else 0.0, scenario.own_std)) for v in range(scenario.variants + 1)]
            judgement = judge(Study(trials), "baseline", scenario.margin, test=scenario.test,
                              look=look if len(scenario.seeds) > 1 else None)
            outcomes |= {verdict.outcome for verdict in judgement.verdicts}
            outcomes |= {"equal" for verdict in judgement.verdicts if verdict.within_margin}
            if outcomes & {"better", "worse"}:
                break
        for outcome in outcomes & counts.keys():
            counts[str(outcome)] += 1
        counts["decided"] += bool(outcomes & {"better", "worse"})
    return {outcome: count / studies for outcome, count in counts.items()}


def simulate_worth(studies: int, seeds: int, difference: float, horizons: Sequence[float] = (1e6, 2e6, 4e6, 8e6),
                   noise: float = 0.003, seed: int = 0) -> tuple[float, float]:
    """(proportion of the 95 % intervals that hold the true ratio, mean width of the interval).

    The baseline follows 1.7 + 400 · D^-0.34 (near Hoffmann et al. 2022); the variant is read at the third horizon.
    """
    def law(tokens: float) -> float:
        return 1.7 + 400 * tokens**-0.34

    horizon = horizons[2]
    truth = (1 + difference / (law(horizon) - 1.7))**(1 / 0.34)
    hits, widths = 0, 0.0
    for i in range(studies):
        rng = random.Random(seed * 1_000_003 + i)
        common = [rng.gauss(0, noise) for _ in range(seeds)]
        losses = {tokens: {s: law(tokens) + common[s] + rng.gauss(0, noise / 3) for s in range(seeds)}
                  for tokens in horizons}
        differences = {s: law(horizon) + difference + common[s] + rng.gauss(0, noise / 3) - losses[horizon][s]
                       for s in range(seeds)}
        fitted = fit_law(losses)
        assert not isinstance(fitted, str), fitted
        ratio = worth(fitted, horizon, differences).tokens
        assert ratio is not None and ratio.low is not None and ratio.high is not None
        hits += ratio.low <= truth <= ratio.high
        widths += ratio.high - ratio.low
    return hits / studies, widths / studies


def compare_with_itself(values: Mapping[int, float], seeds: int) -> list[Verdict]:
    """Verdicts of a baseline against itself: each takes the next `seeds` for one side and the next for the other.

    Args:
        values: {seed: criterion} of runs that differ in nothing else.
        seeds: of a side.
    """
    order = sorted(values)
    verdicts: list[Verdict] = []
    for start in range(0, len(order) - 2 * seeds + 1, 2 * seeds):
        sides = {"baseline": order[start:start + seeds], "again": order[start + seeds:start + 2 * seeds]}
        trials = [StudyTrial(side, seed, "finished", values[seed]) for side, own in sides.items() for seed in own]
        verdicts += judge(Study(trials), "baseline").verdicts
    return verdicts


def binomial_interval(successes: int, trials: int) -> tuple[float, float]:
    """The exact interval of a rate (Clopper and Pearson 1934), with 2.5 % beyond each end."""
    from scipy import special

    low = special.betaincinv(successes, trials - successes + 1, 0.025) if successes else 0.0
    high = special.betaincinv(successes + 1, trials - successes, 0.975) if successes < trials else 1.0
    return float(low), float(high)


def print_real_comparisons(pattern: str, seeds: int) -> None:
    """A line for each comparison and their rate; `UserError` unless the runs differ in the seed alone and suffice."""
    runs = [run for run in load_runs(select_runs([pattern], "")) if run["status"] == "finished"]
    arms = find_arms(runs)
    if len(arms) != 1 or len(runs) < 2 * seeds:
        problem = f"{len(arms)} experiments" if len(arms) > 1 else f"{len(runs)} finished runs"
        raise UserError(f"--runs: {pattern} has {problem}, but needs {2 * seeds} or more that differ in the seed alone")
    verdicts = compare_with_itself({run["config"]["seed"]: run[run["criterion"].metric] for run in runs}, seeds)
    print("| difference | 95 % | p | verdict |\n| --- | --- | --- | --- |")
    for verdict in verdicts:
        found = verdict.difference
        assert found is not None and verdict.p is not None
        print(f"| {found.mean:+.4f} | {interval_text(found.low, found.high, '+.4f')} | {verdict.p:.2g} | "
              f"{outcome_text(verdict)} |")
    decided = sum(verdict.outcome in ("better", "worse") for verdict in verdicts)
    low, high = binomial_interval(decided, len(verdicts))
    print(f"\nbetter or worse: {decided} of {len(verdicts)} ({decided / len(verdicts):.1%}, 95 % [{low:.1%}, "
          f"{high:.1%}])")


LOOKS = (3, 4, 5, 6, 8, 10)
SCENARIOS = {
    **{f"A/A, {n} variant{'s' * (n > 1)}, one look at 5 seeds": (Scenario(n), "decided") for n in (1, 3, 10)},
    **{f"A/A, {n} variant{'s' * (n > 1)}, ended at the first verdict of looks at {LOOKS} seeds":
       (Scenario(n, LOOKS), "decided") for n in (1, 3, 10)},
    "A/A, 3 variants, sign flips, one look at 8 seeds": (Scenario(3, (8,), test="sign_flip"), "decided"),
    "true difference = declared margin, 5 seeds: called equal": (
        Scenario(1, (5,), 1.0, 1.0, own_std=0.2), "equal"),
    "true difference = std of the baseline, margin estimated from 5 seeds: called equal": (
        Scenario(1, (5,), math.hypot(1.0, 0.1), own_std=0.1), "equal"),
    "the same with 10 seeds and 3 variants": (Scenario(3, (10,), math.hypot(1.0, 0.1), own_std=0.1), "equal"),
    "true difference 1.0, std of the differences 0.71, 5 seeds: called worse": (Scenario(1, (5,), 1.0), "worse"),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m tools.simulate_studies", description="Rates of wrong and right verdicts.")
    parser.add_argument("--studies", type=int, default=1000, help="of each scenario")
    parser.add_argument("--runs", type=os.path.expanduser, metavar="GLOB", help="judge these real runs instead")
    parser.add_argument("--seeds", type=int, default=3, help="with --runs: of each side of a comparison")
    args = parser.parse_args(argv)
    check_ranges(args, {"studies": (args.studies >= 1, "at least 1"), "seeds": (args.seeds >= 3, "at least 3")})
    if args.runs is not None:
        return print_real_comparisons(args.runs, args.seeds)
    print("| scenario | rate |\n| --- | --- |")
    for name, (scenario, outcome) in SCENARIOS.items():
        print(f"| {name} | {simulate(scenario, args.studies)[outcome]:.1%} |", flush=True)
    for seeds, difference in ((3, -0.03), (5, -0.03), (5, 0.0), (10, -0.15)):
        coverage, width = simulate_worth(args.studies, seeds, difference)
        print(f"| worth: 95 % interval holds the truth, {seeds} seeds, difference {difference:g} (mean width "
              f"{100 * width:.2g} %) | {coverage:.1%} |", flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
