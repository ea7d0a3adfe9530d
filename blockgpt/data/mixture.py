"""Several sources in one run: which of them each sequence comes from, by ratio and by phase.

Sequences are of one length, so ratios of tokens are ratios of sequences. Within a phase the sources follow a fixed
table, repeated: after any number of sequences each source is less than one away from its exact share, and after
every whole table exactly on it. Like the batches, the choice is a function of the sequence's number alone.
"""

import dataclasses
import hashlib
import math
from fractions import Fraction

import numpy as np
import torch

from blockgpt.data.loader import GlobalBatches
from blockgpt.errors import ConfigError

LONGEST_TABLE = 100_000  # sequences after which a ratio must come out even


def exact_shares(ratios):
    """{name: number} -> {name: Fraction} that sum to 1. 0.3 means 3/10, and 0.3333333333 a third."""
    exact = {}
    for name, ratio in ratios.items():
        simple = Fraction(ratio).limit_denominator(1000)
        exact[name] = simple if abs(simple - Fraction(ratio)) * 10**9 <= ratio else Fraction(str(ratio))
    total = sum(exact.values())
    return {name: ratio / total for name, ratio in exact.items()}


def balanced_table(counts):
    """Source numbers, counts[i] times i, in an order that keeps every prefix close to the shares: (sum,) int64.

    Of m sources none is ever further than 1 - 1 / (2m - 2) from its share (Tijdeman 1980, the chairman assignment
    problem): each place goes to a source that is due, of these to the one that would first be late.
    """
    period, sources = sum(counts), [i for i, c in enumerate(counts) if c]
    if len(sources) == 1:
        return np.full(period, sources[0], np.int64)
    slack = 2 * len(sources) - 2
    table, consumed = np.empty(period, np.int64), [0] * len(counts)
    for place in range(period):
        ahead = {i: counts[i] * (place + 1) - period * consumed[i] for i in sources}  # what is owed, in 1 / period
        due = [i for i in sources if slack * ahead[i] >= period]
        chosen = min(due, key=lambda i: Fraction(period * (slack - 1) - slack * ahead[i], counts[i]))
        table[place] = chosen
        consumed[chosen] += 1
    return table


@dataclasses.dataclass(frozen=True)
class Phase:
    """From sequence `first` on: the table, how often a source stood in it before each place, counts of a whole table.

    before: (sources,) sequences that earlier phases took.
    """

    first: int
    table: np.ndarray
    ranks: np.ndarray
    counts: np.ndarray
    before: np.ndarray

    def consumed(self, k):
        """Sequences of each source among the first k of the run, k in this phase: (sources,) int64."""
        rounds, rest = divmod(k - self.first, len(self.table))
        return self.before + rounds * self.counts + np.bincount(self.table[:rest], minlength=len(self.counts))


class Mixture:
    """The sources of a run's sequences. names: of the sources, sorted, by which they are numbered.

    phases: [(step, {name: ratio})], the first at step 0. Their order in a dict does not matter.
    `ConfigError` for ratios that come out even only after LONGEST_TABLE sequences.
    """

    def __init__(self, phases, sequences_per_step):
        self.names = sorted({name for _, ratios in phases for name, ratio in ratios.items() if ratio})
        self.shares = []  # [{name: Fraction}], a phase each
        self.phases = []
        before = np.zeros(len(self.names), np.int64)
        for step, ratios in phases:
            shares = exact_shares(ratios)
            period = math.lcm(*(share.denominator for share in shares.values()))
            if period > LONGEST_TABLE:
                raise ConfigError("dataset", f"the ratios {ratios} come out even only after {period:,} sequences "
                                             "(round them to three digits)")
            counts = [int(shares.get(name, 0) * period) for name in self.names]
            table = balanced_table(counts)
            ranks = np.empty(period, np.int64)
            for i in range(len(self.names)):
                mine = np.flatnonzero(table == i)
                ranks[mine] = np.arange(len(mine))
            if self.phases:
                before = self.phases[-1].consumed(step * sequences_per_step)
            self.phases.append(Phase(step * sequences_per_step, table, ranks, np.array(counts), before))
            self.shares.append({name: shares.get(name, Fraction(0)) for name in self.names})
        self.firsts = np.array([phase.first for phase in self.phases])

    def assign(self, k):
        """Where the k-th sequences come from, k (B,) int64: (source numbers, their numbers within it), both (B,)."""
        source, index = np.empty_like(k), np.empty_like(k)
        numbers = np.searchsorted(self.firsts, k, side="right") - 1
        for number in np.unique(numbers):
            phase, here = self.phases[number], numbers == number
            rounds, place = np.divmod(k[here] - phase.first, len(phase.table))
            source[here] = chosen = phase.table[place]
            index[here] = phase.before[chosen] + rounds * phase.counts[chosen] + phase.ranks[place]
        return source, index

    def consumed(self, k):
        """{name: sequences of it among the first k of the run}."""
        phase = self.phases[int(np.searchsorted(self.firsts, k, side="right")) - 1]
        return dict(zip(self.names, phase.consumed(k).tolist(), strict=True))


class MixedBatches(GlobalBatches):
    """The training sequences of a run on several sources, of which each has its own order and its own epochs.

    sources: {name: batches}, whose `sequences` and `n_targets` are read; mixture: a `Mixture` of the same names.
    """

    def __init__(self, sources, mixture, batch_size, gradient_accumulation_steps=1):
        super().__init__(batch_size, gradient_accumulation_steps)
        self.mixture = mixture
        self.sources = [sources[name] for name in mixture.names]

    def sequences(self, k):
        source, index = self.mixture.assign(k)
        x = y = None
        for number in np.unique(source):
            here = source == number
            part = self.sources[number].sequences(index[here])
            if x is None:
                x, y = (torch.empty(len(k), t.shape[1], dtype=t.dtype) for t in part)
            rows = torch.from_numpy(here)
            x[rows], y[rows] = part
        return x, y

    def offsets(self, k):
        source, index = self.mixture.assign(k)
        return [self.sources[s].offsets(i[None])[0] for s, i in zip(source, index, strict=True)]

    def n_targets(self, k):
        source, index = self.mixture.assign(k)
        return sum(self.sources[number].n_targets(index[source == number]) for number in np.unique(source))


def source_seed(seed, name):
    """A source's own seed, so that two of the same size are not read in the same order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")


def describe_phases(phases):
    """The phases in words: "70% fineweb + 30% pycode, from step 2000 pycode"."""
    def words(ratios):
        shares = exact_shares(ratios)
        if len(shares) == 1:
            return next(iter(shares))
        return " + ".join(f"{float(100 * share):.4g}% {name}" for name, share in sorted(shares.items()))

    parts = [words(ratios) if not step else f"from step {step} {words(ratios)}" for step, ratios in phases]
    return ", ".join(parts)


def check_epochs(mixture, windows, max_epochs, max_iters, sequences_per_step):
    """`ConfigError` if a source would be read more often than it may.

    windows: {name: sequences of an epoch}; max_epochs: None, a number for all, or {name: number}.
    """
    if max_epochs is None:
        return
    if isinstance(max_epochs, dict) and (strangers := sorted(set(max_epochs) - set(windows))):
        raise ConfigError("max_epochs", f"{strangers[0]} is not among the sources ({', '.join(sorted(windows))})")
    limits = max_epochs if isinstance(max_epochs, dict) else dict.fromkeys(windows, max_epochs)
    room = {name: most * windows[name] for name, most in limits.items()}

    def too_many(steps):
        consumed = mixture.consumed(steps * sequences_per_step)
        return {name: consumed[name] for name in room if consumed[name] > room[name]}

    for name, count in too_many(max_iters).items():
        mend = f"max_iters at most {largest(lambda steps: not too_many(steps), max_iters)}"
        if len(mixture.phases) == 1 and len(windows) > 1:
            mend += f", or {name} at most {room[name] / (max_iters * sequences_per_step):.4g} of the whole"
        raise ConfigError("max_epochs", f"{name} would be read {count / windows[name]:.3g} times by step {max_iters}, "
                                        f"and may be {limits[name]:g} times ({mend})")


def largest(holds, most):
    """The largest n in 0 … most for which `holds(n)`; it holds for 0 and, from some n on, never."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
