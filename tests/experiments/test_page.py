"""`--report`: the page says what the table says, whatever is in a run it is only text, and it needs nothing else."""

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser

import pytest
from run_helpers import FIXTURES, evaluation, make_run, step

from blockgpt.errors import UserError
from blockgpt.experiments.records import Point
from blockgpt.experiments.report.curves import Mean
from blockgpt.experiments.report.drawing import BOX, Interval, forest_axis, forest_strip, make_axis, thin_out
from blockgpt.experiments.report.markup import breakable
from blockgpt.experiments.report.page import check_report, render_page, save_report
from blockgpt.experiments.report.results import Report
from blockgpt.experiments.report.studies import WITHHELD, without_verdicts
from blockgpt.experiments.study import Study, StudyTrial
from blockgpt.experiments.verdict_text import (
    detail_texts,
    floor_text,
    general_texts,
    header_text,
    lines_of,
    outcome_text,
    table_columns,
)
from blockgpt.experiments.verdicts import judge
from compare_architectures import main as compare_main

MAX_BYTES = 6_000_000
EVIL = '</style></script ><!--<script ></script><script>alert(1)</script><img src=x onerror="alert(2)">\u2028 & "'
NOISE = (0.02, -0.01, 0.03, 0.0)
OWN = (0.0005, -0.0005, 0.0003, -0.0003)  # of a variant that is equal to the baseline


class Page(HTMLParser):
    """A page as a browser reads it.

    Attributes:
        elements: (tag, attributes) in order.
        texts: the text of each script, style and other element, by tag.
        rows: {name of a line of a forest plot: (its badge, its figures, its further lines)}.
    """

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.stack, self.raw, self.words, self.forest = [], [], {}, [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())
        self.data = json.loads(next(text for text in self.raw["script"] if text.startswith("{")))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.stack.append((tag, dict(attributes)))
        if dict(attributes).get("class") == "row":
            self.forest.append({})
        if tag in ("script", "style"):
            self.raw.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop()[0] != tag:
            pass

    def handle_data(self, text):
        if self.stack and self.stack[-1][0] in ("script", "style"):
            self.raw[self.stack[-1][0]][-1] += text
            return
        self.words.append(text)
        for tag, attributes in self.stack:
            name = {"h4": "name", "span": "badge", "p": "figures"}.get(tag)
            if name and self.forest and any(a.get("class") == "row" for _, a in self.stack) and (
                    name == "name" or (attributes.get("class") or "").split(" ")[0] == name):
                self.forest[-1][name] = self.forest[-1].get(name, "") + text

    @property
    def rows(self):
        return {row["name"]: row for row in self.forest if "name" in row}


def trials(variant, offset, factors=None, horizon=1000.0, own=(0, 0, 0, 0), n_evals=3, **fields):
    found = []
    for seed, noise in enumerate(NOISE):
        value = 2 + noise + own[seed] + offset * (1 + 0.02 * (seed - 1)) - 0.1 * (horizon / 1000 - 1)
        curve = [Point(i, 100.0 * i, 1e6 * i, 1.0 * i, value + 1 / (i + 1)) for i in range(n_evals)]
        found.append(StudyTrial(variant, seed, value=value, horizon=horizon, curve=curve, parameters=500.0,
                                unique_tokens=4000.0, tokens_per_sec=100.0 + seed + 50 * offset, peak_memory=2.0**30,
                                flops_per_token=10.0 + offset, hardware="cpu", factors=factors or {}, **fields))
    return found


@pytest.fixture
def study():
    return Study([
        *trials("base", 0.0, {"norm": "ln", "position": "abs"}),
        *trials("rms", -0.2, {"norm": "rms", "position": "abs"}),
        *trials("rope", 0.1, {"norm": "ln", "position": "rope"}),
        *trials("both", 0.0, {"norm": "rms", "position": "rope"}, own=OWN),
        *trials("base", 0.0, horizon=500.0), *trials("base", 0.0, horizon=2000.0),
        StudyTrial("lost", 1, "failed", horizon=1000.0, reason="NonFiniteError: at step 3", name="lost-1"),
        StudyTrial("noisy", 0, value=2.5, horizon=1000.0), StudyTrial("noisy", 1, value=1.7, horizon=1000.0),
        StudyTrial("noisy", 2, value=2.3, horizon=1000.0)])


# ---- the content

def test_the_page_says_what_the_table_says(study):
    judgement = judge(study, "base", margin=0.01, look=2)
    page = Page(render_page(Report("a study", study, [], judgement, "Is RMSNorm better?")))
    assert {row.outcome for row in judgement.verdicts} == {"better", "worse", "equal", "inconclusive", None}
    for line in lines_of(judgement):
        if line.verdict is not None:
            row = page.rows[line.arm.variant]
            assert row["badge"] == outcome_text(line.verdict)
            if line.verdict.difference:
                assert row["figures"].startswith(f"{line.verdict.difference.mean:+.4f}, 95 % [")
        for text in detail_texts(line, judgement.level):
            assert text in page.text or line.is_baseline
    for name, cells in table_columns(lines_of(judgement), judgement.level).items():
        assert all(text.strip() in page.text for text in (name, *cells))
    notes, warnings = general_texts(judgement)
    for text in (*notes, *warnings):
        assert text.partition(": ")[2] in page.text or "effect" in text or "interaction" in text
    assert header_text(judgement) in page.text
    assert floor_text(judgement.floors[0], "base", 0.05) in page.text
    assert "Is RMSNorm better?" in page.text and "fewer tokens" in page.text
    assert "lost, seed 1 (lost-1): failed: NonFiniteError: at step 3" in page.text
    assert "Pareto front" in page.text and "regime: 1k tokens, 4k unique tokens (0.25 epochs)" in page.text


def test_the_effects_of_a_grid_are_drawn(study):
    grid = Study([trial for trial in study.trials if trial.factors])
    judgement = judge(grid, "base", margin=0.01)
    page = Page(render_page(Report("a study", grid, [], judgement)))
    effects = [effect for found in judgement.effects.values() for effect in found]
    rows = [row for row in page.forest if row.get("badge") in ("main effect", "interaction")]
    assert len(effects) == len(rows) == 3
    for effect, row in zip(effects, rows, strict=True):
        assert row["figures"].startswith(f"{effect.estimate.mean:+.4f}, 95 % [") and all(f in row["name"] for f in
                                                                                         effect.factors)


def test_a_page_without_verdicts_gives_none_of_them_away(study):
    judgement = judge(study, "base", margin=0.01)
    page = Page(render_page(Report("a study", study, [], without_verdicts(judgement, study), withheld=WITHHELD)))
    assert WITHHELD in page.text
    rows = page.rows
    difference = next(v.difference for v in judgement.verdicts if v.variant == "rms")
    assert rows["rms"]["figures"] == f"{difference.mean:+.4f}, n=4"
    assert not any(row.get("badge") for row in rows.values())
    for word in ("better", "inconclusive", "equal within", "would settle", "fewer tokens", "main effect", "p (Holm)",
                 "p 0."):
        assert word not in re.sub("less is better|← better", "", page.text), word
    grid = Study([trial for trial in study.trials if trial.factors])
    judgement = judge(grid, "base")
    page = Page(render_page(Report("a study", grid, [], without_verdicts(judgement, grid), withheld=WITHHELD)))
    assert judgement.effects and "main effect" not in page.text and "interaction" not in page.text
    assert not [a for tag, a in page.elements if tag == "line" and a["class"] == "whisker"]


def test_curves_have_the_means_and_ranges_of_the_seeds(study):
    page = Page(render_page(Report("a study", study, [], judge(study, "base"))))
    chart = page.data["charts"][0]
    base = next(one for one in chart["series"] if page.data["variants"][str(one["v"])] == "base")
    values = [2 + noise + 1 for noise in NOISE]
    assert base["p"][0] == [0, pytest.approx(sum(values) / 4, rel=1e-5), pytest.approx(min(values)),
                            pytest.approx(max(values)), 4]
    assert [one["spend"] for one in page.data["charts"]] == ["tokens", "flops", "time"]
    assert [a["data-toggle"] for tag, a in page.elements if "data-toggle" in a] == ["0", "1", "2", "3"]
    assert all(a["aria-pressed"] == "true" for tag, a in page.elements if tag == "button" and "data-toggle" in a)


def test_an_interval_that_goes_on_outside_ends_in_an_arrow():
    intervals = [Interval(0.01, -0.02, 0.04), Interval(0.0, -0.01, 0.01), Interval(0.0, -5.0, 5.0)]
    axis = forest_axis(intervals)
    assert -0.3 < axis.low < -0.02 and 0.04 < axis.high < 0.3
    assert forest_strip(intervals[0], axis, "").count("M0,-5V5") == 2
    strip = forest_strip(intervals[2], axis, "")
    assert "M9,-5L0,0L9,5" in strip and "M-9,-5L0,0L-9,5" in strip and 'x1="0.00%" x2="100.00%"' in strip
    assert make_axis(0, 1).ticks == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


# ---- text is only text

def test_whatever_a_run_or_a_plan_is_named_it_is_text(study):
    trials = [t for t in study.trials if t.variant == "base" and t.horizon == 1000]
    evil = Study([*trials, *(StudyTrial(EVIL, t.seed, value=t.value, horizon=1000.0, curve=t.curve, name=EVIL)
                             for t in trials), StudyTrial("x", 9, "failed", reason=EVIL, horizon=1000.0)])
    plain = Page(render_page(Report("a", evil, [], judge(evil, "base"), "b")))
    page = Page(render_page(Report(EVIL, evil, [], judge(evil, "base"), EVIL, command=[EVIL], commands={"r": [EVIL]},
                                   declared={EVIL: EVIL}, notes=[EVIL], warnings=[EVIL])))
    assert len(page.raw["script"]) == 2 and len(page.raw["style"]) == 1
    assert not [text for text in page.raw["script"] if text.startswith("{") and "<" in text]  # nothing can end it
    for found in (plain, page):
        assert not [tag for tag, _ in found.elements if tag in ("img", "iframe", "object", "link", "base", "form")]
        assert not [a for _, a in found.elements if any(name.startswith("on") for name in a)]
    assert EVIL in page.data["variants"].values() and page.text.count("<script>alert(1)</script>") > 8
    assert sum("alert" in json.dumps(a) for _, a in page.elements if "data-v" in a) == 0


def test_names_of_run_files_are_text_and_half_characters_can_be_written(tmp_path):
    for seed in (1, 2):
        run = make_run(tmp_path / "runs" / f"<script>{seed}", seed=seed)
        record = json.loads((run / "run.json").read_text())
        launch = {"command": ["train.py", "--a=</script> it's \ud800"], "omp_num_threads": "1",
                  "hardware": {"device": "cpu", "name": "<b>cpu", "world_size": 1}, "git_commit": "<i>"}
        record |= {"arch_name": EVIL, "launches": [launch], "hardware": launch["hardware"]}
        (run / "run.json").write_text(json.dumps(record))
    compare_main([str(tmp_path / "runs"), "--report", str(tmp_path / "a.html")])
    page = Page((tmp_path / "a.html").read_text())
    assert len(page.raw["script"]) == 2 and "<script>1" in page.text and "<b>cpu" in page.text
    assert "OMP_NUM_THREADS=1 python train.py '--a=</script> it'\"'\"'s ?'" in page.text


def test_the_page_loads_nothing(study):
    html = render_page(Report("a study", study, [], judge(study, "base")))
    page = Page(html)
    assert not [a for tag, a in page.elements if {"src", "href", "action", "data", "srcset", "background"} & a.keys()]
    assert "http:" not in html.replace("http://www.w3.org/2000/svg", "") and "https:" not in html
    assert not re.search(r"@import|url\(|\bimport\b|XMLHttpRequest|WebSocket|EventSource", html)
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    script = next(text for text in page.raw["script"] if not text.startswith("{"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'")


# ---- size

def test_a_thinned_curve_keeps_its_ends_and_extremes():
    means = [Mean(i, 2.0, 1.9, 2.1, 3) for i in range(10_000)]
    means[3333], means[7777] = Mean(3333, 9.0, 8.0, 10.0, 3), Mean(7777, 1.0, 0.5, 1.5, 3)
    found = thin_out(means, 200)
    assert len(found) <= 200 and {means[0], means[-1], means[3333], means[7777]} <= set(found)
    assert thin_out(means[:150], 200) == means[:150]


def page_size(study):
    return len(render_page(Report("a", study, [], judge(study, "v0"))).encode())


def test_a_page_of_long_runs_and_of_many_runs_is_small():
    # Two curves of 10,000 evaluations would have 5 MB.
    assert page_size(Study([t for i in range(2) for t in trials(f"v{i}", 0.1 * i, n_evals=10_000)[:1]])) < MAX_BYTES / 6
    many = [t for i in range(40) for h in range(1, 16) for t in trials(f"v{i}", 0.1 * i, horizon=1000.0 * h)[:1]]
    assert page_size(Study(many)) < MAX_BYTES


# ---- the command

def test_compare_writes_plot_and_report(tmp_path, capsys):
    for seed in (1, 2, 3):
        for preset, better in (("gpt2", 0), ("llama", 0.1)):
            make_run(tmp_path / "runs" / f"{preset}-{seed}", preset=preset, seed=seed,
                     losses=(2.5, 2 + NOISE[seed] - better - 0.01 * seed))
    words = [str(tmp_path / "runs"), "--plot", str(tmp_path / "a.svg"), "--report", str(tmp_path / "a.html")]
    compare_main([*words, "--baseline", "gpt2-1"])
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    page = Page((tmp_path / "a.html").read_text())
    assert re.search(r"Pre\S* .* better$", capsys.readouterr().out, re.M)
    assert [row["badge"] for row in page.rows.values()] == ["better"]
    assert f"python compare_architectures.py {' '.join(words)} --baseline gpt2-1" in page.text
    assert "normalization" in page.text and "rmsnorm" in page.text

    compare_main([*words[:-1], str(tmp_path / "b.html"), "--latest", "3"])
    page = Page((tmp_path / "b.html").read_text())
    assert not page.rows and "Verdicts" not in page.text and page.data["charts"]
    assert "Nothing is judged here" in page.text


def test_the_configurations_are_side_by_side_with_their_differences_marked(tmp_path):
    for name, lr in (("a", 1e-3), ("b", 1e-3), ("c", 3e-3)):
        make_run(tmp_path / "runs" / name, seed=1, config={"learning_rate": lr, "weight_decay": 0.1 + (name == "b")})
    compare_main([str(tmp_path / "runs"), "--report", str(tmp_path / "a.html")])
    html = (tmp_path / "a.html").read_text()
    table = html[html.index('id="configurations"'):html.index("keys that are equal")]
    assert re.findall(r'<th scope="row"[^>]*>(\w+)', table) == ["learning_rate", "weight_decay"]
    assert re.findall(r'<td class="left( marked)?">([^<]+)', table).count((" marked", "0.003")) == 1
    assert len(re.findall("marked", table)) >= 2 and "block_size" in html[html.index("keys that are equal"):]


def test_malformed_logs_are_on_the_page(tmp_path):
    make_run(tmp_path / "runs/whole", seed=1)
    make_run(tmp_path / "runs/torn", step(1), evaluation(100, 2.0), "{broken", seed=2)
    make_run(tmp_path / "runs/hopeless", run="{")
    compare_main([str(tmp_path / "runs"), *map(str, FIXTURES.iterdir()), "--report", str(tmp_path / "a.html")])
    page = Page((tmp_path / "a.html").read_text())
    assert "hopeless: broken: run.json is not JSON" in page.text
    assert "warning: torn: 1 unreadable line of metrics.jsonl skipped" in page.text


@pytest.mark.parametrize("path, problem", [
    ("a.pdf", r"--report: a\.pdf: its ending must be one of \.html, \.htm"),
    ("absent/a.html", "no such folder: absent"), ("folder.html", "is a folder")])
def test_what_cannot_be_written_is_refused_before_any_run(tmp_path, monkeypatch, path, problem):
    from tools import ablate

    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match=problem):
        compare_main(["no/such/run", "--report", path])
    with pytest.raises(UserError, match=problem):
        ablate.own_and_rest(["--report", path])
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path, study, monkeypatch):
    report = Report("a study", study, [])
    (tmp_path / "a.html").write_text("before")
    monkeypatch.setattr("blockgpt.files.fsync_path", lambda path: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(UserError, match=r"a\.html: cannot be written: No space left"):
        save_report(str(tmp_path / "a.html"), report)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.html", "before")]


def test_a_page_needs_no_matplotlib(tmp_path, study, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    check_report(str(tmp_path / "a.html"))
    save_report(str(tmp_path / "a.HTM"), Report("a study", study, []))
    assert f'viewBox="0 0 {BOX} {BOX}"' in (tmp_path / "a.HTM").read_text()


@pytest.mark.parametrize("name, text", [
    ("pre+rope+swiglu", "pre+<wbr>rope+<wbr>swiglu"), ("a<b+c", "a&lt;b+<wbr>c"), ("+0.0312", "+0.0312"),
    ("lr=1e-3+rope", "lr=1e-3+<wbr>rope")])
def test_a_long_name_may_be_broken_after_its_options(name, text):
    assert breakable(name) == text
