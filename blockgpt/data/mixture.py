"""Several datasets in one run: the source of each sequence, by weights that may change from phase to phase.

All sequences have the same length, so fractions of tokens are fractions of sequences. Within a phase the sources follow
a table that is repeated: after any number of sequences each source is less than one sequence away from its exact
fraction, and after each whole table exactly on it. The source of a sequence is a function of its sequence id alone.
"""

import bisect
import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch

from blockgpt.data.loader import Batch, GlobalBatches
from blockgpt.errors import ConfigError

MAX_PERIOD = 100_000  # sequences of a table

Phases = Sequence[tuple[int, Mapping[str, float]]]  # [(first step, {source: weight})], the first at step 0


def exact_fractions(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """The weights as fractions that sum to 1. A weight of 0.3 means 3/10, and 0.3333333333 a third."""
    exact = {}
    for name, weight in weights.items():
        simple = Fraction(weight).limit_denominator(1000)
        exact[name] = simple if abs(simple - Fraction(weight)) * 10**9 <= weight else Fraction(str(weight))
    total = sum(exact.values())
    return {name: weight / total for name, weight in exact.items()}


def balanced_table(counts: Sequence[int]) -> np.ndarray:
    """Source i counts[i] times, in an order in which each prefix is close to the fractions: (sum of counts,) int64.

    With m sources none is ever more than 1 - 1 / (2m - 2) sequences from its fraction (Tijdeman 1980, the chairman
    assignment problem): each position goes to a source that is due, of several to the one with the earliest deadline.
    """
    period, sources = sum(counts), [i for i, c in enumerate(counts) if c]
    if len(sources) == 1:
        return np.full(period, sources[0], np.int64)
    slack = 2 * len(sources) - 2
    table, consumed = np.empty(period, np.int64), [0] * len(counts)
    for position in range(period):
        owed = {i: counts[i] * (position + 1) - period * consumed[i] for i in sources}  # in units of 1 / period
        due = [i for i in sources if slack * owed[i] >= period]
        chosen = min(due, key=lambda i: Fraction(period * (slack - 1) - slack * owed[i], counts[i]))
        table[position] = chosen
        consumed[chosen] += 1
    return table


@dataclasses.dataclass(frozen=True)
class Phase:
    """The sources from sequence `first` on.

    Attributes:
        first: sequence id.
        table: (period,) the source of each position; the phase repeats it.
        occurrences: (period,) how often the position's source occurs in the table before the position.
        counts: (sources,) how often each source occurs in the table.
        consumed_before: (sources,) sequences that the earlier phases read from each source.
    """

    first: int
    table: np.ndarray
    occurrences: np.ndarray
    counts: np.ndarray
    consumed_before: np.ndarray

    def consumed(self, n: int) -> np.ndarray:
        """Sequences of each source among the first n of the run, where n is in this phase: (sources,) int64."""
        repeats, rest = divmod(n - self.first, len(self.table))
        return self.consumed_before + repeats * self.counts + np.bincount(self.table[:rest], minlength=len(self.counts))


class Mixture:
    """Which source each sequence of a run comes from.

    Attributes:
        names: of the sources, sorted; a source's index is its index in this list.
        fractions: for each phase, {source: its fraction}.

    Raises:
        ConfigError: the weights of a phase need a table of more than MAX_PERIOD sequences.
    """

    def __init__(self, phases: Phases, sequences_per_step: int) -> None:
        self.names = sorted({name for _, weights in phases for name, weight in weights.items() if weight})
        self.fractions: list[dict[str, Fraction]] = []
        self.phases: list[Phase] = []
        consumed_before = np.zeros(len(self.names), np.int64)
        for step, weights in phases:
            fractions = exact_fractions(weights)
            period = math.lcm(*(fraction.denominator for fraction in fractions.values()))
            if period > MAX_PERIOD:
                raise ConfigError("dataset", f"the weights {weights} are met exactly only after {period:,} sequences, "
                                             f"more than {MAX_PERIOD:,} (round them to three digits)")
            counts = [int(fractions.get(name, 0) * period) for name in self.names]
            table = balanced_table(counts)
            occurrences = np.empty(period, np.int64)
            for i in range(len(self.names)):
                positions = np.flatnonzero(table == i)
                occurrences[positions] = np.arange(len(positions))
            if self.phases:
                consumed_before = self.phases[-1].consumed(step * sequences_per_step)
            self.phases.append(Phase(step * sequences_per_step, table, occurrences, np.array(counts), consumed_before))
            self.fractions.append({name: fractions.get(name, Fraction(0)) for name in self.names})
        self.first_ids = np.array([phase.first for phase in self.phases])

    def assign(self, sequence_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source index, sequence id within that source) of each sequence, (B,) int64 each."""
        source, source_ids = np.empty_like(sequence_ids), np.empty_like(sequence_ids)
        phase_index = np.searchsorted(self.first_ids, sequence_ids, side="right") - 1
        for i in np.unique(phase_index):
            phase, rows = self.phases[i], phase_index == i
            repeats, position = np.divmod(sequence_ids[rows] - phase.first, len(phase.table))
            source[rows] = chosen = phase.table[position]
            source_ids[rows] = (phase.consumed_before[chosen] + repeats * phase.counts[chosen]
                                + phase.occurrences[position])
        return source, source_ids

    def consumed(self, n: int) -> dict[str, int]:
        """{source: sequences of it among the first n of the run}."""
        phase = self.phases[int(np.searchsorted(self.first_ids, n, side="right")) - 1]
        return dict(zip(self.names, phase.consumed(n).tolist(), strict=True))


class MixedBatches(GlobalBatches):
    """The training batches of a run on several sources, each with its own order and its own epochs.

    Args:
        sources: {name: batches} that read a source by its own sequence ids.
        mixture: of the same names.
    """

    def __init__(self, sources: Mapping[str, GlobalBatches], mixture: Mixture, batch_size: int,
                 gradient_accumulation_steps: int = 1) -> None:
        super().__init__(batch_size, gradient_accumulation_steps)
        self.mixture = mixture
        self.sources = [sources[name] for name in mixture.names]

    def read(self, sequence_ids: np.ndarray) -> Batch:
        source, source_ids = self.mixture.assign(sequence_ids)
        rows = [np.flatnonzero(source == i) for i in range(len(self.sources))]
        batches = [self.sources[i].read(source_ids[r]) for i, r in enumerate(rows) if len(r)]
        order = torch.from_numpy(np.argsort(np.concatenate(rows)))  # puts the rows of all sources back in place
        return {name: torch.cat([batch[name] for batch in batches])[order] for name in batches[0]}

    def offsets(self, sequence_ids: np.ndarray) -> list[tuple[str, int]]:
        source, source_ids = self.mixture.assign(sequence_ids)
        return [self.sources[s].offsets(i[None])[0] for s, i in zip(source, source_ids, strict=True)]

    def n_targets(self, sequence_ids: np.ndarray) -> int:
        source, source_ids = self.mixture.assign(sequence_ids)
        return sum(self.sources[i].n_targets(source_ids[source == i]) for i in np.unique(source))


def source_seed(seed: int, name: str) -> int:
    """The seed of one source, so that two sources of the same size are not read in the same order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")


def describe_phases(phases: Phases) -> str:
    """The phases in words: "70% fineweb + 30% pycode, from step 2000 pycode"."""
    def describe(weights: Mapping[str, float]) -> str:
        fractions = exact_fractions(weights)
        if len(fractions) == 1:
            return next(iter(fractions))
        return " + ".join(f"{float(100 * fraction):.4g}% {name}" for name, fraction in sorted(fractions.items()))

    return ", ".join(f"from step {step} {describe(weights)}" if step else describe(weights) for step, weights in phases)


def check_epochs(mixture: Mixture, epoch_sequences: Mapping[str, int], max_epochs: float | Mapping[str, float] | None,
                 max_iters: int, sequences_per_step: int) -> None:
    """`ConfigError` if the run would read a source more often than max_epochs.

    Args:
        epoch_sequences: {source: sequences of one epoch}.
        max_epochs: for all sources, or {source: epochs}; None: no limit.
    """
    if max_epochs is None:
        return
    if isinstance(max_epochs, Mapping):
        limits = dict(max_epochs)
        if unknown := sorted(set(limits) - set(epoch_sequences)):
            raise ConfigError("max_epochs", f"{unknown[0]} is not among the sources "
                                            f"({', '.join(sorted(epoch_sequences))})")
    else:
        limits = dict.fromkeys(epoch_sequences, max_epochs)
    capacity = {name: epochs * epoch_sequences[name] for name, epochs in limits.items()}

    def exceeded(steps: int) -> dict[str, int]:
        """{source: sequences} of the sources that a run of so many steps reads too often."""
        consumed = mixture.consumed(steps * sequences_per_step)
        return {name: consumed[name] for name in capacity if consumed[name] > capacity[name]}

    for name, count in exceeded(max_iters).items():
        steps = bisect.bisect_left(range(max_iters), True, key=lambda n: bool(exceeded(n + 1)))
        fix = f"max_iters at most {steps}"
        if len(mixture.phases) == 1 and len(epoch_sequences) > 1:
            fix += f", or {name} at most {capacity[name] / (max_iters * sequences_per_step):.4g} of the mixture"
        raise ConfigError("max_epochs", f"{name} would be read {count / epoch_sequences[name]:.3g} times by step "
                                        f"{max_iters}, more than {limits[name]:g} times ({fix})")
