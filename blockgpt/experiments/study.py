"""A study: trials of variants that differ in what is asked, repeated over seeds, sizes and horizons. No torch.

A trial is one planned run with what became of it. Whoever has a plan builds its trials with `trial_of_run` and
`StudyTrial(…, status="missing")`; arms.py builds them from run directories alone. verdicts.py judges a study.
"""

import bisect
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from blockgpt.errors import UserError, did_you_mean
from blockgpt.experiments.records import Point, Run
from blockgpt.training.criterion import Criterion

TRIAL_STATUSES = ("finished", "diverged", "failed", "missing")
VAL_LOSS = Criterion()
SPENDS = ("tokens", "flops", "time")


@dataclasses.dataclass(frozen=True)
class StudyTrial:
    """One run of a variant with a seed, or the lack of it.

    Attributes:
        variant: what is compared.
        seed: trials of several variants with one seed are a pair.
        status: one of TRIAL_STATUSES. `missing`: has not ended, or was never started. `diverged`: its loss or gradient
            was not finite.
        value: the criterion's; None unless the trial has finished, and where it cannot be read from its curve.
        size: name of the model size; variants are compared within a size.
        horizon: tokens that the trial is planned to train on; variants are compared within a horizon.
        curve: its evaluations, by step.
        tokens_per_sec, peak_memory (bytes), flops_per_token, parameters, unique_tokens (training tokens of the
            dataset): None where not recorded.
        hardware: what it ran on; times on different hardware are not compared.
        factors: {factor: level} where the variants are cells of a grid.
        created_at: of the run; of several finished trials with one seed the newest counts.
        name: of the run, for messages.
        reason: why it has no value.
    """

    variant: str
    seed: int
    status: str = "finished"
    value: float | None = None
    size: str = ""
    horizon: float = 0.0
    curve: Sequence[Point] = ()
    tokens_per_sec: float | None = None
    peak_memory: float | None = None
    flops_per_token: float | None = None
    parameters: float | None = None
    unique_tokens: float | None = None
    hardware: str | None = None
    factors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    created_at: str = ""
    name: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        assert self.status in TRIAL_STATUSES, self.status
        assert self.status == "finished" or self.value is None, "only a finished trial has a value"


@dataclasses.dataclass(frozen=True)
class Study:
    """The trials of a study.

    Attributes:
        trials: in any order; each (variant, size, horizon, seed) once, or several times where it was run again.
        criterion: by which they are judged.
        excluded: {variant: why it cannot be compared with the baseline}; it gets no verdict.
        cautions: {variant: what differs besides the variant, so that its verdict must be read with care}.
        warnings: one line each, of the study as a whole.
    """

    trials: list[StudyTrial]
    criterion: Criterion = VAL_LOSS
    excluded: dict[str, str] = dataclasses.field(default_factory=dict)
    cautions: dict[str, str] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def variants(self) -> list[str]:
        """The names of the variants, in the order of their first trials."""
        return list(dict.fromkeys(trial.variant for trial in self.trials))


@dataclasses.dataclass(frozen=True)
class Reading:
    """Which value of a curve counts.

    Attributes:
        at: ("tokens" | "flops" | "time", amount): the value at this spend, interpolated between evaluations.
        last: the mean of the last `last` evaluations; 0: the best evaluation, as in the table of runs.
        bits_per_byte: val_bpb in place of the criterion.
    """

    at: tuple[str, float] | None = None
    last: int = 0
    bits_per_byte: bool = False

    def value(self, curve: Sequence[Point], criterion: Criterion) -> tuple[float | None, str]:
        """(value, "") of a curve, or (None, the reason)."""
        values = [point.bpb if self.bits_per_byte else point.value for point in curve]
        if self.at is not None:
            spend, amount = self.at
            return interpolate([(getattr(point, spend), value) for point, value in zip(curve, values, strict=True)],
                               spend, amount)
        if not values:
            return None, "it was never evaluated"
        if values[-1] is None:
            return None, "its last evaluation is not finite"
        if self.last:
            tail = [value for value in values[-self.last:] if value is not None]
            if len(tail) < self.last:
                return None, f"it has {len(tail)} finite ones of the last {self.last} evaluations"
            return math.fsum(tail) / len(tail), ""
        return min((value for value in values if value is not None), key=criterion.sort_key), ""


def interpolate(curve: Iterable[tuple[float | None, float | None]], spend: str, amount: float) -> tuple[float | None,
                                                                                                     str]:
    """(value, "") of a curve [(spent, value)] at an amount, linear between neighbours, never beyond the ends.

    Otherwise (None, the reason).
    """
    known = sorted((spent, value) for spent, value in curve if spent is not None and value is not None)
    if not known:
        return None, f"its evaluations do not record {spend}"
    spent = [x for x, _ in known]
    if not spent[0] <= amount <= spent[-1]:
        return None, f"it was evaluated from {spent[0]:.4g} to {spent[-1]:.4g} {spend}, and not at {amount:.4g}"
    after = bisect.bisect_left(spent, amount)
    if spent[after] == amount:
        return known[after][1], ""
    (x0, y0), (x1, y1) = known[after - 1:after + 1]
    return y0 + (y1 - y0) * (amount - x0) / (x1 - x0), ""


def parse_at(text: str) -> tuple[str, float]:
    """'tokens=1e9' → ("tokens", 1e9); `UserError` if it is no such text."""
    spend, _, amount = text.partition("=")
    if spend not in SPENDS:
        raise UserError(f"--at: {spend!r} is unknown{did_you_mean(spend, list(SPENDS))}, as in --at tokens=1e9")
    try:
        value = float(amount)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"--at: {amount!r} is not a positive number, as in --at {spend}=1e9 (time in seconds)")
    return spend, value


def trial_of_run(run: Run, variant: str, seed: int, size: str = "", horizon: float = 0.0,
                 factors: Mapping[str, str] | None = None, reading: Reading | None = None) -> StudyTrial:
    """The trial that a run is, as `records.read_run` has read it."""
    reading = reading or Reading()
    status, _, reason = run["status"].partition(": ")
    value: float | None = None
    if status == "finished":
        outcome = "diverged" if run["curve"] and run["curve"][-1].value is None else "finished"
        value, reason = reading.value(run["curve"], run["criterion"])
        if not run["curve"] and reading == Reading():  # an old run, whose results are in run.json alone
            value = run[run["criterion"].metric]
        value = value if outcome == "finished" else None
    elif status == "failed":
        outcome = "diverged" if reason.startswith("NonFiniteError") else "failed"
    else:
        outcome = "failed" if status == "broken" else "missing"
        reason = reason or status
    return StudyTrial(variant, seed, outcome, value, size, horizon, tuple(run["curve"]), run["tokens_per_sec"],
                 run["peak_memory"], run["flops_per_token"], run["parameters"], run["unique_tokens"],
                 run["environment"].get("hardware"), factors or {}, run["created_at"], run["name"], reason)


def duplicates(trials: Iterable[StudyTrial]) -> tuple[list[StudyTrial], list[tuple[StudyTrial, StudyTrial]]]:
    """(the trials that count, [(an earlier finished trial, the one that counts)] of the same variant and seed).

    Of several trials of one (variant, size, horizon, seed) the newest finished one counts, else the newest diverged
    one, else the newest.
    """
    order = {status: i for i, status in enumerate(("missing", "failed", "diverged", "finished"))}
    groups: dict[tuple[str, str, float, int], list[StudyTrial]] = {}
    for trial in trials:
        groups.setdefault((trial.variant, trial.size, trial.horizon, trial.seed), []).append(trial)
    counting, earlier = [], []
    for group in groups.values():
        *others, last = sorted(group, key=lambda trial: (order[trial.status], trial.created_at))
        counting.append(last)
        earlier += [(trial, last) for trial in others if trial.status == "finished"]
    return counting, earlier


def pareto_front(points: Mapping[str, Sequence[float]]) -> list[str]:
    """The names whose costs no other name undercuts in one coordinate without exceeding them in another.

    Args:
        points: {name: costs}, the less the better in each, of equal length.
    """
    def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))

    front: list[str] = []  # in this order whoever dominates a name precedes it, and so does one of the front
    for name in sorted(points, key=lambda name: tuple(points[name])):
        if not any(dominates(points[other], points[name]) for other in front):
            front.append(name)
    return front
