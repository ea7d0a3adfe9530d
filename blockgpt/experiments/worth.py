"""What a difference in loss is worth in compute, by the baseline's own scaling law.

The baseline's losses at several horizons D (tokens of separate runs) give L(D) = E + A · D^-α (Hoffmann et al. 2022,
with one model size). A variant that is better by d at D0 tokens (d < 0) has the loss that the baseline reaches at D*
tokens, L(D*) = L(D0) + d, so that with the reducible loss r = A · D0^-α

    tokens needed, relative to the baseline = D0 / D* = (1 + d / r)^(1/α)

0.82 reads "needs 18 % fewer tokens". For FLOPs the ratio is multiplied by that of FLOPs per token, for time by that of
seconds per token, of the same pairs. E, A and α enter through the local slope of the law alone, α·r = -dL/dlnD, as long
as d is small, so that a badly determined E does little harm.

The interval is the delta method's on the logarithm: by every seed's influence on d, on the law and on the ratio of
speeds, t distributed with n - 1 degrees of freedom. It carries the correlation of the runs of one seed. It does not
carry the error of the form of the law.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from blockgpt.experiments.statistics import MIN_SEEDS, t_quantile

MIN_HORIZONS = 2
FULL_LAW_HORIZONS = 4  # below this E cannot be told from noise, and is 0
EXPONENTS = (0.02, 2.0)  # α of language models is 0.05 … 0.5 in data


class Ratio(NamedTuple):
    """Compute that a variant needs, relative to the baseline at equal loss: 0.82 is 18 % less.

    low and high are of the 95 % interval (or what level was asked for); None with fewer than MIN_SEEDS seeds.
    """

    ratio: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Law:
    """L(D) = irreducible + amplitude · (D / reference)^-exponent, fitted to the mean losses of the baseline.

    Attributes:
        reference: tokens, the geometric mean of the horizons.
        horizons: in tokens, ascending.
        seeds: that every horizon has.
        full: whether E was fitted; with fewer than FULL_LAW_HORIZONS horizons it is 0.
        residual: root mean square of the fit, in units of the loss.
        influence: {seed: (of irreducible, amplitude, exponent)}: how far the seed's losses move the parameters, times
            the count of seeds.
    """

    irreducible: float
    amplitude: float
    exponent: float
    reference: float
    horizons: tuple[float, ...]
    seeds: tuple[int, ...]
    full: bool
    residual: float
    influence: Mapping[int, tuple[float, float, float]]

    def loss(self, tokens: float) -> float:
        return self.irreducible + self.reducible(tokens)

    def reducible(self, tokens: float) -> float:
        """L(D) - E."""
        return self.amplitude * math.exp(-self.exponent * math.log(tokens / self.reference))

    def formula(self) -> str:
        """The law in words, for a report."""
        a = self.amplitude * self.reference**self.exponent
        irreducible = f"{self.irreducible:.4g} + " if self.full else ""
        return f"L(D) = {irreducible}{a:.4g} · D^-{self.exponent:.4g}"


@dataclasses.dataclass(frozen=True)
class Worth:
    """What a variant's difference is worth.

    Attributes:
        tokens, flops, time: None where it is not available.
        law: of the baseline; None if there is none.
        notes: what limits the figures, or what is needed to have them.
    """

    tokens: Ratio | None = None
    flops: Ratio | None = None
    time: Ratio | None = None
    law: Law | None = None
    notes: tuple[str, ...] = ()


def fit_law(losses: Mapping[float, Mapping[int, float]]) -> Law | str:
    """The law of a baseline, by least squares on the mean losses over the seeds that every horizon has.

    Args:
        losses: {horizon (tokens): {seed: final loss of a run of its own}}.

    Returns:
        The law, or what is needed to fit one.
    """
    horizons = sorted(losses)
    if len(horizons) < MIN_HORIZONS:
        return (f"the baseline has {len(horizons) or 'no'} horizon{'s' * (len(horizons) != 1)}: its worth in compute "
                f"needs runs of it at {MIN_HORIZONS} horizons or more ({FULL_LAW_HORIZONS} for the full law)")
    seeds = sorted(set.intersection(*(set(losses[horizon]) for horizon in horizons)))
    if not seeds:
        return "no seed of the baseline has finished at every horizon"
    import numpy as np
    values = np.array([[losses[horizon][seed] for horizon in horizons] for seed in seeds])  # (seeds, horizons)
    mean = values.mean(0)
    reference = math.exp(math.fsum(map(math.log, horizons)) / len(horizons))
    log_x = np.log(np.array(horizons) / reference)
    full = len(horizons) >= FULL_LAW_HORIZONS
    exponent, constrained = best_exponent(log_x, mean, full)
    power = np.exp(-exponent * log_x)
    irreducible, amplitude = linear_fit(power, mean, full)
    if amplitude <= 0:
        return "the baseline's loss does not fall with more tokens, so that its law cannot be inverted"
    derivatives = [np.ones_like(power) * full, power, -amplitude * log_x * power * (not constrained)]
    inverse = np.linalg.pinv(np.stack(derivatives, 1), rcond=1e-10)  # (3, horizons)
    influence = (values - mean) @ inverse.T
    residual = mean - irreducible - amplitude * power
    return Law(float(irreducible), float(amplitude), float(exponent), reference, tuple(horizons), tuple(seeds), full,
               float(np.sqrt((residual**2).mean())),
               {seed: (float(row[0]), float(row[1]), float(row[2]))
                for seed, row in zip(seeds, influence, strict=True)})


def linear_fit(power: Any, losses: Any, full: bool) -> tuple[float, float]:
    """(E, A) of least squares for given D^-α."""
    import numpy as np
    if not full:
        return 0.0, float(power @ losses / (power @ power))
    centred = power - power.mean()
    amplitude = float(centred @ losses / (centred @ centred))
    return float(np.mean(losses) - amplitude * power.mean()), amplitude


def best_exponent(log_x: Any, losses: Any, full: bool) -> tuple[float, bool]:
    """(α of the smallest sum of squares in EXPONENTS, whether it is one of the bounds)."""
    import numpy as np

    def error(log_exponent: float) -> float:
        power = np.exp(-math.exp(log_exponent) * log_x)
        irreducible, amplitude = linear_fit(power, losses, full)
        return float(((losses - irreducible - amplitude * power)**2).sum())

    grid = np.linspace(math.log(EXPONENTS[0]), math.log(EXPONENTS[1]), 60)
    best = int(np.argmin([error(x) for x in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    ratio = (math.sqrt(5) - 1) / 2  # golden section
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if error(left) < error(right) else (left, high)
    found = (low + high) / 2
    return math.exp(found), bool(found - grid[0] < 1e-6 or grid[-1] - found < 1e-6)


def worth(law: Law, horizon: float, differences: Mapping[int, float], flops_ratio: float | None = None,
          log_time_ratios: Mapping[int, float] | None = None, level: float = 0.05) -> Worth:
    """What the paired differences of a variant are worth.

    Args:
        law: of the baseline.
        horizon: tokens of the pairs.
        differences: {seed: loss of the variant - loss of the baseline}.
        flops_ratio: FLOPs per token of the variant, relative to the baseline's.
        log_time_ratios: {seed: log of the seconds per token, relative to the baseline's}.
        level: 1 - the confidence of the intervals.
    """
    n = len(differences)
    mean = math.fsum(differences.values()) / n
    reducible = law.reducible(horizon)
    if mean <= -reducible:
        return Worth(law=law, notes=("its loss is below what the baseline's law reaches at any number of tokens",))
    log_ratio = math.log1p(mean / reducible) / law.exponent
    # Derivatives of log_ratio: by the difference, by amplitude and by exponent (E does not enter).
    by_difference = 1 / (law.exponent * (reducible + mean))
    by_reducible = -mean / (law.exponent * reducible * (reducible + mean))
    by_amplitude = by_reducible * reducible / law.amplitude
    by_exponent = -log_ratio / law.exponent - by_reducible * reducible * math.log(horizon / law.reference)
    n_law = len(law.seeds)
    influences = {seed: by_difference * (difference - mean) / n for seed, difference in differences.items()}
    for seed, (_, amplitude, exponent) in law.influence.items():
        influences[seed] = influences.get(seed, 0.0) + (by_amplitude * amplitude + by_exponent * exponent) / n_law
    df = min(n, n_law) - 1

    def ratio(log_value: float, terms: Mapping[int, float]) -> Ratio:
        if df + 1 < MIN_SEEDS:
            return Ratio(math.exp(log_value), None, None)
        std_error = math.sqrt(math.fsum(term**2 for term in terms.values()) * (df + 1) / df)
        half = t_quantile(1 - level / 2, df) * std_error
        return Ratio(*(math.exp(min(max(x, -700.0), 700.0)) for x in (log_value, log_value - half, log_value + half)))

    flops = time = None
    if flops_ratio is not None:
        flops = ratio(log_ratio + math.log(flops_ratio), influences)
    if log_time_ratios and log_time_ratios.keys() >= differences.keys():
        shift = math.fsum(log_time_ratios[seed] for seed in differences) / n
        time = ratio(log_ratio + shift, {seed: term + (log_time_ratios[seed] - shift) / n if seed in differences
                                         else term for seed, term in influences.items()})
    return Worth(ratio(log_ratio, influences), flops, time, law, tuple(limits(law, horizon, log_ratio, df)))


def limits(law: Law, horizon: float, log_ratio: float, df: int) -> Sequence[str]:
    """What a reader of the figures must know."""
    notes = []
    if not law.full:
        notes.append(f"{len(law.horizons)} horizons: the law is L(D) = A · D^-α, without an irreducible loss")
    equivalent = horizon * math.exp(-log_ratio)
    if not law.horizons[0] <= equivalent <= law.horizons[-1]:
        notes.append(f"extrapolated: the baseline would need {equivalent:.3g} tokens, and was trained on "
                     f"{law.horizons[0]:.3g} to {law.horizons[-1]:.3g}")
    if df + 1 < MIN_SEEDS:
        notes.append(f"no interval: {df + 1} seed{'s' * (df > 0)} in common, {MIN_SEEDS} are needed")
    return notes
