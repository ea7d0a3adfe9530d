"""The figure of a study: what it draws is what the runs recorded, and its text can be read in a column."""

import sys

import pytest

from blockgpt.errors import UserError, require_package
from blockgpt.experiments.records import Point
from blockgpt.experiments.report import plots
from blockgpt.experiments.report.curves import MAX_SERIES, charts_of, value_range
from blockgpt.experiments.study import Study, StudyTrial
from compare_architectures import main as compare_main

STEPS = (0, 10, 20)


def trial(variant, seed, values, **fields):
    curve = [Point(step, 100.0 * step, 1e6 * step, (1 + seed) * step, value)
             for step, value in zip(STEPS, values, strict=False)]
    return StudyTrial(variant, seed, value=values[-1], curve=curve, **{"size": "demo", "horizon": 2000.0, **fields})


@pytest.fixture
def study():
    return Study([trial("rms<script>", 1, [9.0, 3.0, 2.5]), trial("rms<script>", 2, [9.0, 3.5, 2.0]),
                  trial("base", 1, [9.0, 4.0, 3.0]), trial("base", 2, [9.0, None, 2.0]),
                  trial("base", 1, [9.0, 4.0, 3.0], horizon=1000.0)])


def test_figure_has_every_arm_on_every_axis_with_its_mean_and_range(study):
    figure = plots.draw(study, "base")
    assert [axes.get_xlabel() for axes in figure.axes] == ["tokens", "training FLOPs", "training time in seconds"]
    for axes, x in zip(figure.axes, (1000.0, 1e7, 25.0), strict=True):  # seconds differ between seeds: their mean
        lines = {line.get_label(): line for line in axes.lines}
        assert list(lines) == ["base", "rms<script>"]  # the baseline first; its other horizon has no rival
        assert list(lines["rms<script>"].get_ydata()) == [9.0, 3.25, 2.25]
        assert lines["rms<script>"].get_xdata()[1] == x
        assert list(lines["base"].get_ydata()) == [9.0, 2.5]  # where both seeds have a finite value
        band = axes.collections[1].get_paths()[0].vertices
        assert {tuple(vertex) for vertex in band} >= {(x, 3.0), (x, 3.5)}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["base", "rms<script>"]


def test_text_is_legible_at_column_width_and_lines_differ_by_color_and_dashes(study):
    figure = plots.draw(study)
    assert figure.get_size_inches()[0] == pytest.approx(3.3)
    texts = [text for axes in figure.axes for text in (axes.xaxis.label, axes.yaxis.label, axes.title,
                                                       *axes.get_xticklabels(), *axes.get_yticklabels())]
    assert min(text.get_fontsize() for text in [*texts, *figure.legends[0].get_texts()]) >= 7
    long = Study([trial("a_long_name " * 12, 1, [3.0, 2.0, 1.0])])  # a legend wider than the figure would be cut off
    figure = plots.draw(long)
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().x1 <= figure.bbox.x1
    many = Study([trial(f"v{i}", 1, [3.0, 2.0, 1.0]) for i in range(MAX_SERIES + 2)])
    chart, = charts_of(many)
    assert len({(one.color, one.dashes) for one in chart.series}) == MAX_SERIES
    assert chart.left_out == [f"v{MAX_SERIES}", f"v{MAX_SERIES + 1}"]
    assert "2 variants not drawn" in plots.draw(many).axes[0].get_title()


def test_the_first_evaluations_do_not_press_the_curves_together(study):
    low, high, is_cut = value_range(charts_of(study)[0].series, "tokens")
    assert (low < 2.0, 4.0 < high < 5.0, is_cut) == (True, True, True)


@pytest.mark.parametrize("suffix, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_format_follows_the_ending(study, tmp_path, suffix, start):
    plots.save_plot(str(tmp_path / f"a.{suffix}"), study)
    assert (tmp_path / f"a.{suffix}").read_bytes().startswith(start)


def test_a_mistake_is_one_line(study, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--plot: a\.gif: its ending must be one of \.png"):
        compare_main([str(tmp_path), "--plot", "a.gif"])
    with pytest.raises(UserError, match="cannot be written"):
        plots.save_plot(str(tmp_path / "absent" / "a.png"), study)
    with pytest.raises(UserError, match="no run has evaluations"):
        plots.draw(Study([StudyTrial("a", 1, "missing")]))
    require_package.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="needs the package matplotlib"):
        plots.check_plot("a.png")
    require_package.cache_clear()
