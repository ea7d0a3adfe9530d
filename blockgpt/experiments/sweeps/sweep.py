"""A study from its plan to its last run: costs, probes, horizons, learning rates, screening, the runs that are judged.

The stages depend on each other's results, which are read from run directories. So a study that was stopped anywhere
goes through the same stages again, and finds what is done.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blockgpt.console import align_columns, human_bytes
from blockgpt.errors import UserError
from blockgpt.experiments.records import human_count
from blockgpt.experiments.sweeps.plan import COPY, SHUFFLED, SIZE, PlannedRun, Planner
from blockgpt.experiments.sweeps.progress import RunTable
from blockgpt.experiments.sweeps.runner import RunOutcome, SweepRunner, read_outcome
from blockgpt.experiments.sweeps.selection import (
    Budget,
    Cell,
    Cost,
    Rung,
    affordable,
    at_the_edge,
    choose_rates,
    equal_keys,
    expense,
    halving,
    solve_width,
    survivors,
)

PROBE_STEPS = 10
PROBE_KEYS: dict[str, Any] = {
    "max_iters": PROBE_STEPS, "log_interval": 1, "checkpoint_interval": 0, "profile": None, "patience": 0,
    "lr_decay_iters": None, "warmup_iters": None, "eval_interval": 1_000_000, "tracker": "none"}


class Sweep:
    """The stages of a study.

    Args:
        planner: gives the runs.
        folder: of the study.
        runner_for: (folder, table) → the runner of runs in that folder.
        cost_of: configuration → `Cost` without its speed.
        count_of: configuration → parameters.
        say: prints a line.
    """

    def __init__(self, planner: Planner, folder: Path, runner_for: Callable[[Path, RunTable], SweepRunner],
                 cost_of: Callable[[Any], Cost], count_of: Callable[[Any], int], say: Callable[[str], None]) -> None:
        self.planner, self.plan, self.folder = planner, planner.plan, folder
        self.runner_for, self.cost_of, self.count_of, self.say = runner_for, cost_of, count_of, say
        self.costs: dict[Cell, Cost] = {}
        self.rungs: list[Rung] = []
        self.stopped = False
        self.stages: list[PlannedRun] = []  # runs of the stages before the last

    # ---- before the runs

    @property
    def own_variants(self) -> list[str]:
        """The variants without those of the control, which cost what the baseline costs."""
        return [name for name in self.plan.variants if not (self.plan.control and name in (COPY, SHUFFLED))]

    def cells(self) -> list[Cell]:
        """(variant, size) of all that have figures of their own."""
        return [(variant, size) for size in self.plan.sizes for variant in self.own_variants]

    def estimate(self, probe: bool) -> bool:
        """Fill `costs`: the dry run of every cell, and its speed from a probe of ten steps.

        Returns:
            Whether all of it was done; False if the study was stopped.
        """
        if self.plan.equal == "params":
            self.equalize_parameters()
        for cell in self.cells():
            self.costs[cell] = self.cost_of(self.planner.config(*cell))
        if probe and not self.probe():
            return False
        self.equalize_steps()
        for variant in self.plan.variants:
            for size in self.plan.sizes:
                self.costs.setdefault((variant, size), self.costs[self.plan.baseline, size])
        return True

    def equalize_parameters(self) -> None:
        """--equal=params: d_ff or n_embd of each variant, so that it has the baseline's number of parameters."""
        fixed = {key for keys in self.plan.variants.values() for key in keys}
        for variant, size in self.cells():
            target = self.count_of(self.planner.config(self.plan.baseline, size))
            model = self.planner.config(variant, size).model.resolve()

            def count(keys: Mapping[str, Any], variant: str = variant, size: str = size) -> int:
                return self.count_of(self.planner.config(variant, size, **keys))

            keys = solve_width(target, count, model.d_ff, model.n_embd, model.n_head, fixed)
            if keys:
                self.planner.extra[variant, size] = keys
                values = ", ".join(f"{key}={value} (was {getattr(model, key)})" for key, value in keys.items())
                self.say(f"--equal=params: {variant}{size_text(size)}: {values}: {count({}):,} parameters of "
                         f"{target:,}")

    def equalize_steps(self) -> None:
        """The steps of each variant, so that it spends what the baseline spends; said where they change."""
        if any("max_iters" in keys for keys in self.plan.variants.values()):
            return  # the horizon itself is what varies
        for cell, keys in equal_keys(self.plan.equal, self.cells(), self.plan.baseline, self.costs).items():
            before = self.costs[cell].steps
            self.planner.extra[cell] = {**self.planner.extra.get(cell, {}), **keys}
            self.costs[cell] = dataclasses.replace(self.costs[cell], steps=keys["max_iters"])
            self.say(f"--equal={self.plan.equal}: {cell[0]}{size_text(cell[1])}: {keys['max_iters']:,} steps "
                     f"(were {before:,})")

    def probe(self) -> bool:
        """Train ten steps of every cell and add the speed to its cost; False if the study was stopped."""
        runs = {cell: self.planner.run(*cell, seed=self.plan.seeds[0], purpose="probe", **PROBE_KEYS)
                for cell in self.cells()}
        folder = self.folder / "probes"
        if any(read_outcome(folder / run.name).state != "finished" for run in runs.values()):
            self.say(f"probe: ten steps of {len(runs)} configurations")
        table = RunTable(folder, [*runs.values()])
        runner = self.runner_for(folder, table)
        outcomes = runner.run([*runs.values()], table.tick)
        table.clear()
        self.stopped = runner.stopping
        for cell, run in runs.items():
            outcome = outcomes[run.id]
            if outcome.state != "finished":
                if self.stopped:
                    return False
                raise UserError(f"variant {cell[0]}{size_text(cell[1])}: its probe of ten steps {outcome.state}: "
                                f"{outcome.reason} (see {folder / run.name}/sweep/console.txt; --retry_failed after "
                                "a fix)")
            cost = self.costs[cell]
            step_time = outcome.step_time or 0.0
            evaluation = cost.eval_tokens * step_time / cost.tokens_per_step / 3
            self.costs[cell] = dataclasses.replace(
                cost, step_time=step_time, overhead=max(0.0, (outcome.overhead or 0.0) - evaluation),
                memory=max(cost.memory, outcome.peak_memory or 0))
        return not self.stopped

    def check_memory(self) -> None:
        """`UserError` for the first cell that does not fit."""
        for (variant, size), cost in self.costs.items():
            if cost.memory > cost.available or cost.advice:
                advice = cost.advice or "fewer --workers, or a smaller batch_size or size"
                raise UserError(f"variant {variant}{size_text(size)}: does not fit: needs {human_bytes(cost.memory)} "
                                f"of {human_bytes(cost.available)} ({advice})")

    def choose_rungs(self, budget: Budget | None, screen: bool, n_judged: int | None, workers: int) -> None:
        """Decide how many variants are judged; `UserError` if the study costs more than its budget.

        Args:
            screen: whether successive halving may drop variants.
            n_judged: how many it leaves; None: as many as the budget affords.
        """
        others = [name for name in self.own_variants if name != self.plan.baseline]

        def cost_of(judged: int) -> float | None:
            names = [self.plan.baseline, *others[:judged], *(set(self.plan.variants) - set(self.own_variants))]
            unit = budget.unit if budget else "seconds"
            rungs = halving(len(others), judged) if others else []
            return expense(self.preview(names, rungs), self.costs, workers, unit)

        judged = min(n_judged or len(others), len(others))
        if budget:
            if screen and n_judged is None and others:
                judged = affordable(budget, len(others), cost_of)
            else:
                cost = cost_of(judged)
                if cost is None:
                    raise UserError("--budget: a time needs the speed, which was not measured (drop --no_probe)")
                if cost > budget.amount:
                    raise UserError(f"--budget: the study is expected to cost {Budget(cost, budget.unit)}, more than "
                                    f"{budget} (--halving judges fewer variants, or fewer seeds)")
        self.rungs = halving(len(others), judged) if others else []

    def preview(self, judged: Sequence[str], rungs: Sequence[Rung]) -> list[PlannedRun]:
        """The runs of all stages as far as they can be told now: which variants survive and win is open."""
        runs = self.planner.tuning() if self.plan.lr_sweep else []
        others = [name for name in self.own_variants if name != self.plan.baseline]
        for rung in rungs:
            runs += self.planner.screening([self.plan.baseline, *others[:rung.entrants]], rung.horizon)
        return runs + self.planner.judged(judged)

    def planned(self) -> list[PlannedRun]:
        """`preview` with the rungs that were chosen."""
        others = [name for name in self.own_variants if name != self.plan.baseline]
        left = len(others) - sum(rung.leavers for rung in self.rungs)
        control = [name for name in self.plan.variants if name not in self.own_variants]
        return self.preview([self.plan.baseline, *others[:left], *control], self.rungs)

    # ---- the runs

    def run_all(self, declare: Callable[[Sequence[PlannedRun]], None] = lambda runs: None
                ) -> tuple[list[PlannedRun], dict[str, RunOutcome]]:
        """Run all stages; returns (the runs of the last one, {id: outcome}). `stopped` says whether it was stopped.

        Args:
            declare: called with the runs of all stages before the last one starts: the stages before it have chosen
                which runs it has.
        """
        rates: dict[Cell, float] | None = None
        if self.plan.lr_sweep:
            rates = self.tune()
        variants = [*self.plan.variants]
        if not self.stopped and self.rungs:
            variants = self.screen(rates)
        if self.stopped:
            return [], {}
        runs = self.planner.judged(variants, rates)
        declare([*self.stages, *runs])
        outcomes = self.run_stage(runs)
        return runs, outcomes

    def run_stage(self, runs: Sequence[PlannedRun]) -> dict[str, RunOutcome]:
        """Run the runs of one stage; returns {id: outcome}."""
        table = RunTable(self.folder, runs)
        runner = self.runner_for(self.folder, table)
        try:
            outcomes = runner.run(runs, table.tick)
        finally:
            table.clear()
        self.stopped = runner.stopping
        return outcomes

    def tune(self) -> dict[Cell, float] | None:
        """The learning rate of every cell by the sweep; None if it was stopped."""
        runs = self.planner.tuning()
        self.stages += runs
        outcomes = self.run_stage(runs)
        if self.stopped:
            return None
        values = {run.id: outcomes[run.id].value if outcomes[run.id].state == "finished" else None for run in runs}
        rates = choose_rates(runs, values, lambda run: float(self.planner.program.load_config(run.words).learning_rate))
        for (variant, size), rate in rates.items():
            self.say(f"--lr_sweep: {variant}{size_text(size)}: {rate:g}")
        for line in at_the_edge(rates, self.plan.lr_sweep):
            self.say(f"warning: {line}")
        return rates

    def screen(self, rates: dict[Cell, float] | None) -> list[str]:
        """The variants that are left to be judged after successive halving."""
        left = [name for name in self.own_variants if name != self.plan.baseline]
        for rung in self.rungs:
            runs = self.planner.screening([self.plan.baseline, *left], rung.horizon, rates)
            self.stages += runs
            outcomes = self.run_stage(runs)
            if self.stopped:
                return []
            values = {(run.variant, run.size): outcomes[run.id].value if outcomes[run.id].state == "finished" else None
                      for run in runs}
            after = survivors(left, self.plan.baseline, [*self.plan.sizes], values, len(left) - rung.leavers)
            self.say(f"--halving: at {rung.horizon:g} of the horizon, dropped: "
                     f"{', '.join(name for name in left if name not in after)}")
            left = after
        control = [name for name in self.plan.variants if name not in self.own_variants]
        return [self.plan.baseline, *left, *control]

    # ---- what is shown

    def cost_lines(self) -> list[str]:
        """A table with a row for each cell."""
        rows = [("variant", "size", "params", "FLOPs/token", "steps", "tokens", "step ms", "a run", "memory")]
        for (variant, size), cost in self.costs.items():
            run = PlannedRun("", "", variant, size, 0, (), steps=cost.steps, tokens=cost.steps * cost.tokens_per_step)
            seconds = cost.seconds(run)
            rows.append((variant + " (baseline)" * (variant == self.plan.baseline), size, human_count(cost.parameters),
                         human_count(cost.flops_per_token), f"{cost.steps:,}", human_count(run.tokens),
                         "-" if cost.step_time is None else f"{cost.step_time * 1e3:.1f}",
                         "-" if seconds is None else duration(seconds), human_bytes(cost.memory)))
        return align_columns(rows, left=(0, 1))


def size_text(size: str) -> str:
    """', size tiny'; nothing for the only size."""
    return "" if size == SIZE else f", size {size}"


def duration(seconds: float) -> str:
    """'42 s', '3.5 min' or '1.2 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
