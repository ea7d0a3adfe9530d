"""The statistics of a comparison over seeds: intervals, tests, adjustments, and how many seeds a question takes.

scipy.special is imported where a distribution is needed and not before, so that a table without repeats starts fast.
Every function is tested against scipy.stats or a closed form.
"""

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

EXACT_FLIPS = 20  # pairs up to which all sign flips are counted
RANDOM_FLIPS = 100_000  # drawn for more pairs
MAX_SEEDS = 1000  # the largest answer of the planning functions
MIN_SEEDS = 3  # below this there is no verdict: the t quantile of one degree of freedom is 12.7
MIN_FLIPS = 6  # pairs below which no flip of signs can reach p < 0.05: 2 / 2**5 is 0.0625


class Estimate(NamedTuple):
    """A mean with its uncertainty.

    Attributes:
        mean: of n values, or the difference of two means.
        low, high: of the interval at the confidence asked for; None for n = 1.
        std: of the values (of the differences, if paired); None for n = 1.
        n: values, or pairs; of two samples the smaller one's.
        std_error: of the mean; None for n = 1.
        df: degrees of freedom; 0 for n = 1.
    """

    mean: float
    low: float | None
    high: float | None
    std: float | None
    n: int
    std_error: float | None
    df: float


# ---- distributions ----

@functools.lru_cache  # the arms of a study mostly have equally many seeds
def t_quantile(probability: float, df: float) -> float:
    """Of Student's t."""
    from scipy import special
    return float(special.stdtrit(df, probability))


def t_probability(t: float, df: float) -> float:
    """P(T <= t) of Student's t."""
    from scipy import special
    return float(special.stdtr(df, t))


@functools.lru_cache
def chi2_quantile(probability: float, df: float) -> float:
    from scipy import special
    return float(special.chdtri(df, 1 - probability))


def noncentral_t_above(t: float, df: float, noncentrality: float) -> float:
    """P(T > t) of the noncentral t."""
    from scipy import special
    if noncentrality - t > 12 + 12 * abs(t) / math.sqrt(df):  # beyond double precision; nctdtr gives nan far out
        return 1.0
    return 1 - float(special.nctdtr(df, noncentrality, t))


# ---- estimates ----

def variance(values: Sequence[float]) -> float:
    """The sample variance of at least two values; exactly 0 of equal ones.

    Values near each other, as the losses of seeds are, lose no digits: their distances to the first one are exact.
    statistics.variance computes in fractions, which takes ten times as long.
    """
    distances = [value - values[0] for value in values]
    mean = math.fsum(distances) / len(distances)
    return math.fsum((distance - mean)**2 for distance in distances) / (len(distances) - 1)


def std_deviation(values: Sequence[float]) -> float:
    """The square root of `variance`."""
    return math.sqrt(variance(values))


def estimate(values: Sequence[float], level: float = 0.05) -> Estimate:
    """The mean of independent values with its t interval at confidence 1 - level."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Estimate(mean, None, None, None, 1, None, 0)
    std = std_deviation(values)
    return with_interval(mean, std / math.sqrt(n), n - 1, n, std, level)


def with_interval(mean: float, std_error: float, df: float, n: int, std: float | None, level: float) -> Estimate:
    half = t_quantile(1 - level / 2, df) * std_error
    return Estimate(mean, mean - half, mean + half, std, n, std_error, df)


def welch(first: Sequence[float], second: Sequence[float], level: float = 0.05) -> Estimate:
    """mean(first) - mean(second) of two independent samples of at least two values each. Welch 1947."""
    variances = [variance(sample) / len(sample) for sample in (first, second)]
    total = math.fsum(variances)
    mean = math.fsum(first) / len(first) - math.fsum(second) / len(second)
    n = min(len(first), len(second))
    df = (total**2 / math.fsum(v**2 / (len(sample) - 1) for v, sample in zip(variances, (first, second), strict=True))
          if total else float(n - 1))
    return with_interval(mean, math.sqrt(total), df, n, None, level)


def std_interval(values: Sequence[float], level: float = 0.05) -> tuple[float, float]:
    """The chi-squared interval of the standard deviation of normal values, at least two of them."""
    df, std = len(values) - 1, std_deviation(values)
    return (std * math.sqrt(df / chi2_quantile(1 - level / 2, df)), std * math.sqrt(df / chi2_quantile(level / 2, df)))


# ---- tests ----

def t_test(difference: Estimate, shift: float = 0.0) -> float:
    """p of the two-sided t test of mean = shift."""
    return min(1.0, 2 * min(t_test_above(difference, shift), t_test_below(difference, shift)))


def t_test_above(difference: Estimate, shift: float = 0.0) -> float:
    """p of the one-sided t test: small if the mean is above `shift`."""
    assert difference.std_error is not None
    distance = difference.mean - shift
    if difference.std_error == 0:
        return 0.0 if distance > 0 else 1.0
    return t_probability(-distance / difference.std_error, difference.df)


def t_test_below(difference: Estimate, shift: float = 0.0) -> float:
    """p of the one-sided t test: small if the mean is below `shift`."""
    return t_test_above(difference._replace(mean=-difference.mean), -shift)


def flip_test_above(differences: Sequence[float], shift: float = 0.0) -> float:
    """p of the one-sided sign-flip test: small if the differences lie above `shift`.

    The proportion of all assignments of signs to the shifted differences whose sum is at least the one observed. It
    assumes that they are symmetric about their mean, and no more. Exact for up to EXACT_FLIPS differences; for more, of
    RANDOM_FLIPS drawn ones and the one observed.
    """
    sizes = [difference - shift for difference in differences]
    observed = math.fsum(sizes)
    tolerance = 1e-12 * math.fsum(map(abs, sizes))  # sums that are equal but for rounding
    if len(sizes) <= EXACT_FLIPS:
        sums = [0.0]
        for size in sizes:
            sums = [total + signed for total in sums for signed in (size, -size)]
        return sum(total >= observed - tolerance for total in sums) / len(sums)
    rng = random.Random(0)
    hits = sum(math.fsum(size if rng.getrandbits(1) else -size for size in sizes) >= observed - tolerance
               for _ in range(RANDOM_FLIPS))
    return (hits + 1) / (RANDOM_FLIPS + 1)


def flip_test(differences: Sequence[float], shift: float = 0.0) -> float:
    """p of the two-sided sign-flip test of symmetry about `shift`."""
    return min(1.0, 2 * min(flip_test_above(differences, shift), flip_test_above([-d for d in differences], -shift)))


def equivalence(above: Callable[[float], float], below: Callable[[float], float], margin: float) -> float:
    """p of two one-sided tests of -margin < mean < margin. Schuirmann 1987.

    Args:
        above, below: shift -> p of the one-sided test that the mean is above or below it.
        margin: not negative; 0 gives 1.
    """
    return max(above(-margin), below(margin)) if margin > 0 else 1.0


# ---- many tests, many looks ----

def holm(p_values: Sequence[float]) -> list[float]:
    """The p values adjusted for the family, in their order. Holm 1979."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    steps = [min(1.0, (len(order) - rank) * p_values[i]) for rank, i in enumerate(order)]
    adjusted = dict(zip(order, itertools.accumulate(steps, max), strict=True))
    return [adjusted[i] for i in range(len(p_values))]


def spend(level: float, look: int | None) -> float:
    """The level at which the `look`-th look (1, 2, …) is judged, if there may be any number of looks.

    level · 6 / (π² look²), whose sum over all looks is `level`: by the union bound, a study that is looked at as often
    as one likes, and ended at will, has a false verdict with probability `level` at most. None: the only look, which
    has all of the level.
    """
    return level if look is None else level * 6 / (math.pi * look)**2


# ---- planning ----

def paired_power(effect: float, std: float, n: int, level: float = 0.05) -> float:
    """The probability that the two-sided paired t test of n differences finds a true mean of `effect`."""
    if std == 0:
        return 1.0 if effect else level
    df, noncentrality = n - 1, abs(effect) / std * math.sqrt(n)
    critical = t_quantile(1 - level / 2, df)
    return noncentral_t_above(critical, df, noncentrality) + noncentral_t_above(critical, df, -noncentrality)


def equivalence_power(effect: float, std: float, n: int, margin: float, level: float = 0.05) -> float:
    """A lower bound on the probability that n differences of true mean `effect` are found to be within the margin."""
    if std == 0:
        return float(abs(effect) < margin)
    df, scale = n - 1, math.sqrt(n) / std
    critical = t_quantile(1 - level, df)
    return max(0.0, noncentral_t_above(critical, df, (margin - effect) * scale)
               + noncentral_t_above(critical, df, (margin + effect) * scale) - 1)


def seeds_needed(power_of: Callable[[int], float], power: float = 0.8) -> int | None:
    """The smallest n >= MIN_SEEDS with power_of(n) >= power, which must grow with n; None: more than MAX_SEEDS."""
    if power_of(MAX_SEEDS) < power:
        return None
    low, high = MIN_SEEDS - 1, MAX_SEEDS  # the answer is in (low, high]
    while high - low > 1:
        n = (low + high) // 2
        low, high = (low, n) if power_of(n) >= power else (n, high)
    return high


def detectable_difference(std: float, n: int, level: float = 0.05, power: float = 0.8) -> float | None:
    """The smallest true mean that a paired t test of n differences finds with this power; None for n < MIN_SEEDS.

    Args:
        std: of the differences.
        n: pairs.
        level: of the test; divide it by the size of the family.
        power: probability of finding it.
    """
    if n < MIN_SEEDS:
        return None
    low, high = 0.0, std
    while paired_power(high, std, n, level) < power and high > 0:
        low, high = high, 2 * high
    for _ in range(60):
        effect = (low + high) / 2
        low, high = (low, effect) if paired_power(effect, std, n, level) >= power else (effect, high)
    return high


# ---- effects of a grid ----

@dataclasses.dataclass(frozen=True)
class Effect:
    """A main effect or a two-way interaction of a full grid.

    Attributes:
        factors: {factor: (level of the baseline, level)} of one or two factors.
        estimate: the main effect: the mean change of the criterion from the first level to the second, over all levels
            of the other factors. The interaction: by how much the first factor's change is larger with the second level
            of the second.
        p, p_adjusted: of the t test, and by Holm over the effects of the grid; None with fewer than MIN_SEEDS seeds.
    """

    factors: Mapping[str, tuple[str, str]]
    estimate: Estimate
    p: float | None
    p_adjusted: float | None


def grid_effects(values: Mapping[str, Mapping[int, float]], factors: Mapping[str, Mapping[str, str]], baseline: str,
                 level: float = 0.05) -> tuple[list[Effect], str]:
    """Main effects and two-way interactions of a full grid, from contrasts within each seed.

    Args:
        values: {variant: {seed: value}}.
        factors: {variant: {factor: level}}; variants without factors are no cells.
        baseline: whose levels are the first.

    Returns:
        The effects, and why there are none: they need every cell of the grid, with seeds that all cells have.
    """
    cells = {frozenset(factors[name].items()): by_seed for name, by_seed in values.items() if factors.get(name)}
    start = factors.get(baseline)
    if not start or len(cells) < 2:
        return [], ""
    levels = {factor: [start[factor], *dict.fromkeys(
        cell_levels[factor] for cell in cells for cell_levels in [dict(cell)] if cell_levels[factor] != start[factor])]
        for factor in start if all(factor in dict(cell) for cell in cells)}
    levels = {factor: found for factor, found in levels.items() if len(found) > 1}
    if len(cells) != math.prod(map(len, levels.values())) or len(levels) < 2:
        return [], ""
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in cells.values())))
    if not seeds:
        return [], "no effects: no seed has finished in every cell of the grid"
    names = list(levels)
    by_levels = {tuple(dict(cell)[factor] for factor in names): by_seed for cell, by_seed in cells.items()}
    if len(by_levels) != len(cells):
        return [], ""

    def contrast(changes: Mapping[str, tuple[str, str]], seed: int) -> float:
        """Mean over the other factors of the alternating sum over the changed ones."""
        # Only the cells of these levels are visited: a grid of thousands of cells has as many contrasts.
        total = 0.0
        for cell in itertools.product(*(changes.get(factor, levels[factor]) for factor in names)):
            sign = math.prod(1 if level == changes[factor][1] else -1
                             for factor, level in zip(names, cell, strict=True) if factor in changes)
            total += sign * by_levels[cell][seed]
        return total / math.prod(len(levels[factor]) for factor in names if factor not in changes)

    changes = [{factor: (levels[factor][0], other)} for factor in names for other in levels[factor][1:]]
    changes += [{**first, **second} for i, first in enumerate(changes) for second in changes[i + 1:]
                if first.keys() != second.keys()]
    estimates = [estimate([contrast(change, seed) for seed in seeds], level) for change in changes]
    p_values = [t_test(found) for found in estimates] if len(seeds) >= MIN_SEEDS else None
    adjusted = holm(p_values) if p_values else None
    return [Effect(change, found, p_values[i] if p_values else None,
                   adjusted[i] if adjusted else None)
            for i, (change, found) in enumerate(zip(changes, estimates, strict=True))], ""
