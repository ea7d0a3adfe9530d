"""The stages of a study, and its results, with runs that end as a table says."""

import dataclasses
import re

import pytest
from dataset_helpers import refusal
from run_helpers import make_run

from blockgpt.errors import UserError
from blockgpt.experiments.sweeps import progress
from blockgpt.experiments.sweeps.identity import Program
from blockgpt.experiments.sweeps.plan import SCREENING_SEED, Plan, Planner, with_control
from blockgpt.experiments.sweeps.progress import RunTable, label, logged_step
from blockgpt.experiments.sweeps.results import (
    control_lines,
    detectable_text,
    factors_of,
    pair_differences,
    study_of_plan,
)
from blockgpt.experiments.sweeps.runner import RunOutcome
from blockgpt.experiments.sweeps.selection import Cost, parse_budget
from blockgpt.experiments.sweeps.sweep import Sweep
from blockgpt.experiments.verdicts import judge
from compare_architectures import load_run
from configurator import KEYS, TYPES, load_config

PROGRAM = Program(load_config, KEYS, TYPES, "version")
VARIANTS = {"base": {}, "good": {"dropout": 0.1}, "bad": {"dropout": 0.2}, "worst": {"dropout": 0.3},
            "lost": {"dropout": 0.4}}
LOSSES = {"base": 3.0, "good": 2.0, "bad": 4.0, "worst": 5.0, "lost": None}


def plan(**fields):
    words = ("config/arch_gpt2.py", "config/size_tiny.py", "--max_iters=100")
    return with_control(Plan(**{"name": "x", "base": words, "variants": VARIANTS, "baseline": "base", **fields}))


class Ends:
    """A runner whose runs end at once, with the loss of their variant."""

    stopping = False

    def __init__(self, started, losses):
        self.started, self.losses = started, losses

    def run(self, runs, tick):
        tick()
        self.started += runs
        return {run.id: RunOutcome("diverged") if (loss := self.losses[run.variant]) is None else
                RunOutcome("finished", value=loss + run.seed / 1e9, step_time=0.5, overhead=2.0, peak_memory=5)
                for run in runs}


def cost(config):
    return Cost(1000, 6e6, 512, config.max_iters, config.eval_tokens, 1, memory=10, available=20)


@pytest.fixture
def sweep(tmp_path):
    def build(losses=LOSSES, cost_of=cost, count_of=lambda config: 1000, **fields):
        started, lines = [], []
        planner = Planner(plan(**fields), PROGRAM, {}, tmp_path)
        found = Sweep(planner, tmp_path, lambda *_: Ends(started, losses), cost_of, count_of, lines.append)
        found.started, found.lines = started, lines
        return found
    return build


def test_screening_drops_the_worst_and_judges_the_rest_on_other_seeds(sweep):
    study = sweep()
    study.estimate(probe=False)
    study.choose_rungs(None, screen=True, n_judged=1, workers=1)
    runs, outcomes = study.run_all()
    rungs = [(run.variant, run.horizon) for run in study.started if run.purpose == "screen"]
    assert rungs == [*((name, 0.25) for name in VARIANTS), ("base", 0.5), ("good", 0.5), ("bad", 0.5)]
    assert {run.variant for run in runs} == {"base", "good"} and len(outcomes) == 6
    assert {run.seed for run in study.started if run.purpose == "screen"} == {SCREENING_SEED}
    assert study.lines == ["--halving: at 0.25 of the horizon, dropped: worst, lost",
                           "--halving: at 0.5 of the horizon, dropped: bad"]
    assert len(study.planned()) == len(study.started)


def test_without_halving_all_are_judged_and_the_lost_one_stays(sweep):
    study = sweep()
    study.estimate(probe=False)
    study.choose_rungs(parse_budget("1e15"), screen=False, n_judged=None, workers=1)
    runs, outcomes = study.run_all()
    assert {run.variant for run in runs} == set(VARIANTS)
    assert [outcomes[run.id].state for run in runs].count("diverged") == 3


@pytest.mark.slow
def test_more_than_the_budget_is_refused_and_halving_fits_into_it(sweep):
    study = sweep(seeds=(1, 2, 3, 4, 5))
    study.estimate(probe=False)
    everything = sum(6e6 * run.tokens for run in study.planner.judged())
    budget = parse_budget(f"{0.9 * everything:.0f}")
    assert "--halving judges fewer variants" in refusal(study.choose_rungs, budget, False, None, 1, error=UserError)
    study.choose_rungs(budget, screen=True, n_judged=None, workers=1)
    assert sum(6e6 * run.tokens for run in study.planned()) <= budget.amount
    assert {run.purpose for run in study.planned()} == {"judge", "screen"}
    control = sweep(variants={"base": {}}, control=True)
    control.estimate(probe=False)
    assert "expected to cost" in refusal(control.choose_rungs, parse_budget("1e6"), True, None, 1, error=UserError)
    assert "is not enough" in refusal(study.choose_rungs, parse_budget("1e6"), True, None, 1, error=UserError)


def test_a_probe_gives_the_speed_and_one_that_fails_is_refused(sweep):
    study = sweep(losses={**LOSSES, "lost": 3.0})
    assert study.estimate(probe=True)
    assert {run.purpose for run in study.started} == {"probe"} and {run.steps for run in study.started} == {10}
    found = study.costs["bad", "base"]
    assert (found.step_time, found.memory) == (0.5, 10)
    assert "expected to cost" in refusal(study.choose_rungs, parse_budget("1s"), False, None, 1, error=UserError)
    assert "variant lost: its probe of ten steps diverged" in refusal(sweep().estimate, True, error=UserError)


def test_what_does_not_fit_is_refused(sweep):
    study = sweep(cost_of=lambda config: dataclasses.replace(cost(config), advice="buy memory", memory=30 * 2**30))
    study.estimate(probe=False)
    assert refusal(study.check_memory, error=UserError) == (
        "variant base: does not fit: needs 30.00 GiB of 0 MiB (buy memory)")


def test_a_sweep_of_rates_gives_each_variant_its_own(sweep):
    study = sweep(losses={**LOSSES, "lost": 9.0}, lr_sweep=(1e-3, 2e-3), seeds=(1,))
    study.estimate(probe=False)
    runs, _ = study.run_all()
    assert {load_config(run.words).learning_rate for run in runs} == {1e-3}  # of equally good ones the smaller
    assert len(study.stages) == 10 and sum("is the smallest tried" in line for line in study.lines) == 5


def test_equal_flops_changes_the_steps_of_the_runs(sweep):
    study = sweep(cost_of=lambda config: dataclasses.replace(
        cost(config), flops_per_token=6e6 * (2 if config.model.dropout == 0.1 else 1)), equal="flops", seeds=(1,))
    study.estimate(probe=False)
    assert {run.variant: run.steps for run in study.planner.judged()} == {
        "base": 100, "good": 50, "bad": 100, "worst": 100, "lost": 100}
    assert study.lines == ["--equal=flops: good: 50 steps (were 100)"]


def test_equal_parameters_changes_a_width_and_says_so(sweep):
    def count(config):
        model = config.model.resolve()
        return 1000 * (2 if model.dropout == 0.1 else 1) * model.d_ff

    study = sweep(count_of=count, equal="params", seeds=(1,))
    study.estimate(probe=False)
    assert load_config(study.planner.judged()[1].words).model.d_ff == 128
    assert study.lines == ["--equal=params: good: d_ff=128 (was 256): 256,000 parameters of 256,000"]


def test_keys_of_the_probe_are_keys_of_train():
    from blockgpt.experiments.sweeps.sweep import PROBE_KEYS

    assert PROBE_KEYS.keys() <= KEYS.keys()


# ---- results


def finished_study(tmp_path, diverged=(), **fields):
    """A planner, its runs, and outcomes whose directories exist; `diverged`: (variant, seed)."""
    planner = Planner(plan(**fields), PROGRAM, {}, tmp_path)
    runs, outcomes = planner.judged(), {}
    for run in runs:
        value = LOSSES[run.variant] + 0.01 * run.seed + 0.001 * len(run.variant) * (run.seed % 2)
        failed = (run.variant, run.seed) in diverged
        outcomes[run.id] = RunOutcome("diverged", "not finite") if failed else RunOutcome("finished", value=value)
        make_run(tmp_path / run.name, losses=(value,), seed=run.seed,
                 **({"status": "failed", "status_reason": "NonFiniteError: x"} if failed else {}))
    return planner.plan, runs, outcomes


def test_planned_runs_are_judged_and_one_that_diverged_stays(tmp_path):
    names = {name: VARIANTS[name] for name in ("base", "good", "bad")}
    study, runs, outcomes = finished_study(tmp_path, [("good", 2)], variants=names, seeds=(1, 2, 3, 4))
    found = study_of_plan(study, runs, outcomes, tmp_path, load_run)
    assert {trial.horizon for trial in found.trials} == {100 * 512}
    assert {(t.variant, t.seed): t.status for t in found.trials}["good", 2] == "diverged"
    verdicts = {verdict.variant: verdict for verdict in judge(found, "base", 0.01).verdicts}
    assert verdicts["bad"].outcome == "worse"
    assert verdicts["good"].outcome not in ("better", "equal")
    assert any("diverged" in note for note in verdicts["good"].notes)


def test_a_run_that_never_began_is_a_trial_too(tmp_path):
    names = {name: VARIANTS[name] for name in ("base", "good")}
    study, runs, outcomes = finished_study(tmp_path, variants=names)
    lost = runs[1]
    for path in (tmp_path / lost.name).iterdir():
        path.unlink()
    outcomes[lost.id] = RunOutcome("refused", "no such key")
    trial = study_of_plan(study, runs, outcomes, tmp_path, load_run).trials[1]
    assert (trial.variant, trial.seed, trial.status, trial.reason) == (lost.variant, lost.seed, "failed", "no such key")


def test_the_factors_of_a_grid_are_its_keys():
    vary = {f"{n}+{p}": {"normalization": n, "n_layer": p} for n in ("layernorm", "rmsnorm") for p in (1, 2)}
    grid = plan(variants=vary, baseline="layernorm+1", control=True)
    assert factors_of(grid) == {name: {"normalization": keys["normalization"], "n_layer": str(keys["n_layer"])}
                                for name, keys in vary.items()}
    assert factors_of(plan()) == {}


def test_the_control_passes_only_if_the_copy_ties_and_the_shuffled_tokens_lose(tmp_path, monkeypatch):
    for losses, expected in (({"baseline-copy": 3.0, "shuffled-tokens": 4.0}, [True, True]),
                             ({"baseline-copy": 2.0, "shuffled-tokens": 2.9}, [False, False])):
        folder = tmp_path / str(expected[0])
        monkeypatch.setitem(LOSSES, "baseline-copy", losses["baseline-copy"])
        monkeypatch.setitem(LOSSES, "shuffled-tokens", losses["shuffled-tokens"])
        study, runs, outcomes = finished_study(folder, variants={"base": {}}, control=True)
        lines, passed = control_lines(judge(study_of_plan(study, runs, outcomes, folder, load_run), "base", 0.1))
        assert ["passed" in line for line in lines] == expected and passed == all(expected)


def test_the_detectable_difference_shrinks_with_seeds_and_grows_with_spread_family_and_looks():
    def figure(*differences, look=1, **fields):
        return float(re.match(r"[0-9.]+", detectable_text(plan(**fields), differences, look))[0])

    assert figure(spread=1.0, seeds=range(20)) < figure(spread=1.0, seeds=range(5)) < figure(spread=2.0, seeds=range(5))
    assert figure(spread=1.0, seeds=range(5)) < figure(spread=1.0, seeds=range(5), look=2)
    assert figure(spread=1.0, seeds=range(5), variants={"base": {}, "good": {"dropout": 0.1}}) < figure(
        spread=1.0, seeds=range(5))
    assert figure([1.0, 3.0], seeds=range(5)) == pytest.approx(figure(spread=2**0.5, seeds=range(5)), abs=1e-3)
    assert "which the first runs, or --spread, give" in detectable_text(plan(), [], 1)
    assert detectable_text(plan(seeds=(1, 2)), [], 1) == "none with 2 seeds: a verdict takes 3"


def test_pairs_are_differences_of_one_seed_and_size(tmp_path):
    study, runs, outcomes = finished_study(tmp_path, [("base", 2)], variants={"base": {}, "good": {"dropout": 0.1}})
    [differences] = pair_differences(study, runs, outcomes)
    assert differences == pytest.approx([-1.0, -1.0])


# ---- the table


def test_the_table_fits_the_terminal_and_shows_what_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "is_terminal", lambda: True)
    runs = Planner(plan(seeds=range(8)), PROGRAM).judged()
    table = RunTable(tmp_path, runs)
    running = runs[30]
    (tmp_path / running.name).mkdir()
    (tmp_path / running.name / "metrics.jsonl").write_text('{"kind": "step", "step": 41}\n{"kind": "step", "st')
    for run in runs[:29]:
        table.report(run, "finished", RunOutcome("finished", step=100, value=2.5, seconds=70.0))
    table.report(running, "running", RunOutcome("open"))
    table.report(runs[29], "diverged", RunOutcome("diverged", "not finite"))
    lines = table.table(6, 70)
    assert len(lines) == 6 and max(map(len, lines)) <= 70
    assert any(label(running) in line and "running" in line and "41/100" in line for line in lines)
    assert "1 running · 1 diverged · 9 open · 29 finished" in lines[-1]
    assert "diverged: not finite" in capsys.readouterr().out
    table.tick()
    first = capsys.readouterr().out
    assert first.count("\n") == table.drawn and "\x1b[" not in first
    table.drawn_at = 0.0
    table.tick()
    assert f"\x1b[{first.count(chr(10))}A\x1b[J" in capsys.readouterr().out


def test_a_pipe_gets_a_line_for_each_change(tmp_path, capsys):
    runs = Planner(plan(seeds=(1,)), PROGRAM).judged()
    table = RunTable(tmp_path, runs)
    table.report(runs[1], "finished", RunOutcome("finished", value=2.5))  # it had finished before
    table.report(runs[0], "elsewhere", RunOutcome("open"))
    table.report(runs[0], "elsewhere", RunOutcome("open"))
    table.report(runs[0], "running", RunOutcome("open", step=7))
    table.report(runs[0], "finished", RunOutcome("finished", value=2.5))
    table.tick()
    lines = [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["1/5  base seed 1: runs in another process", "1/5  base seed 1: continues after step 7",
                     "2/5  base seed 1: finished, 2.5000"]


@pytest.mark.parametrize("content", [b"", b"nonsense\n", b'[1]\n{"step": null}\n', b'{"step": 3}'])
def test_the_step_of_a_damaged_log_is_unknown(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert logged_step(tmp_path) == 0
    assert logged_step(tmp_path / "absent") == 0
