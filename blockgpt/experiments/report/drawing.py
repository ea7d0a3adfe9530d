"""SVG of a report. Positions are percentages or a stretched box, text is HTML: legible from 380 to 1600 pixels.

Colours and strokes are those of style.css, so that they follow the reader's light or dark theme.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from blockgpt.experiments.records import human_count
from blockgpt.experiments.report.curves import AXES, PALETTE, Chart, Mean, Series, value_range
from blockgpt.experiments.report.markup import escape

BOX = 10_000  # units of a stretched box, in both directions
MAX_MARKERS = 24  # a line with more evaluations has no markers


# ---- axes ----

class Axis(NamedTuple):
    """A range of values with its ticks."""

    low: float
    high: float
    ticks: list[float]

    def fraction(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def percent(self, value: float) -> str:
        """Where a value is, at the nearest end where it lies outside."""
        return f"{100 * min(1.0, max(0.0, self.fraction(value))):.2f}%"

    def units(self, value: float) -> int:
        """The same in units of a box; a value far outside stays near enough to be a small number."""
        return round(BOX * min(3.0, max(-2.0, self.fraction(value))))


def make_axis(low: float, high: float, count: int = 5) -> Axis:
    """An axis from low to high with about `count` ticks at round values."""
    if not high > low:
        low, high = low - (abs(low) or 1.0) / 2, low + (abs(low) or 1.0) / 2
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return Axis(low, high, [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)])


def tick_text(axis: Axis, value: float, spend: str = "") -> str:
    """A tick's label: as many decimals as the step needs, tokens as 1.5M."""
    if spend == "tokens":
        return human_count(value)
    step = axis.ticks[1] - axis.ticks[0] if len(axis.ticks) > 1 else abs(value) or 1.0
    if value and not 1e-4 <= abs(value) < 1e5:
        return f"{value:.3g}".replace("e+", "e")
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def axis_labels(axis: Axis, name: str, property_name: str, spend: str = "") -> str:
    """The labels of an axis as positioned text."""
    labels = "".join(f'<span style="{property_name}:{axis.percent(tick)}">{escape(tick_text(axis, tick, spend))}</span>'
                     for tick in axis.ticks)
    return f'<div class="{name}" aria-hidden="true">{labels}</div>'


# ---- a forest plot ----

class Interval(NamedTuple):
    """One line of a forest plot.

    Attributes:
        mean: None where there is no difference.
        low, high: None without an interval.
        margin: half width of the band of equality; None without one.
        values: differences of the single seeds.
        outcome: its colour: better, worse, equal, inconclusive or none.
    """

    mean: float | None
    low: float | None
    high: float | None
    margin: float | None = None
    values: tuple[float, ...] = ()
    outcome: str = "none"


def forest_axis(intervals: Sequence[Interval]) -> Axis:
    """An axis that has zero, every mean and margin, and the intervals. One that is far wider than most is cut."""
    means = [i.mean for i in intervals if i.mean is not None]
    ends = [end for i in intervals for end in (i.low, i.high) if end is not None]
    margins = [i.margin for i in intervals if i.margin is not None]
    widths = sorted(abs(end) for end in ends)
    limit = max(4 * widths[len(widths) // 2] if widths else 0.0, *(2 * abs(mean) for mean in means), *margins, 0.0)
    bounds = [0.0, *means, *(sign * margin for margin in margins for sign in (-1, 1)),
              *(max(-limit, min(limit, end)) for end in ends)]
    low, high = min(bounds), max(bounds)
    space = 0.06 * (high - low) or 1.0
    return make_axis(low - space, high + space)


def forest_strip(interval: Interval, axis: Axis, label: str) -> str:
    """One line of a forest plot: the band of the margin, zero, the seeds, the interval and its mean."""
    x = axis.percent
    shapes = [f'<line class="grid" x1="{x(tick)}" x2="{x(tick)}" y1="0" y2="100%"/>' for tick in axis.ticks]
    if interval.margin is not None:
        width = 100 * (min(1.0, axis.fraction(interval.margin)) - max(0.0, axis.fraction(-interval.margin)))
        shapes.insert(0, f'<rect class="margin" x="{x(-interval.margin)}" width="{width:.2f}%" y="0" height="100%"/>')
    shapes.append(f'<line class="zero" x1="{x(0)}" x2="{x(0)}" y1="0" y2="100%"/>')
    shapes += [f'<line class="seed" x1="{x(value)}" x2="{x(value)}" y1="72%" y2="90%"/>'
               for value in interval.values[:50]]
    if interval.low is not None and interval.high is not None:
        shapes.append(f'<line class="whisker" x1="{x(interval.low)}" x2="{x(interval.high)}" y1="50%" y2="50%"/>')
        for end, sign in ((interval.low, -1), (interval.high, 1)):
            inside = 0 <= axis.fraction(end) <= 1
            path = "M0,-5V5" if inside else f"M{-9 * sign},-5L0,0L{-9 * sign},5"  # an arrow: it goes on outside
            shapes.append(f'<svg x="{x(end)}" y="50%" class="mark"><path class="whisker" d="{path}"/></svg>')
    if interval.mean is not None:
        shapes.append(f'<circle class="mean" cx="{x(interval.mean)}" cy="50%" r="5.5"/>')
    return f'<svg class="strip {interval.outcome}" role="img" aria-label="{escape(label)}">{"".join(shapes)}</svg>'


# ---- curves ----

def thin_out(means: Sequence[Mean], count: int) -> list[Mean]:
    """At most about `count` points of a curve: its ends, and the lowest and highest of each stretch between them."""
    if len(means) <= max(count, 4):
        return list(means)
    n_buckets, inner = max(1, count // 2 - 1), range(1, len(means) - 1)
    chosen = {0, len(means) - 1}
    for bucket in range(n_buckets):
        indices = inner[bucket * len(inner) // n_buckets:(bucket + 1) * len(inner) // n_buckets]
        if indices:
            chosen |= {min(indices, key=lambda i: means[i].low), max(indices, key=lambda i: means[i].high)}
    return [means[i] for i in sorted(chosen)]


def path_of(points: Iterable[tuple[float, float]], x_axis: Axis, y_axis: Axis) -> str:
    """'M0,5L10,20…' of points in a box."""
    return "M" + "L".join(f"{x_axis.units(x)},{BOX - y_axis.units(y)}" for x, y in points)


def curve_shapes(one: Series, means: Sequence[Mean], x_axis: Axis, y_axis: Axis) -> str:
    """The band, the line and the evaluations of one variant."""
    if not means:
        return ""
    tag, shapes = f'class="v v{one.index % len(PALETTE)}" data-v="{one.index}"', []
    line = path_of([(mean.x, mean.value) for mean in means], x_axis, y_axis)
    if len(one.trials) > 1 and len(means) > 1:
        there_and_back = [*((mean.x, mean.high) for mean in means), *((mean.x, mean.low) for mean in reversed(means))]
        shapes.append(f'<path class="band" d="{path_of(there_and_back, x_axis, y_axis)}Z"/>')
    dashes = f' stroke-dasharray="{" ".join(map(str, one.dashes))}"' if one.dashes else ""
    shapes.append(f'<path class="line" d="{line}"{dashes}/>')
    if len(means) <= MAX_MARKERS:  # a line of no length with round ends is a dot, also where the box is stretched
        dots = "".join(path_of([(mean.x, mean.value)], x_axis, y_axis) + "h0" for mean in means)
        shapes.append(f'<path class="dots" d="{dots}"/>')
    return f"<g {tag}>{''.join(shapes)}</g>"


class Curves(NamedTuple):
    """A drawn chart, and its values for the script."""

    html: str
    data: dict[str, object]


def draw_curves(chart: Chart, spend: str, metric: str, count: int) -> Curves:
    """The curves of a chart against tokens, FLOPs or time.

    Args:
        count: points of a curve at most.
    """
    low, high, is_cut = value_range(chart.series, spend)
    curves = [(one, thin_out(one.means(spend), count)) for one in chart.series]
    end = max((mean.x for _, means in curves for mean in means), default=1.0)
    x_axis, y_axis = make_axis(0.0, 1.015 * end or 1.0), make_axis(low, high)
    grid = "".join(f'<path class="grid" d="M0,{BOX - y_axis.units(tick)}H{BOX}"/>' for tick in y_axis.ticks)
    shapes = "".join(curve_shapes(one, means, x_axis, y_axis) for one, means in reversed(curves))
    title = f"{metric} against {AXES[spend]}"
    cut = '<span class="quiet"> (earlier values are above the frame)</span>' if is_cut else ""
    content = (
        f'<figure class="chart"><figcaption>{escape(title)}{cut}</figcaption><div class="frame">'
        f'{axis_labels(y_axis, "y", "bottom")}<div class="area" tabindex="0" role="img" aria-label="{escape(title)}">'
        f'<svg viewBox="0 0 {BOX} {BOX}" data-box="{BOX}" preserveAspectRatio="none" aria-hidden="true">{grid}{shapes}'
        f"</svg></div>"
        f'{axis_labels(x_axis, "x", "left", spend)}</div></figure>\n')
    points = [{"v": one.index, "p": [[short(value) for value in mean] for mean in means]} for one, means in curves]
    return Curves(content, {"x": [x_axis.low, x_axis.high], "y": [y_axis.low, y_axis.high], "spend": spend,
                            "series": points})


def short(value: float) -> float:
    """A value with six digits: the page's data stays small."""
    return float(f"{value:.6g}")


# ---- a scatter plot ----

class Dot(NamedTuple):
    """A variant in a scatter plot; `color` is its index in the study."""

    color: int
    x: float
    y: float
    is_front: bool
    label: str


def draw_scatter(dots: Sequence[Dot], x_title: str, y_title: str, y_text: Callable[[float], str]) -> str:
    """Variants by two of their figures; those on the Pareto front are filled."""
    def padded(values: Sequence[float]) -> Axis:
        space = 0.1 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 1.0
        return make_axis(min(values) - space, max(values) + space, 4)

    x_axis, y_axis = padded([dot.x for dot in dots]), padded([dot.y for dot in dots])
    grid = "".join(f'<line class="grid" x1="0" x2="100%" y1="{place}" y2="{place}"/>' for tick in y_axis.ticks
                   if (place := f"{100 - 100 * y_axis.fraction(tick):.2f}%"))
    shapes = "".join(
        f'<circle class="v v{dot.color % len(PALETTE)} {"front" if dot.is_front else "behind"}" data-v="{dot.color}" '
        f'cx="{x_axis.percent(dot.x)}" cy="{100 - 100 * y_axis.fraction(dot.y):.2f}%" r="6.5">'
        f'<title>{escape(f"{dot.label}: {y_text(dot.y)}, {human_count(dot.x)}")}</title></circle>' for dot in dots)
    title = f"{y_title} against {x_title}"
    return (f'<figure class="chart scatter"><figcaption>{escape(title)}<span class="quiet"> (filled: on the front)'
            f'</span></figcaption><div class="frame">{axis_labels(y_axis, "y", "bottom")}<div class="area">'
            f'<svg role="img" aria-label="{escape(title)}">{grid}{shapes}</svg></div>'
            f'{axis_labels(x_axis, "x", "left", "tokens")}</div></figure>\n')
