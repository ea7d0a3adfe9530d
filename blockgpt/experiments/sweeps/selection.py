"""What a study costs, what every variant spends alike, and which variants go on: pure functions of figures. No torch.

`Cost` is what is known of a variant before its runs. `equal_keys` sets the horizon of each variant (--equal),
`choose_rates` reads a learning rate sweep, `halving` and `survivors` are successive halving (Jamieson & Talwalkar
2016).
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from blockgpt.console import human_time
from blockgpt.errors import UserError, short_repr
from blockgpt.experiments.sweeps.plan import PlannedRun

Cell = tuple[str, str]  # (variant, size)
PARAMETER_TOLERANCE = 0.02  # of --equal params; what d_ff can be rounded to is far below it in models of real size
WIDTH_STEP = 8  # n_embd that --equal params solves for is a multiple of it and of 2 n_head
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Cost:
    """What is known of a variant at a size before it is trained.

    Attributes:
        parameters: of the model.
        flops_per_token: of training, by the PaLM convention.
        tokens_per_step: that a step trains on.
        steps: of its judged runs.
        eval_tokens: of one evaluation, and evaluations: how many a run has.
        memory, available: bytes that a step needs at its peak on one device, and that there are.
        advice: how to make it fit; "" if it fits.
        step_time, overhead: seconds of a step, and of a run beside its steps and evaluations; None if not probed.
    """

    parameters: int
    flops_per_token: float
    tokens_per_step: int
    steps: int
    eval_tokens: int
    evaluations: int
    memory: int
    available: int
    advice: str = ""
    step_time: float | None = None
    overhead: float | None = None

    def seconds(self, run: PlannedRun) -> float | None:
        """The expected duration of a run; an evaluation costs a third of training on as many tokens."""
        if self.step_time is None:
            return None
        evaluations = max(1, round(self.evaluations * run.steps / self.steps))
        per_token = self.step_time / self.tokens_per_step
        return (self.overhead or 0) + run.steps * self.step_time + evaluations * self.eval_tokens * per_token / 3

    def flops(self, run: PlannedRun) -> float:
        """The training FLOPs of a run."""
        return self.flops_per_token * run.tokens


# ---- what all variants spend alike


def equal_keys(equal: str, cells: Iterable[Cell], baseline: str,
               costs: Mapping[Cell, Cost]) -> dict[Cell, dict[str, Any]]:
    """{(variant, size): {"max_iters": steps}} that make all variants of a size spend what the baseline spends.

    Args:
        equal: tokens, flops or time (of the probe).
        costs: of every cell and of the baseline.

    Returns:
        Only cells whose steps change. Steps are rounded to the nearest.
    """
    spend: dict[str, Callable[[Cost], float]] = {
        "tokens": lambda cost: cost.tokens_per_step, "params": lambda cost: cost.tokens_per_step,
        "flops": lambda cost: cost.tokens_per_step * cost.flops_per_token, "time": lambda cost: cost.step_time or 0.0}
    keys = {}
    for variant, size in cells:
        own, base = costs[variant, size], costs[baseline, size]
        per_step = spend[equal](own)
        if not per_step or not spend[equal](base):
            raise UserError("--equal=time: the speed was not measured (drop --no_probe)")
        steps = max(1, round(base.steps * spend[equal](base) / per_step))
        if steps != own.steps:
            keys[variant, size] = {"max_iters": steps}
    return keys


def solve_width(target: int, count: Callable[[Mapping[str, Any]], int], d_ff: int, n_embd: int, n_head: int,
                fixed: Iterable[str] = ()) -> dict[str, Any]:
    """The keys that bring a variant to `target` parameters: d_ff, or n_embd where d_ff cannot.

    Args:
        count: {key: value} → the parameters of the variant with these keys.
        d_ff, n_embd, n_head: of the variant.
        fixed: keys that the study varies.

    Returns:
        {} if the variant has that many already.

    Raises:
        UserError: neither comes within PARAMETER_TOLERANCE.
    """
    own = count({})
    if own == target:
        return {}
    candidates: list[dict[str, Any]] = []
    if "d_ff" not in fixed:
        slope = count({"d_ff": d_ff + 1}) - count({"d_ff": d_ff})  # linear in d_ff
        solution = d_ff + round((target - count({"d_ff": d_ff})) / slope) if slope > 0 else 0
        if solution >= n_embd // 2:  # a narrower FFN is another kind of model
            candidates.append({"d_ff": solution})
    if "n_embd" not in fixed:
        step = math.lcm(WIDTH_STEP, 2 * n_head)  # rotary positions need an even head_dim
        low, high = 1, max(2, 4 * n_embd // step)
        while high - low > 1:  # parameters grow with the width
            middle_width = (low + high) // 2
            low, high = ((middle_width, high) if count({"n_embd": middle_width * step}) <= target
                         else (low, middle_width))
        candidates += [{"n_embd": low * step}, {"n_embd": high * step}]
    for keys in candidates:
        if abs(count(keys) - target) <= PARAMETER_TOLERANCE * target:
            return keys
    raise UserError(f"--equal=params: a variant of {own:,} parameters comes within {PARAMETER_TOLERANCE:.0%} of the "
                    f"baseline's {target:,} neither by d_ff nor by n_embd (--equal=flops, or set its sizes yourself)")


# ---- stages


def choose_rates(runs: Iterable[PlannedRun], values: Mapping[str, float | None],
                 rate_of: Callable[[PlannedRun], float]) -> dict[Cell, float]:
    """{(variant, size): the learning rate with the best mean value over the tuning seeds}.

    Args:
        runs: of the sweep.
        values: {id: value, less is better}; None or absent: it did not finish. A rate with such a run cannot win.
        rate_of: the learning rate of a run.

    Raises:
        UserError: a variant with which no rate has finished.
    """
    tried: dict[Cell, dict[float, list[float | None]]] = {}
    for run in runs:
        tried.setdefault((run.variant, run.size), {}).setdefault(rate_of(run), []).append(values.get(run.id))
    chosen = {}
    for cell, rates in tried.items():
        means = {rate: math.fsum(finished) / len(found) for rate, found in rates.items()
                 if len(finished := [value for value in found if value is not None]) == len(found)}
        if not means:
            raise UserError(f"--lr_sweep: variant {cell[0]}, size {cell[1]}: no learning rate finished (smaller ones?)")
        chosen[cell] = min(means, key=lambda rate: (means[rate], rate))
    return chosen


def at_the_edge(chosen: Mapping[Cell, float], rates: Sequence[float]) -> list[str]:
    """One line for each variant whose best rate is the smallest or largest tried: a better one may lie beyond."""
    return [f"variant {variant}, size {size}: the best learning rate, {rate:g}, is the "
            f"{'smallest' if rate == min(rates) else 'largest'} tried: a better one may lie beyond"
            for (variant, size), rate in chosen.items() if len(rates) > 1 and rate in (min(rates), max(rates))]


class Rung(NamedTuple):
    """One round of successive halving.

    entrants: how many variants run, beside the baseline. horizon: fraction of max_iters. leavers: how many are dropped.
    """

    entrants: int
    horizon: float
    leavers: int


def halving(others: int, judged: int) -> list[Rung]:
    """The rungs that bring `others` variants down to `judged`: half leave each time, and the horizon doubles."""
    assert 1 <= judged <= others
    counts = [others]
    while counts[-1] > judged:
        counts.append(max(judged, math.ceil(counts[-1] / 2)))
    return [Rung(count, 2.0 ** (i + 1 - len(counts)), count - after)
            for i, (count, after) in enumerate(itertools.pairwise(counts))]


def survivors(entrants: Sequence[str], baseline: str, sizes: Sequence[str],
              values: Mapping[Cell, float | None], n: int) -> list[str]:
    """The n variants with the best mean of value ÷ the baseline's over the sizes, in their declared order.

    A variant without a value at a size comes last. values: less is better.
    """
    def score(variant: str) -> float:
        ratios = []
        for size in sizes:
            own, base = values.get((variant, size)), values.get((baseline, size))
            if own is None:
                return math.inf
            ratios.append((own - base) / abs(base) if base else own)
        return math.fsum(ratios) / len(ratios)

    best = sorted(entrants, key=score)[:n]
    return [variant for variant in entrants if variant in best]


# ---- budgets


class Budget(NamedTuple):
    """amount: in seconds of this computer with its workers, or in training FLOPs, by `unit` (seconds, flops)."""

    amount: float
    unit: str

    def __str__(self) -> str:
        return human_time(self.amount) if self.unit == "seconds" else f"{self.amount:.3g} FLOPs"


def parse_budget(text: str) -> Budget:
    """'2h', '90m', '30s', '1d' or '1e15' (FLOPs).

    Raises:
        UserError: it is neither.
    """
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) ?(s|m|h|d|flops)?", text.strip().lower())
    try:
        amount = float(match[1]) if match else 0.0
    except ValueError:
        amount = 0.0
    if not match or not 0 < amount < math.inf:
        raise UserError(f"--budget: {short_repr(text)} is neither a time (2h, 90m, 30s) nor a number of FLOPs (1e15)")
    if match[2] in UNITS:
        return Budget(amount * UNITS[match[2]], "seconds")
    return Budget(amount, "flops")


def expense(runs: Iterable[PlannedRun], costs: Mapping[Cell, Cost], workers: int, unit: str) -> float | None:
    """What runs are expected to cost, in seconds with so many workers, or in FLOPs; None if the speed is unknown."""
    total = 0.0
    for run in runs:
        cost = costs[run.variant, run.size]
        amount = cost.flops(run) if unit == "flops" else cost.seconds(run)
        if amount is None:
            return None
        total += amount if unit == "flops" else amount / workers
    return total


def affordable(budget: Budget, others: int, expense_of: Callable[[int], float | None]) -> int:
    """The largest number of variants that can be judged within a budget, screening included.

    Args:
        others: variants beside the baseline.
        expense_of: number of judged variants → expected expense with its rungs of halving.

    Raises:
        UserError: not even one can, or the speed is unknown.
    """
    for judged in range(others, 0, -1):
        cost = expense_of(judged)
        if cost is None:
            raise UserError("--budget: a time needs the speed, which was not measured (drop --no_probe)")
        if cost <= budget.amount:
            return judged
    raise UserError(f"--budget: {budget} is not enough for one variant and the baseline (a smaller size, fewer seeds, "
                    "or a larger budget)")
