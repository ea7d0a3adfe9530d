"""What a page shows of a study's results: verdicts, the table of variants, curves, effects, the Pareto front."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from blockgpt.experiments.comparison import Comparison
from blockgpt.experiments.judgement import Arm, Cell, Judgement, cell_text
from blockgpt.experiments.records import Run, human_count
from blockgpt.experiments.report.curves import PALETTE, charts_of, drawn_spends
from blockgpt.experiments.report.drawing import (
    Axis,
    Dot,
    Interval,
    axis_labels,
    draw_curves,
    draw_scatter,
    forest_axis,
    forest_strip,
)
from blockgpt.experiments.report.markup import breakable, bullets, details, escape, html_table
from blockgpt.experiments.study import Study
from blockgpt.experiments.verdict_text import (
    UNJUDGED,
    Line,
    confidence,
    detail_texts,
    effect_text,
    floor_text,
    header_text,
    interval_text,
    lines_of,
    outcome_text,
    table_columns,
)
from blockgpt.experiments.verdicts import arms_of

CURVE_POINTS = 12_000  # of all curves of a page together, about 100 bytes each
MAX_ROWS = 500  # of a table
OPEN_ROWS = 24  # a longer table is folded


@dataclasses.dataclass(frozen=True)
class Report:
    """What a page has.

    Attributes:
        title: name of the study.
        study: what its curves and runs are.
        runs: as `records.read_run` gives them, those that are not in the study, too.
        judgement: None: nothing is judged.
        question: in words.
        withheld: why there are no verdicts, also of a judgement that has been stripped of them.
        command: that makes this page again, as words.
        commands: {name of a run: words of its command}; else the one that the run has recorded.
        declared: {field: value} of the plan.
        notes, warnings: one line each, beside those of the judgement.
    """

    title: str
    study: Study
    runs: Sequence[Run]
    judgement: Judgement | None = None
    question: str = ""
    withheld: str = ""
    command: Sequence[str] = ()
    commands: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    declared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()

    @property
    def baseline(self) -> str | None:
        return self.judgement.baseline if self.judgement else None

    @functools.cached_property
    def lines(self) -> list[Line]:
        """The arms, with their verdicts."""
        return lines_of(self.judgement) if self.judgement else [Line(arm) for arm in arms_of(self.study)]

    @functools.cached_property
    def by_name(self) -> dict[str, Run]:
        return {run["name"]: run for run in self.runs}

    @functools.cached_property
    def colors(self) -> dict[str, int]:
        """{variant: its index, as charts_of has it}."""
        variants = sorted(self.study.variants(), key=lambda name: name != self.baseline)
        return {name: index for index, name in enumerate(variants)}


def report_of_comparison(comparison: Comparison, study: Study, judgement: Judgement | None,
                         command: Sequence[str]) -> Report:
    """The report of runs that no plan declares.

    Args:
        study: of the runs that can be compared.
        judgement: None without a baseline.
    """
    return Report("Comparison of training runs", study, comparison["runs"], judgement, command=command,
                  notes=comparison["notes"], warnings=comparison["warnings"])


# ---- verdicts ----

def forest_of(rows: Sequence[tuple[str, str, Interval, str, Sequence[str]]], directions: tuple[str, str]) -> str:
    """A forest plot.

    Args:
        rows: (name, badge, interval, figures, further lines) each.
        directions: what lies left and right of zero.
    """
    axis = forest_axis([interval for _, _, interval, _, _ in rows])
    content = "".join(
        f'<li class="row"><h4>{breakable(name)}</h4>{badge_of(badge, interval.outcome)}'
        f'{forest_strip(interval, axis, figures)}<p class="figures">{escape(figures)}</p>{bullets(texts, "details")}'
        "</li>\n" for name, badge, interval, figures, texts in rows)
    left, right = directions
    return (f'<ol class="forest">\n{content}<li class="row scale" aria-hidden="true">'
            f'<div class="under">{axis_labels(signed(axis), "x", "left")}<p><span>← {escape(left)}</span>'
            f"<span>{escape(right)} →</span></p></div></li></ol>\n")


def signed(axis: Axis) -> Axis:
    """The axis without ticks that lie so near to an end that their labels would be cut."""
    return axis._replace(ticks=[tick for tick in axis.ticks if 0.04 < axis.fraction(tick) < 0.96])


def badge_of(text: str, outcome: str) -> str:
    return f'<span class="badge {outcome}">{escape(text)}</span>' if text else '<span class="badge none"></span>'


def figures_text(line: Line, level: float) -> str:
    """'-0.0123, 95 % [-0.02, -0.01], n=3, p 0.01' as the table of the terminal has them."""
    verdict = line.verdict
    if verdict is None or verdict.difference is None:
        return "no difference"
    difference = verdict.difference
    interval = ("" if difference.low is None else
                f", {confidence(level)} {interval_text(difference.low, difference.high, '+.4f')}")
    p = "" if verdict.p_adjusted is None else f", p {verdict.p_adjusted:.2g}"
    return f"{difference.mean:+.4f}{interval}, n={difference.n}{p}"


def verdicts_section(report: Report) -> str:
    """The verdicts as a forest plot for each size and horizon, with words, worth and regime beside each."""
    judgement = report.judgement
    content = f'<p class="callout">{escape(report.withheld)}</p>' if report.withheld else ""
    if judgement is None:
        return content
    directions = ("better", "worse") if not judgement.criterion.more_is_better else ("worse", "better")
    cells: dict[Cell, list[Line]] = {}
    for line in report.lines:
        if line.verdict is not None:
            cells.setdefault((line.arm.size, line.arm.horizon), []).append(line)
    content += bullets([floor_text(floor, judgement.baseline, judgement.level) for floor in judgement.floors
                        if (floor.size, floor.horizon) in cells or not cells], "floors")
    for cell, lines in cells.items():
        rows = []
        for line in lines:
            verdict = line.verdict
            assert verdict is not None
            difference = verdict.difference
            interval = Interval(
                difference.mean if difference else None, difference.low if difference else None,
                difference.high if difference else None, verdict.margin, tuple(verdict.differences.values()),
                verdict.outcome or "none")
            words = outcome_text(verdict)
            texts = [text for text in detail_texts(line, judgement.level) if text != words]
            rows.append((verdict.variant, "" if report.withheld else words, interval,
                         figures_text(line, judgement.level), texts))
        title = f"{cell_text(*cell)}: " if any(cell) else ""
        content += (f"<h3>{escape(title)}difference of {escape(metric_text(report))} from "
                    f"{escape(judgement.baseline)}</h3>\n{forest_of(rows, directions)}")
    margin = '<span class="key margin"></span> margin of equality' if any(
        line.verdict and line.verdict.margin for line in report.lines) else ""
    content += (f'<p class="quiet legend-line">{margin} <span class="key tick"></span> one seed '
                '<span class="key whisker"></span> interval of the mean</p>')
    return content + f'<p class="quiet">{escape(header_text(judgement))}</p>\n'


def metric_text(report: Report) -> str:
    return report.study.criterion.metric.replace("_", " ")


def arms_section(report: Report) -> str:
    """The table of the terminal: a row for each arm."""
    level = report.judgement.level if report.judgement else 0.05
    names = table_columns(report.lines, level, *(() if report.judgement else (UNJUDGED,))) if report.lines else {}
    if report.withheld:
        names = {name: cells for name, cells in names.items() if name.strip() != "verdict" and any(
            cell not in ("-", "") for cell in cells)}
    if not names:
        return "<p>No run can be compared yet.</p>"
    header = [name.strip() for name in names]
    rows = list(zip(*names.values(), strict=True))
    content = html_table(header, rows[:MAX_ROWS], left=("size", "verdict")) + left_out(len(rows), MAX_ROWS, "rows")
    return content if len(rows) <= OPEN_ROWS else details(f"{len(rows):,} rows", content, not report.judgement)


def left_out(count: int, listed: int, name: str) -> str:
    return f'<p class="quiet">{count - listed:,} more {name} are not listed.</p>' if count > listed else ""


# ---- curves ----

def curves_section(report: Report) -> tuple[str, list[dict[str, object]]]:
    """(the charts with their legend, their values for the script)."""
    charts = charts_of(report.study, report.baseline)
    n_series = sum(len(chart.series) * len(drawn_spends(chart.series)) for chart in charts)
    if not n_series:
        return "<p>No run has been evaluated yet.</p>", []
    count = min(400, max(8, CURVE_POINTS // n_series))
    budget, content, data = CURVE_POINTS // 8, "", []
    for number_of_chart, chart in enumerate(charts):
        spends = drawn_spends(chart.series)
        if len(chart.series) * len(spends) > budget:
            content += f'<p class="quiet">{len(charts) - number_of_chart} more charts are not drawn.</p>'
            break
        budget -= len(chart.series) * len(spends)
        drawn = [draw_curves(chart, spend, metric_text(report), count) for spend in spends]
        data += [curves.data for curves in drawn]
        more = f" ({len(chart.left_out)} variants not drawn)" if chart.left_out else ""
        title = f"<h3>{escape(chart.title + more)}</h3>" if len(charts) > 1 or more else ""
        content += f'{title}<div class="charts">{"".join(curves.html for curves in drawn)}</div>\n'
    names = {one.index: one for chart in charts for one in chart.series}
    buttons = "".join(
        f'<button type="button" aria-pressed="true" class="v{index % len(PALETTE)}" data-toggle="{index}">'
        f'<svg viewBox="0 0 30 8" aria-hidden="true"><path class="line" d="M0,4H30"'
        + (f' stroke-dasharray="{" ".join(map(str, one.dashes))}"' if one.dashes else "")
        + f"/></svg>{breakable(one.variant)}</button>" for index, one in sorted(names.items()))
    n_seeds = max(len(one.trials) for one in names.values())
    words = ("A line is the mean over seeds, its band reaches from the lowest seed to the highest. " if n_seeds > 1
             else "")
    return (f'<div class="legend" role="group" aria-label="variants">{buttons}</div>\n{content}<p class="quiet">{words}'
            '<span class="screen-only">Hover, or focus a chart and use the arrow keys, for values; a name shows and '
            "hides its curves; last half: only the end of the runs.</span></p>\n"), data


# ---- effects, front ----

def effects_section(report: Report) -> str:
    """Main effects and two-way interactions of a grid."""
    judgement, content = report.judgement, ""
    if judgement is None or report.withheld:
        return ""
    directions = ("better", "worse") if not judgement.criterion.more_is_better else ("worse", "better")
    for cell, effects in judgement.effects.items():
        rows = []
        for effect in effects:
            label, _, rest = effect_text(effect, judgement.level).partition(": ")
            name, _, figures = rest.rpartition(": ")
            interval = Interval(effect.estimate.mean, effect.estimate.low, effect.estimate.high)
            rows.append((name, label, interval, figures, ()))
        if rows:
            content += (f"<h3>{escape(cell_text(*cell))}</h3>" if any(cell) else "") + forest_of(rows, directions)
    return content


def front_section(report: Report) -> str:
    """Loss, speed and memory of the variants, and which of them no other beats in all three."""
    front = report.judgement.front if report.judgement else {}
    content = ""
    for cell, names in front.items():
        arms = [line.arm for line in report.lines if (line.arm.size, line.arm.horizon) == cell
                and line.arm.estimate and line.arm.tokens_per_sec is not None and line.arm.peak_memory is not None]
        if not names or len(arms) < 2:
            continue
        rows = [(arm.variant, f"{mean_of_arm(arm):.4f}", human_count(arm.tokens_per_sec or 0),
                 f"{(arm.peak_memory or 0) / 2**30:.2f}", "on the front" if arm.variant in names else "")
                for arm in arms]
        dots = [Dot(report.colors[arm.variant], arm.tokens_per_sec or 0.0, mean_of_arm(arm), arm.variant in names,
                    arm.variant) for arm in arms]
        content += (f"<h3>{escape(cell_text(*cell))}</h3>" if any(cell) else "") + '<div class="beside">'
        content += draw_scatter(dots[:MAX_ROWS], "tokens/s", metric_text(report), "{:.4f}".format)
        content += html_table(("variant", metric_text(report), "tokens/s", "GiB", "Pareto front"), rows[:MAX_ROWS],
                         left=("Pareto front",)) + "</div>\n"
    return content


def mean_of_arm(arm: Arm) -> float:
    assert arm.estimate is not None
    return arm.estimate.mean
