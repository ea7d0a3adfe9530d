"""What a judgement of a study is made of: arms, noise floors, verdicts. verdicts.py makes it."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from blockgpt.experiments.statistics import Effect, Estimate
from blockgpt.experiments.worth import Ratio, Worth
from blockgpt.training.criterion import Criterion

Cell = tuple[str, float]  # size, horizon


def cell_text(size: str, horizon: float) -> str:
    """'demo, 4.1e+06 tokens' of a size and a horizon, as far as they are given."""
    return ", ".join([*([size] if size else []), *([f"{horizon:.4g} tokens"] if horizon else [])]) or "this size"


class Regime(NamedTuple):
    """Where in the space of training runs a verdict holds. None: not recorded."""

    tokens: float | None
    unique_tokens: float | None
    parameters: float | None

    @property
    def epochs(self) -> float | None:
        """Tokens per unique token."""
        return self.tokens / self.unique_tokens if self.tokens and self.unique_tokens else None

    @property
    def tokens_per_parameter(self) -> float | None:
        return self.tokens / self.parameters if self.tokens and self.parameters else None


UNKNOWN = Regime(None, None, None)
NO_WORTH = Worth()


class NoiseFloor(NamedTuple):
    """The spread of the baseline against itself under other seeds (A/A).

    Attributes:
        n: seeds.
        std: over seeds; low and high of its interval. None for n = 1.
        again: (an earlier run's value, today's) of seeds that were run twice.
    """

    size: str
    horizon: float
    n: int
    std: float | None
    low: float | None
    high: float | None
    again: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One variant at one size and horizon, over its seeds.

    Attributes:
        estimate: of the criterion over the finished trials; None if there are none.
        values: {seed: value} of these.
        diverged, failed, missing: the seeds of trials that have no value, by status.
        unread: {seed: why the value of a finished trial could not be read}.
        tokens_per_sec, peak_memory: means over the trials that recorded them.
    """

    variant: str
    size: str
    horizon: float
    estimate: Estimate | None
    values: Mapping[int, float]
    diverged: tuple[int, ...]
    failed: tuple[int, ...]
    missing: tuple[int, ...]
    unread: Mapping[int, str]
    tokens_per_sec: float | None
    peak_memory: float | None
    flops_per_token: float | None
    regime: Regime


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is known of a variant against the baseline at one size and horizon.

    Attributes:
        outcome: better, worse, equal or inconclusive; None where there is only a number, or nothing.
        difference: variant - baseline, of the criterion; None if there is none.
        differences: {seed: difference} of the pairs; empty where nothing pairs.
        method: the test, in words.
        p, p_adjusted: of the difference, and adjusted for the family; None where it was not tested.
        p_equal, p_equal_adjusted: of the two one-sided tests.
        margin: that equality was tested against; None if there is none.
        within_margin: whether a better or worse variant is also equal within the margin.
        needed: seeds that would settle an inconclusive verdict with power POWER if mean and spread of the differences
            are those observed; MAX_SEEDS + 1 for more.
        speed: tokens/s of the variant relative to those of the baseline; None without times on one hardware.
        notes: half pairs, divergences, cautions: one line each.
    """

    variant: str
    size: str
    horizon: float
    outcome: str | None
    difference: Estimate | None = None
    differences: Mapping[int, float] = dataclasses.field(default_factory=dict)
    method: str = ""
    p: float | None = None
    p_adjusted: float | None = None
    p_equal: float | None = None
    p_equal_adjusted: float | None = None
    margin: float | None = None
    within_margin: bool = False
    needed: int | None = None
    worth: Worth = NO_WORTH
    speed: Ratio | None = None
    regime: Regime = UNKNOWN
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Judgement:
    """All that `verdicts.judge` has found; verdict_text.py prints it.

    Attributes:
        level: of the study; level_here: of this look.
        declared_margin: None if it was estimated.
        effects: of a full grid, by (size, horizon).
        pairing: variance of the paired differences relative to that of unpaired seeds, pooled over the verdicts; None
            where no seeds pair.
        front: names of variants on the Pareto front of loss, tokens/s and memory, by (size, horizon).
        notes, warnings: one line each.
    """

    baseline: str
    criterion: Criterion
    test: str
    level: float
    look: int | None
    level_here: float
    declared_margin: float | None
    arms: tuple[Arm, ...]
    verdicts: tuple[Verdict, ...]
    floors: tuple[NoiseFloor, ...]
    effects: Mapping[Cell, list[Effect]]
    front: Mapping[Cell, list[str]]
    pairing: float | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
