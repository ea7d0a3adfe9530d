"""The learning curves of a study as series: of each run, and their mean and range over the seeds of an arm."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from blockgpt.experiments.judgement import cell_text
from blockgpt.experiments.study import SPENDS, Study, StudyTrial, duplicates

# Okabe and Ito's palette without yellow, which is too light on white, and with grey. Neighbours differ in their dashes,
# too, so that curves which lie on each other are both seen.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
DASHES = ((), (6, 3), (2, 2), (8, 3, 2, 3))  # lengths of line and gap
MAX_SERIES = 28  # of one chart: 7 colours and 4 dashes in turn; beyond it two would look the same
AXES = {"tokens": "tokens", "flops": "training FLOPs", "time": "training time in seconds"}


class Mean(NamedTuple):
    """The mean over the seeds of an arm at one step, and their range."""

    x: float
    value: float
    low: float
    high: float
    n: int


@dataclasses.dataclass(frozen=True)
class Series:
    """The curves of one variant at one size and horizon.

    Attributes:
        index: of the variant in the study: decides its colour and dashes.
        trials: with a curve, by seed.
        bits_per_byte: whether val_bpb is the criterion.
    """

    variant: str
    index: int
    trials: tuple[StudyTrial, ...]
    bits_per_byte: bool = False

    @property
    def color(self) -> str:
        return PALETTE[self.index % len(PALETTE)]

    @property
    def dashes(self) -> tuple[int, ...]:
        return DASHES[self.index % len(DASHES)]

    def points(self, trial: StudyTrial, spend: str) -> list[tuple[float, float]]:
        """[(spent, value)] of a run, without evaluations that lack one of them."""
        pairs = [(getattr(point, spend), point.bpb if self.bits_per_byte else point.value) for point in trial.curve]
        return [(x, y) for x, y in pairs if x is not None and y is not None]

    def means(self, spend: str) -> list[Mean]:
        """At every step that all seeds have been evaluated at; runs that go on are shorter than finished ones."""
        rows: dict[float, list[tuple[float, float]]] = {}
        for trial in self.trials:
            for point in trial.curve:
                x, y = getattr(point, spend), point.bpb if self.bits_per_byte else point.value
                if x is not None and y is not None:
                    rows.setdefault(point.step, []).append((x, y))
        return [Mean(math.fsum(x for x, _ in row) / len(row), math.fsum(y for _, y in row) / len(row),
                     min(y for _, y in row), max(y for _, y in row), len(row))
                for _, row in sorted(rows.items()) if len(row) == len(self.trials)]


class Chart(NamedTuple):
    """The series of one size and horizon.

    left_out: variants beyond MAX_SERIES.
    """

    title: str
    series: list[Series]
    left_out: list[str]


def charts_of(study: Study, baseline: str | None = None) -> list[Chart]:
    """One chart for each size and horizon; those of the baseline alone only where there are no others."""
    variants = study.variants()
    variants.sort(key=lambda name: name != baseline)  # the baseline has the first colour
    cells: dict[tuple[str, float], dict[str, list[StudyTrial]]] = {}
    for trial in duplicates(study.trials)[0]:
        if trial.curve:
            cells.setdefault((trial.size, trial.horizon), {}).setdefault(trial.variant, []).append(trial)
    compared = [cell for cell in cells if len(cells[cell]) > 1] or list(cells)
    charts = []
    for cell in compared:
        names = sorted(cells[cell], key=variants.index)
        series = [Series(name, variants.index(name), tuple(sorted(cells[cell][name], key=lambda trial: trial.seed)),
                         study.criterion.metric == "val_bpb") for name in names[:MAX_SERIES]]
        charts.append(Chart(cell_text(*cell) if any(cell) else "all runs", series, names[MAX_SERIES:]))
    return charts


def drawn_spends(series: Iterable[Series]) -> list[str]:
    """The axes of tokens, FLOPs and time that at least one run has recorded."""
    return [spend for spend in SPENDS if any(one.points(trial, spend) for one in series for trial in one.trials)]


def value_range(series: Sequence[Series], spend: str) -> tuple[float, float, bool]:
    """(lowest, highest value to draw, whether evaluations above it are cut off).

    The first tenth of the runs would leave no room for differences between the curves.
    """
    points = [point for one in series for trial in one.trials for point in one.points(trial, spend)]
    end = max((x for x, _ in points), default=0.0)
    late = [y for x, y in points if x >= end / 10] or [y for _, y in points] or [0.0, 1.0]
    low, high = min(late), max(late)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin, any(y > high + margin or y < low - margin for _, y in points)
