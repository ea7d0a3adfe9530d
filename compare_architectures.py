# PYTHON_ARGCOMPLETE_OK
"""Which architecture is better? Reads run logs (run.json, metrics.jsonl) and prints an ablation table.

    python compare_architectures.py                             every run in runs/
    python compare_architectures.py 'runs/llama-*' --latest 5   some of them
    python compare_architectures.py --baseline gpt2-1           is the difference more than noise?
    python compare_architectures.py --format json               for other programs

A run is named by the architecture that was built, not by the keys that were set. Runs are ranked by their criterion,
the metric that run.json names (val_loss if it names none), if they were evaluated on the same data. A broken or
unfinished log is listed with its reason and does not stop the comparison. Runs that differ in the seed alone are
repeats: their mean has an interval, and with --baseline a verdict (docs/EXPERIMENTS.md). In blockgpt/experiments/,
records.py reads a run, comparison.py ranks runs and says what they differ in, verdicts.py judges. This program needs no
torch.
"""

import contextlib
import csv
import dataclasses
import functools
import gc
import io
import json
import math
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.checkpoints.resume import FORMER_INIT_FROM, present_value
from blockgpt.console import ArgumentParser, align_columns, check_ranges, script_path, terminal_width
from blockgpt.errors import UserError, exit_on_user_error
from blockgpt.experiments.arms import arms_without_baseline, study_of_runs
from blockgpt.experiments.comparison import Comparison, compare, shorten_middle
from blockgpt.experiments.judgement import Arm, Judgement
from blockgpt.experiments.log_values import printable
from blockgpt.experiments.records import COLUMNS, Column, Run, columns, read_run
from blockgpt.experiments.report.plots import check_plot, save_plot
from blockgpt.experiments.study import Reading, parse_at
from blockgpt.experiments.verdict_text import (
    SCHEMA_VERSION,
    arm_record,
    arms_table,
    judgement_record,
    latex_table,
    render_judgement,
)
from blockgpt.experiments.verdicts import TESTS, arms_of, judge
from blockgpt.files import exists, is_dir, list_dir, matching
from blockgpt.startup import n_cores
from configurator import KEYS, RENAMED_KEYS
from model_config import ModelConfig

WIDTH = terminal_width()  # of the terminal table
# The columns that a narrow terminal has no space for, in the order in which they are left out.
LEAST_WORTH = ("step_ms", "peak_memory", "mfu", "tokens_per_sec", "val_bpb", "parameters", "tokens")
MANY_RUNS, MAX_READERS = 1000, 8  # reading fewer takes no longer than to start processes
MODEL_KEYS = frozenset(f.name for f in dataclasses.fields(ModelConfig))
TRAINING_DEFAULTS = {name: f.default for name, f in KEYS.items() if name not in MODEL_KEYS}


def load_run(directory: str | os.PathLike[str]) -> Run:
    """A run directory as a dict: see `read_run`."""
    return read_run(directory, upgrade_config, RENAMED_KEYS)


def load_runs(directories: Sequence[str]) -> list[Run]:
    """Run directories as dicts, in their order; thousands of them are read by several processes."""
    readers = min(n_cores(), MAX_READERS)
    if len(directories) < MANY_RUNS or readers == 1:
        return list(map(load_run, directories))
    from concurrent.futures import ProcessPoolExecutor

    own = len(directories) // readers  # read by this process: they need not be sent to it
    with ProcessPoolExecutor(readers - 1, initializer=gc.disable) as pool:
        others = pool.map(load_run, directories[own:], chunksize=MANY_RUNS // 10)
        return [*map(load_run, directories[:own]), *others]


def upgrade_config(config: dict[str, Any], model: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, model) of a run.json in the present names, with every key.

    A key is added with the default that gives what earlier versions did, so that a run that lacks it had the default.
    """
    if not RENAMED_KEYS.keys().isdisjoint(config):
        config = {RENAMED_KEYS.get(key, key): present_value(key, value) for key, value in config.items()}
    config = TRAINING_DEFAULTS | config
    if config["init_from"] in FORMER_INIT_FROM:
        config["init_from"] = None
    if not model.keys() >= MODEL_KEYS:
        with contextlib.suppress(UserError, ArithmeticError, TypeError, ValueError):  # a broken log stays as it is
            model = complete_model(tuple((key, value) for key, value in model.items() if key in MODEL_KEYS)) | model
    return config, model


@functools.lru_cache  # thousands of runs have few architectures
def complete_model(known: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """Every key of the model whose known (key, value) these are."""
    return dataclasses.asdict(ModelConfig(**dict(known)).resolve())


# ---- printing ----

def column_cells(runs: list[Run], column: Column) -> list[str]:
    return [column.header, *("-" if run[column.key] is None else column.format(run[column.key]) for run in runs)]


@functools.lru_cache  # thousands of runs have few architectures
def wrap_text(text: str, indent: str = "") -> Sequence[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)


def as_table(comparison: Comparison) -> str:
    """For the terminal: per run a line of numbers, and below it the architecture and the reason for its status."""
    brief = [run | {"status": run["status"].split(":")[0]} for run in comparison["runs"]]
    table = {c.key: column_cells(brief, c) for c in columns(comparison["criterion"]) if c.key != "architecture"}
    final = f"final_{comparison['criterion'].metric}"
    for key in (*LEAST_WORTH, final):
        used = sum(2 + max(map(len, column)) for column in table.values() if column[0] != "run")
        if used + 12 <= WIDTH:
            break
        table.pop(key, None)
    cells = list(table.values())
    cells[1] = [shorten_middle(name, max(12, WIDTH - used)) for name in cells[1]]
    left = [i for i, column in enumerate(cells) if column[0] in ("run", "status")]
    header, *rows = align_columns(list(zip(*cells, strict=True)), left)
    lines, indent = [header, "-" * max(map(len, (header, *rows)))], " " * (4 + max(map(len, cells[0])))
    for run, brief_run, row in zip(comparison["runs"], brief, rows, strict=True):
        lines += [row, *wrap_text(run["architecture"] or "", indent)]
        lines += wrap_text(run["status"], indent) if run["status"] != brief_run["status"] else []
    lines += difference_lines(comparison["differences"])
    messages = {"note": comparison["notes"], "warning": comparison["warnings"]}
    for label, texts in messages.items():
        lines += [""] * bool(texts)
        lines += [line for text in texts for line in wrap_text(f"{label}: {text}")]
    return "\n".join(lines)


def difference_lines(differences: dict[str, dict[str, Any]]) -> list[str]:
    """A table with one column per run. Runs that do not fit in WIDTH follow in another table below."""
    tables: list[list[list[str]]] = []
    for name in next(iter(differences.values()), {}):
        values = [shorten_middle(printable(row[name]), 24) for row in differences.values()]
        column = [shorten_middle(name, max(20, WIDTH // 6, *map(len, values))), *values]
        if not tables or sum(2 + max(map(len, c)) for c in [*tables[-1], column]) > WIDTH + 2:
            tables.append([["differs in", *differences]])
        tables[-1].append(column)
    return [line for table in tables
            for line in ("", *align_columns(list(zip(*table, strict=True)), left=range(len(table))))]


def as_markdown(comparison: Comparison) -> str:
    """A table to paste, with notes and warnings below it."""
    header, *rows = zip(*(column_cells(comparison["runs"], c) for c in columns(comparison["criterion"])), strict=True)
    table = [header, ["---"] * len(header), *([text.replace("|", "\\|") for text in row] for row in rows)]
    messages = [*(f"- note: {text}" for text in comparison["notes"]),
                *(f"- warning: {text}" for text in comparison["warnings"])]
    return "\n".join(["| " + " | ".join(row) + " |" for row in table] + [""] * bool(messages) + messages)


def as_csv(comparison: Comparison) -> str:
    out = io.StringIO()
    keys = [c.key for c in columns(comparison["criterion"])]
    writer = csv.DictWriter(out, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(comparison["runs"])
    return out.getvalue().rstrip("\n")


def comparison_record(comparison: Comparison) -> dict[str, Any]:
    """A comparison as JSON has it."""
    keys = [*(c.key for c in columns(comparison["criterion"])), "path", "created_at"]
    runs = [{**{key: run[key] for key in keys}, "val_data": run["val_data"].digest,
             "changes": [change._asdict() for change in run["changes"]]} for run in comparison["runs"]]
    return {"schema_version": SCHEMA_VERSION, **comparison, "criterion": comparison["criterion"]._asdict(),
            "runs": runs}


def as_json(comparison: Comparison) -> str:
    return json.dumps(comparison_record(comparison), indent=2)


def as_latex(comparison: Comparison) -> str:
    """A tabular, with the notes and warnings as comments above it."""
    cells = [column_cells(comparison["runs"], c) for c in columns(comparison["criterion"])]
    comments = [f"% {text}" for text in (*comparison["notes"], *comparison["warnings"])]
    return "\n".join([*comments, latex_table(list(zip(*cells, strict=True)))])


FORMATS: dict[str, Callable[[Comparison], str]] = {"table": as_table, "md": as_markdown, "csv": as_csv, "json": as_json,
                                                   "latex": as_latex}


def render(comparison: Comparison, format: str = "table") -> str:
    """A comparison as text, in one of FORMATS. CSV leaves out the warnings and notes."""
    return FORMATS[format](comparison)


def render_with_arms(comparison: Comparison, arms: list[Arm], format: str) -> str:
    """A comparison, and the means over seeds where there are repeats."""
    if format == "json":
        return json.dumps({**comparison_record(comparison), "arms": list(map(arm_record, arms))}, indent=2)
    text = render(comparison, format)
    if format != "table" or all(len(arm.values) < 2 for arm in arms):
        return text
    return "\n".join([text, "", *arms_table(arms, WIDTH), "",
                      "note: --baseline NAME says which of these differences are more than noise"])


def render_with_judgement(comparison: Comparison, judgement: Judgement, format: str) -> str:
    """A comparison with the verdicts; CSV has the verdicts alone."""
    if format == "json":
        return json.dumps({**comparison_record(comparison), "judgement": judgement_record(judgement)}, indent=2)
    verdicts = render_judgement(judgement, format, WIDTH)
    return verdicts if format == "csv" else f"{render(comparison, format)}\n\n{verdicts}"


# ---- the command ----

def unless_unreadable(lookup: Callable[[str | Path], bool], path: str | Path) -> bool:
    """The answer of a lookup; True where it cannot tell: what cannot be read is listed as broken, with the reason."""
    try:
        return lookup(path)
    except UserError:
        return True


def directories_in(paths: Sequence[Path]) -> list[str]:
    return [str(path) for path in paths if unless_unreadable(is_dir, path)]


def run_directories(path: str) -> list[str]:
    """The run directory itself, or the run directories in a directory of runs."""
    if unless_unreadable(exists, os.path.join(path, "run.json")):
        return [path]
    return [str(run) for run in list_dir(path) if unless_unreadable(exists, run / "run.json")] or [path]


def select_runs(patterns: list[str], out_dir: str) -> list[str]:
    """The run directories that the patterns name, each once; without patterns all in `out_dir`."""
    found = [] if patterns else directories_in(list_dir(out_dir))
    for pattern in patterns:
        matches = [pattern] if unless_unreadable(is_dir, pattern) else directories_in(matching(pattern))
        if not matches:
            raise UserError(f"no such run directory: {pattern}")
        found += [run for path in matches for run in run_directories(path)]
    if not found:
        problem = "no runs in" if is_dir(out_dir) else "no such directory:"
        command = ["python", *map(script_path, ("train.py", "config/arch_llama.py", "config/size_demo.py")),
                   *([] if out_dir == "runs" else [f"--out_dir={out_dir}"])]
        raise UserError(f"{problem} {out_dir} (train one: {shlex.join(command)})")
    return list({os.path.realpath(path): path for path in found}.values())


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="compare_architectures.py", description="Compare training runs: an ablation table.")
    parser.add_argument("runs", nargs="*", type=os.path.expanduser,
                        help="run directories or globs (default: all in --out_dir)")
    parser.add_argument("--out_dir", type=os.path.expanduser, default="runs", help="directory of the runs")
    parser.add_argument("--latest", type=int, metavar="N", help="only the newest N of them")
    parser.add_argument("--format", choices=FORMATS, default="table", help="output format")
    parser.add_argument("--sort", metavar="KEY", help="one of " + ", ".join(c.key for c in COLUMNS) + " (default: the "
                        "criterion of the runs, usually val_loss)")
    parser.add_argument("--baseline", metavar="NAME", help="judge the others against this run or architecture")
    parser.add_argument("--margin", type=float, help="with --baseline: differences below it count as equal (default: "
                        "the standard deviation of the baseline over seeds)")
    parser.add_argument("--level", type=float, default=0.05, help="of the tests")
    parser.add_argument("--test", choices=TESTS, default="t", help="paired t, or exact sign flips from 6 pairs")
    parser.add_argument("--at", metavar="SPEND=N", help="judge at tokens=N, flops=N or time=SECONDS, interpolated "
                        "between evaluations")
    parser.add_argument("--last", type=int, default=0, metavar="K", help="judge the mean of the last K evaluations "
                        "(0: the best one)")
    parser.add_argument("--plot", type=os.path.expanduser, metavar="FILE",
                        help="draw the learning curves, the mean over seeds and their range, "
                        "to this .png, .svg or .pdf")
    parser.add_argument("--report", type=os.path.expanduser, metavar="FILE",
                        help="write verdicts, curves, configurations and commands to this .html, one page that needs "
                        "no network")
    args = parser.parse_args(argv)
    check_ranges(args, {"latest": (args.latest is None or args.latest >= 1, "at least 1"),
                        "margin": (args.margin is None or 0 < args.margin < math.inf, "positive"),
                        "level": (0 < args.level < 1, "between 0 and 1"), "last": (args.last >= 0, "0 or more")})
    if args.at and args.last:
        raise UserError("--last: has no effect with --at (drop one of them)")
    for name in ("margin", "test"):
        if getattr(args, name) != parser.get_default(name) and args.baseline is None:
            raise UserError(f"--{name}: has no effect without --baseline")
    if args.plot is not None:
        check_plot(args.plot)
    if args.report is not None:  # imported where it is asked for: the table shall not wait for it
        from blockgpt.experiments.report.page import check_report

        check_report(args.report)
    reading = Reading(parse_at(args.at) if args.at else None, args.last)
    runs = sorted(load_runs(select_runs(args.runs, args.out_dir)), key=lambda run: run["created_at"], reverse=True)
    comparison = compare(runs[:args.latest], args.sort)
    comparable = [run for run in comparison["runs"] if run["criterion"] == comparison["criterion"]]
    warnings = list(comparison["warnings"])
    judgement = None
    if args.baseline is None:
        study, baseline = arms_without_baseline(comparable, reading), None
        arms = arms_of(study, args.level)
        text = render_with_arms(comparison, arms, args.format)
    else:
        study, baseline = study_of_runs(comparable, args.baseline, reading)
        judgement = judge(study, baseline, args.margin, args.level, test=args.test)
        text = render_with_judgement(comparison, judgement, args.format)
        warnings += judgement.warnings
    if args.plot is not None:
        save_plot(args.plot, study, baseline)
    if args.report is not None:
        from blockgpt.experiments.report.page import save_report
        from blockgpt.experiments.report.results import report_of_comparison

        command = ["python", script_path("compare_architectures.py"), *(sys.argv[1:] if argv is None else argv)]
        save_report(args.report, report_of_comparison(comparison, study, judgement, command))
    print(text, flush=True)  # flushed here, so that a closed pipe is handled below
    if args.format in ("csv", "json"):  # stdout is read by a program, stderr by people
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    gc.disable()  # little is in cycles, and to look for them takes a tenth of the time
    with exit_on_user_error():
        main()
