"""What a page shows of where its results come from: configurations, hardware, runs, what failed, notes, commands."""

import shlex
from collections.abc import Iterable

from blockgpt.experiments.comparison import compared_values, differences
from blockgpt.experiments.log_values import printable
from blockgpt.experiments.records import Column, Run, columns
from blockgpt.experiments.report.markup import bullets, code_block, details, html_table
from blockgpt.experiments.report.results import MAX_ROWS, OPEN_ROWS, Report, left_out
from blockgpt.experiments.study import StudyTrial
from blockgpt.experiments.verdict_text import cell_prefix, effect_text, general_texts

MAX_CONFIGS, MAX_VALUES, MAX_TEXTS = 16, 12, 200  # columns, values of a row, and lines that a page lists
LIMITS = (
    "A verdict holds for the regime beside it: this size, these tokens, this data. Effects can change sign with size.",
    "Bands of the curves reach from the lowest seed to the highest. They are no confidence intervals.",
    "Intervals are not adjusted for the number of verdicts; the p values are (Holm).",
    "Worth is read off the baseline's fitted law. Its interval does not carry the error of the law's form.",
)
UNJUDGED_LIMITS = (
    "Nothing is judged here: a difference that is smaller than the spread over seeds may be noise.", *LIMITS[1:2])


# ---- configurations, environment ----

def first_runs(report: Report) -> dict[str, Run]:
    """{variant, with its size where there are several: its first run}."""
    sizes = {trial.size for trial in report.study.trials}
    found: dict[str, Run] = {}
    order = sorted(report.study.trials, key=lambda trial: trial.variant != report.baseline)
    for trial in order:
        label = f"{trial.variant}, {trial.size}" if len(sizes) > 1 else trial.variant
        if trial.name in report.by_name and label not in found and not trial_is_broken(report, trial):
            found[label] = report.by_name[trial.name]
    return found


def trial_is_broken(report: Report, trial: StudyTrial) -> bool:
    return not report.by_name[trial.name]["config"]


def configs_section(report: Report) -> str:
    """The configurations side by side: what differs, marked where it is not the baseline's; folded, what is equal."""
    found = first_runs(report)
    if not found:
        return ""
    listed = dict(list(found.items())[:MAX_CONFIGS])
    values = {label: {key: value for key, value in compared_values(run).items() if key != "seed"}
              for label, run in listed.items()}
    differing = differences([{**run, "name": label} for label, run in listed.items()]) if len(listed) > 1 else {}
    differing.pop("seed", None)
    keys = dict.fromkeys(key for row in values.values() for key in row)
    unequal = [key for key in keys if len({row.get(key) for row in values.values()}) > 1]
    derived = [key for key in unequal if key not in differing]

    def grid(names: Iterable[str]) -> str:
        rows = [[key, *(printable(row.get(key)) for row in values.values())] for key in names]
        marked = [(i, j) for i, row in enumerate(rows) for j in range(2, len(row)) if row[j] != row[1]]
        return html_table(["key", *values], rows, left=[*values], marked=marked)

    content = grid(differing) if differing else "<p>They do not differ.</p>"
    content += left_out(len(found), len(listed), "configurations")
    content += details(f"{len(derived)} keys that follow from these", grid(derived)) if derived else ""
    equal = [(key, printable(next(iter(values.values())).get(key))) for key in keys if key not in unequal]
    return content + details(f"{len(equal)} keys that are equal", html_table(("key", "value"), equal, left=("value",)))


def environment_section(report: Report) -> str:
    """Hardware, versions, commit and data of the runs; how many runs have each value where they differ."""
    names = [trial.name for trial in report.study.trials if trial.name in report.by_name]
    counts: dict[str, dict[str, int]] = {}
    for run in [report.by_name[name] for name in names] or report.runs:
        found = {**run["environment"], "dataset": run["data"].get("dataset"),
                 "data fingerprint": run["data"].get("fingerprint"), "training tokens": run["unique_tokens"]}
        for key, value in found.items():
            if value is not None:
                text = printable(value)
                counts.setdefault(key, {})[text] = counts.get(key, {}).get(text, 0) + 1
    first = ("hardware", "device", "threads", "world_size", "dtype", "git_commit", "torch", "python", "dataset")
    order = sorted(counts, key=lambda key: first.index(key) if key in first else len(first))
    rows = [(key, "; ".join(value if len(counts[key]) == 1 else f"{value} ({n} runs)"
                            for value, n in list(counts[key].items())[:MAX_VALUES])
             + (" …" if len(counts[key]) > MAX_VALUES else "")) for key in order]
    return html_table(("", "value"), rows, left=("value",)) if rows else ""


# ---- runs ----

def unfinished_texts(report: Report) -> list[str]:
    """One line for each run that has no value: failed, diverged, missing, broken."""
    lines = []
    for trial in report.study.trials:
        if trial.value is None:
            # Of a run that goes on or was interrupted, the reason is its status.
            status = [] if trial.status == "missing" and trial.reason else [trial.status]
            reason = [printable(trial.reason)] if trial.reason else []
            lines.append(f"{trial_text(trial)}: {': '.join([*status, *reason])}")
    known = {trial.name for trial in report.study.trials}
    return lines + [f"{run['name']}: {run['status']}" for run in report.runs
                    if run["name"] not in known and run["status"] != "finished"]


def trial_text(trial: StudyTrial) -> str:
    where = ", ".join([*([trial.size] if trial.size else []), f"seed {trial.seed}"])
    return f"{trial.variant}, {where}" + (f" ({trial.name})" if trial.name else "")


def unfinished_section(report: Report) -> str:
    texts = unfinished_texts(report)
    return bullets(texts[:MAX_TEXTS], "problems") + left_out(len(texts), MAX_TEXTS, "runs")


def runs_section(report: Report) -> str:
    """A row for each run."""
    own_columns = [c for c in columns(report.study.criterion)
                     if c.key not in ("rank", "name", "architecture", "delta", "status")]
    rows = []
    in_study = {trial.name for trial in report.study.trials}
    for trial in report.study.trials:
        run = report.by_name.get(trial.name, {})
        rows.append((trial.variant, trial.size, str(trial.seed), trial.status,
                     *(column_text(run, column) for column in own_columns), trial.name))
    rows += [("", "", printable(run["config"].get("seed")), run["status"].partition(":")[0],
              *(column_text(run, column) for column in own_columns), run["name"])
             for run in report.runs if run["name"] not in in_study]
    header = ["variant", "size", "seed", "status", *(column.header for column in own_columns), "run"]
    empty = [i for i in range(len(header)) if all(row[i] in ("", "-") for row in rows)]
    keep = [i for i in range(len(header)) if i not in empty]
    content = html_table([header[i] for i in keep], [[row[i] for i in keep] for row in rows[:MAX_ROWS]],
                    left=("size", "status", "run")) + left_out(len(rows), MAX_ROWS, "runs")
    return details(f"{len(rows):,} run{'s' * (len(rows) != 1)}", content, len(rows) <= OPEN_ROWS)


def column_text(run: Run, column: Column) -> str:
    """A cell of a table of runs; '-' for a value that the run does not have."""
    value = run.get(column.key)
    return "-" if value is None else column.format(value)


# ---- notes, limits, commands ----

def notes_section(report: Report) -> str:
    """Warnings and notes, of the judgement and of the runs."""
    notes, warnings = general_texts(report.judgement) if report.judgement else ([], [])
    if report.judgement and not report.withheld:  # effects and the front have sections of their own
        effects = {f"{cell_prefix(cell)}{effect_text(effect, report.judgement.level)}"
                   for cell, found in report.judgement.effects.items() for effect in found}
        notes = [note for note in notes if note not in effects]
    texts = dict.fromkeys([*(f"warning: {text}" for text in (*warnings, *report.warnings)),
                           *(f"note: {text}" for text in (*notes, *report.notes))])
    listed = list(texts)[:MAX_TEXTS]
    return bullets(listed, "notes") + left_out(len(texts), MAX_TEXTS, "notes")


def limits_section(report: Report) -> str:
    return bullets(LIMITS if report.judgement and not report.withheld else UNJUDGED_LIMITS)


def commands_section(report: Report) -> str:
    """The commands that lead to this page, quoted for a shell."""
    content = ""
    commits = {run["environment"].get("git_commit") for run in report.runs} - {None}
    lines = [f"git checkout {shlex.quote(str(commit).removesuffix('-dirty'))}" for commit in commits
             if len(commits) == 1]
    if any(str(commit).endswith("-dirty") for commit in commits):
        content += '<p class="quiet">The code had changes that were not committed ("-dirty").</p>'
    if report.command:
        content += code_block([*lines, shlex.join(report.command)])
        lines = []
    if report.declared:
        rows = [(key, printable(value)) for key, value in report.declared.items()]
        content += details("the study as it is declared", html_table(("field", "value"), rows, left=("value",)))
    names = dict.fromkeys([*report.commands, *report.by_name])
    words = [report.commands.get(name) or report.by_name[name]["command"] for name in names]
    run_lines = [shlex.join(command) for command in words if command]
    if run_lines:
        content += details(f"the commands of the runs ({len(run_lines):,})", code_block([*lines, *run_lines[:MAX_ROWS]])
                           + left_out(len(run_lines), MAX_ROWS, "commands"), len(run_lines) <= 6)
    return content
