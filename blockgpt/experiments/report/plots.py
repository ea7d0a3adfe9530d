"""`--plot`: the learning curves of a study as a figure for a paper (matplotlib, imported only here)."""

import textwrap
from pathlib import Path
from typing import Any

from blockgpt.errors import UserError, error_text, require_package
from blockgpt.experiments.records import human_count
from blockgpt.experiments.report.curves import AXES, Series, charts_of, drawn_spends, value_range
from blockgpt.experiments.study import Study

FORMATS = (".png", ".svg", ".pdf")
COLUMN_WIDTH = 3.3  # inches, of a two-column paper
LEGEND_WIDTH = 44  # characters that fit in a column
FONT_SIZE = 8  # points; labels of the axes' ticks have one less
STYLE = {"font.size": FONT_SIZE, "axes.titlesize": FONT_SIZE, "axes.labelsize": FONT_SIZE,
         "xtick.labelsize": FONT_SIZE - 1, "ytick.labelsize": FONT_SIZE - 1, "legend.fontsize": FONT_SIZE - 1,
         "pdf.fonttype": 42, "svg.fonttype": "none"}  # text stays text


def check_plot(path: str) -> None:
    """Refuse before any run what could not be drawn after it.

    Raises:
        UserError: the name's ending is none of FORMATS, or matplotlib cannot be imported.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise UserError(f"--plot: {path}: its ending must be one of {', '.join(FORMATS)}")
    require_package("matplotlib.figure")


def draw(study: Study, baseline: str | None = None) -> Any:
    """A matplotlib figure: a column for each size and horizon, rows of loss against tokens, FLOPs and time.

    A line is the mean over seeds, its band reaches from the lowest seed to the highest.

    Raises:
        UserError: no run has been evaluated.
    """
    charts = charts_of(study, baseline)
    spends = drawn_spends([one for chart in charts for one in chart.series])
    if not spends:
        raise UserError("--plot: no run has evaluations to draw")
    figures, matplotlib = require_package("matplotlib.figure"), require_package("matplotlib")
    with matplotlib.rc_context(STYLE):
        handles: dict[str, Any] = {}
        names = dict.fromkeys(one.variant for chart in charts for one in chart.series)
        labels = {name: textwrap.fill(name, LEGEND_WIDTH * len(charts)) for name in names}
        n_rows = sum(label.count("\n") + 1 for label in labels.values())
        height = 1.7 * len(spends) + 0.16 * n_rows + 0.5
        figure = figures.Figure(figsize=(COLUMN_WIDTH * len(charts), height), layout="constrained")
        grid = figure.subplots(len(spends), len(charts), squeeze=False)
        for column, chart in enumerate(charts):
            for row, spend in enumerate(spends):
                axes = grid[row][column]
                low, high, _ = value_range(chart.series, spend)
                for one in chart.series:
                    handles.setdefault(one.variant, draw_series(axes, one, spend))
                axes.set(xlabel=AXES[spend], ylabel=study.criterion.metric.replace("_", " "), ylim=(low, high))
                axes.locator_params(axis="x", nbins=5)
                if spend == "tokens":
                    axes.xaxis.set_major_formatter(lambda x, _: human_count(x))
                axes.spines[["top", "right"]].set_visible(False)
            title = chart.title + (f" ({len(chart.left_out)} variants not drawn)" if chart.left_out else "")
            grid[0][column].set_title(title)
        figure.legend(list(handles.values()), [labels[name] for name in handles], loc="outside lower left",
                      frameon=False, handlelength=3, title="mean over seeds, band: lowest to highest seed",
                      title_fontsize=FONT_SIZE - 1, alignment="left")
    return figure


def draw_series(axes: Any, one: Series, spend: str) -> Any:
    """Draw the mean and the band of a series; returns its line."""
    means = one.means(spend)
    x = [mean.x for mean in means]
    line, = axes.plot(x, [mean.value for mean in means], color=one.color, linewidth=1.3, label=one.variant,
                      linestyle=(0, one.dashes) if one.dashes else "-")
    if len(one.trials) > 1:
        axes.fill_between(x, [mean.low for mean in means], [mean.high for mean in means], color=one.color, alpha=0.18,
                          linewidth=0)
    return line


def save_plot(path: str, study: Study, baseline: str | None = None) -> None:
    """Write the figure of a study; `UserError` if it cannot be written."""
    check_plot(path)
    figure = draw(study, baseline)
    with require_package("matplotlib").rc_context(STYLE):
        try:
            figure.savefig(path, dpi=300)
        except (OSError, ValueError) as error:
            raise UserError(f"--plot: {path}: cannot be written: {error_text(error)}") from None
