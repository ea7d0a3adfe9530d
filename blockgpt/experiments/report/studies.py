"""The report of a study that a plan declares, when it has ended and while it runs.

A page that is read while a study runs is a look at its results. The level is shared out over recorded looks, so such a
page has verdicts only for what a recorded look has judged; `without_verdicts` removes them from a judgement otherwise.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blockgpt.errors import UserError
from blockgpt.experiments.judgement import Judgement, Verdict
from blockgpt.experiments.records import Run
from blockgpt.experiments.report.results import Report
from blockgpt.experiments.study import Study
from blockgpt.experiments.sweeps.plan import Plan, PlannedRun, plan_record
from blockgpt.experiments.sweeps.results import study_of_plan
from blockgpt.experiments.sweeps.runner import RunOutcome, incomplete_blocks, read_outcome, recorded_look
from blockgpt.experiments.verdicts import half_pairs, judge
from blockgpt.files import exists

JUDGED = ("judge", "horizon")  # purposes of the runs that are in the report
WITHHELD = ("The verdicts come with the next recorded look of tools.ablate: the level is shared out over the looks, "
            "and this page is none. It has the differences, without intervals and p values.")


def report_of_plan(plan: Plan, runs: Sequence[PlannedRun], outcomes: Mapping[str, RunOutcome], folder: Path,
                   load_run: Callable[[Path], Run], look: int | None, command: Sequence[str] = ()) -> Report:
    """The report of a study.

    Args:
        runs: those of other purposes than JUDGED are left out.
        folder: of the study.
        look: that judges what has finished; None: there is none, and the report has no verdicts.
        command: that makes the page again.
    """
    runs = [run for run in runs if run.purpose in JUDGED]
    loaded = {run.name: load_run(folder / run.name) for run in runs if exists(folder / run.name / "run.json")}
    study = study_of_plan(plan, runs, outcomes, folder, lambda path: loaded[path.name])
    judgement = judge(study, plan.baseline, plan.margin, plan.level, look or 1)
    declared = {name: value for name, value in plan_record(plan, ()).items()
                if name not in ("runs", "schema_version", "question") and value not in (None, "", (), {})}
    return Report(plan.name, study, [*loaded.values()],
                  judgement if look is not None else without_verdicts(judgement, study), plan.question,
                  "" if look is not None else WITHHELD, command,
                  {run.name: ("python", "train.py", *run.words) for run in runs}, declared,
                  warnings=[*incomplete_blocks(runs, outcomes),
                            *(f"{run['name']}: {text}" for run in loaded.values() for text in run["warnings"])])


def without_verdicts(judgement: Judgement, study: Study) -> Judgement:
    """A judgement with the means of the differences alone: nothing of it depends on a test or an interval of them."""
    arms = {(arm.variant, arm.size, arm.horizon): arm for arm in judgement.arms}

    def strip(verdict: Verdict) -> Verdict:
        difference = verdict.difference
        if difference is not None:
            difference = difference._replace(low=None, high=None, std=None, std_error=None)
        arm, base = (arms[name, verdict.size, verdict.horizon] for name in (verdict.variant, judgement.baseline))
        return Verdict(verdict.variant, verdict.size, verdict.horizon, None, difference, verdict.differences,
                       margin=verdict.margin, regime=verdict.regime,
                       notes=tuple(half_pairs(arm, base)))

    return dataclasses.replace(
        judgement, verdicts=tuple(map(strip, judgement.verdicts)), effects={}, pairing=None, look=None, notes=(),
        warnings=(*study.warnings, *(f"{name}: not judged: {reason}" for name, reason in study.excluded.items())))


# ---- a study's folder ----

def read_study(folder: Path) -> tuple[Plan, list[PlannedRun]]:
    """The plan and the runs that a study.json declares.

    Raises:
        UserError: it is not what tools.ablate writes.
    """
    path = folder / "study.json"
    try:
        record = json.loads(path.read_bytes())
        fields = {field.name: record[field.name] for field in dataclasses.fields(Plan)}
        for name in ("base", "seeds", "horizons", "lr_sweep", "overrides"):
            fields[name] = tuple(fields[name])
        fields["sizes"] = {name: tuple(words) for name, words in fields["sizes"].items()}
        runs = [planned_run(entry) for entry in record["runs"]]
        return Plan(**fields), runs
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not what tools.ablate writes: {type(error).__name__}: {error} (the same "
                        "tools.ablate command writes it anew)") from None


def planned_run(entry: Mapping[str, Any]) -> PlannedRun:
    """A run of study.json; its id is the end of its name."""
    name = str(entry["run"])
    if "/" in name or name in ("", ".", ".."):
        raise ValueError(f"run {name!r} is not the name of a folder")
    return PlannedRun(name.rpartition("-")[2], name, str(entry["variant"]), str(entry["size"]), int(entry["seed"]),
                      tuple(map(str, entry["command"][1:])), str(entry["purpose"]), float(entry["horizon"]),
                      int(entry["steps"]), int(entry["tokens"]), entry["block"])


def report_of_folder(folder: Path, load_run: Callable[[Path], Run], command: Sequence[str] = ()) -> Report:
    """The report of a study as its folder is now: with verdicts only if a recorded look has judged what has finished.

    Raises:
        UserError: study.json cannot be used.
    """
    plan, planned = read_study(folder)
    runs = [run for run in planned if run.purpose in JUDGED]
    outcomes = {run.id: read_outcome(folder / run.name) for run in runs}
    return report_of_plan(plan, runs, outcomes, folder, load_run, recorded_look(folder, runs, outcomes), command)
