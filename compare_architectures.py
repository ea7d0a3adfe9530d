"""Which architecture is better? Reads run logs (run.json, metrics.jsonl) and prints an ablation table.

    python compare_architectures.py                             every run in runs/
    python compare_architectures.py 'runs/llama-*' --latest 5   some of them
    python compare_architectures.py --format json               for other programs

A run is named by the architecture that was built, not by the keys that were set. Runs are ranked by their criterion,
the metric that run.json names (val_loss if it names none). Metrics come from metrics.jsonl; the results in run.json are
stale if a run was killed, so they are used only where metrics.jsonl has none. A broken or unfinished log is listed with
its reason and does not stop the comparison. To add a column: a line in `columns` and its value in `run_metrics`. This
program needs no torch.
"""

import collections
import csv
import glob
import io
import json
import math
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypedDict

from blockgpt.console import ArgumentParser, align_columns, check_ranges
from blockgpt.errors import UserError, did_you_mean, exit_on_user_error
from blockgpt.training.criterion import Criterion

SCHEMA_VERSION = 1  # of run.json; this program does not know what a newer one means
STATUSES = ("running", "finished", "interrupted", "failed")
QUIET_SECONDS = 15 * 60  # a run with status running that has written nothing for so long may have been killed
WIDTH = 120  # of the terminal table
HOW_TO_START = "train one: python train.py config/arch_llama.py config/size_demo.py"

REQUIRED_SECTIONS = {"schema_version": int, "status": str, "created_at": str, "arch_name": str, "parameters": dict,
                     "model": dict, "config": dict, "data": dict}
OPTIONAL_SECTIONS = {"status_reason": str, "results": dict, "hardware": dict, "criterion": dict}
TYPE_NAMES = {int: "a number", str: "text", dict: "an object"}
RECORD_FIELDS = {"step": ("tokens", "tokens_per_sec", "mfu", "step_time"), "eval": ("tokens", "val_loss", "val_bpb")}

# Reported where runs differ in them, in addition to every key of the model that was built.
TRAINING_KEYS = ("learning_rate", "max_iters", "batch_size", "gradient_accumulation_steps", "seed", "weight_decay",
                 "init_from")
# Runs whose configs differ only in these keys are repeats of one experiment: another seed, or stored, logged or
# parallelized differently. The former names of renamed keys are listed too, as old run.json files have them.
NOT_THE_EXPERIMENT = ("seed", "run_name", "out_dir", "resume", "resume_force", "data_dir", "checkpoint_interval",
                      "keep_last", "checkpoint_async", "log_interval", "gradient_log_interval", "wandb_log",
                      "wandb_project", "profile", "memory_snapshot", "rank_timeout", "save_timeout", "join_timeout",
                      "use_zero1",
                      "use_fsdp", "fsdp_reshard_after_forward", "fsdp_cpu_offload", "dp_replicate", "tensor_parallel",
                      "activation_checkpointing",
                      "keep_checkpoints", "peer_timeout", "fsdp_replicas")  # the former names
NO_INIT_FROM = (None, "scratch", "resume")  # values of init_from that name no other run, of earlier versions too

Run: TypeAlias = dict[str, Any]  # a value for each column, and more: see `load_run`

SAME_TOKENS: dict[str, Callable[[Run], Any]] = {  # runs that are equal in all of these saw the same tokens in one order
    "data fingerprint": lambda run: run["data"].get("fingerprint"),
    "seed": lambda run: run["config"].get("seed"),
    "tokens seen": lambda run: run["tokens"],
    "block_size": lambda run: run["model"].get("block_size"),
    "sequences per step": lambda run: run["data"].get("sequences_per_step"),
}


class Comparison(TypedDict):
    """What `compare` returns.

    Attributes:
        criterion: by which the runs are ranked.
        runs: in the order of the table, with rank and delta.
        differences: {key: {run name: value}} of the keys in which the runs differ.
        warnings, notes: one line each.
    """

    criterion: Criterion
    runs: list[Run]
    differences: dict[str, dict[str, Any]]
    warnings: list[str]
    notes: list[str]


def human_count(n: float) -> str:
    """124439808 → '124.4M'."""
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= 0.99995 * unit:  # 999,999 is 1M and not 1000k
            return f"{n / unit:.4g}{suffix}"
    return f"{n:.4g}"


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        key: in JSON, CSV and for --sort.
        header: in the tables; --sort accepts it too.
        format: value → text in the tables.
        more_is_better: whether --sort puts the largest value first.
    """

    key: str
    header: str
    format: Callable[[Any], str] = str
    more_is_better: bool = False


def columns(criterion: Criterion) -> tuple[Column, ...]:
    """The columns of a table of runs that are ranked by `criterion`."""
    metric, more_is_better = criterion
    return (
        Column("rank", "#"),
        Column("name", "run"),
        Column("architecture", "architecture"),
        Column("parameters", "params", human_count),
        Column("tokens", "tokens", human_count),
        Column(metric, metric.replace("_", " "), "{:.4f}".format, more_is_better),  # of the best evaluation
        Column("delta", "vs best", "{:+.4f}".format),
        Column(f"final_{metric}", "final", "{:.4f}".format, more_is_better),
        Column("val_bpb", "bpb", "{:.3f}".format),  # bits per byte, of the best evaluation too
        Column("tokens_per_sec", "tokens/s", human_count, more_is_better=True),
        Column("mfu", "MFU", "{:.1%}".format, more_is_better=True),
        Column("step_ms", "step ms", "{:.1f}".format),
        Column("peak_memory", "GiB", lambda n: f"{n / 2**30:.2f}"),
        Column("status", "status"),
    )


COLUMNS = columns(Criterion())


# ---- reading a run ----

class BrokenLogError(Exception):
    """A log, or a line of metrics.jsonl, cannot be used. Broken lines are only counted, so messages name run.json."""


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, with None for every number that is not finite (NaN, Infinity, 1e999)."""
    def finite_or_none(digits: str) -> float | None:
        return value if math.isfinite(value := float(digits)) else None

    try:
        value = json.loads(data, parse_float=finite_or_none, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:  # invalid UTF-8 is a ValueError too
        raise BrokenLogError(f"run.json is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BrokenLogError("run.json is not an object")
    return value


def numeric_value(section: dict[str, Any], key: str) -> Any:
    """section[key], or None if it is absent or null. Raises `BrokenLogError` if it is not a number."""
    value = section.get(key)
    # No logged number comes near this bound. Beyond it, arithmetic on a damaged log could overflow.
    if value is not None and (type(value) not in (int, float) or not -1e18 < value < 1e18):
        raise BrokenLogError(f"run.json: {key} is {printable(value)[:20]}, which is not a number or far out of range")
    return value


def printable(value: Any) -> str:
    """A value from a log as one printable line: logs may contain line feeds, terminal escapes and half characters."""
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def plain_values(section: dict[str, Any]) -> dict[str, Any]:
    """A section with every value that is not a number as text, so that values can be compared, hashed and printed."""
    plain = (bool, int, float, type(None))
    return {printable(key): value if type(value) in plain else printable(value) for key, value in section.items()}


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BrokenLogError(f"{path.name} is missing") from None
    except OSError as error:
        raise BrokenLogError(f"{path.name} cannot be read: {error.strerror}") from None


def modified_time(path: Path) -> float:
    """In seconds since 1970; 0 if the file does not exist."""
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def read_document(path: Path) -> dict[str, Any]:
    """run.json, with every section of the required type."""
    data = read_bytes(path)
    if not data.strip():
        raise BrokenLogError("run.json is empty")
    document = parse_object(data)
    version = numeric_value(document, "schema_version")
    if version is not None and version > SCHEMA_VERSION:
        raise BrokenLogError(f"schema_version {version} is newer than this program, which reads up to {SCHEMA_VERSION}")
    for key, required_type in (REQUIRED_SECTIONS | OPTIONAL_SECTIONS).items():
        is_absent = key in OPTIONAL_SECTIONS and document.get(key) is None
        if type(document.get(key)) is not required_type and not is_absent:
            problem = f"not {TYPE_NAMES[required_type]}" if key in document else "missing"
            raise BrokenLogError(f"run.json: {key} is {problem}")
    status = document["status"]
    if status not in STATUSES:
        raise BrokenLogError(f"run.json: status {status!r} is unknown{did_you_mean(status, STATUSES)}")
    return document


def read_criterion(document: dict[str, Any]) -> Criterion:
    """The criterion of a run; val_loss for a run.json that has none."""
    section = document.get("criterion") or Criterion()._asdict()
    metric, more_is_better = section.get("metric"), section.get("more_is_better")
    if type(metric) is not str or not metric.isprintable() or type(more_is_better) is not bool:
        raise BrokenLogError("run.json: criterion is not a metric and whether more of it is better")
    if metric in {column.key for column in COLUMNS} - {"val_loss", "val_bpb"}:
        raise BrokenLogError(f"run.json: criterion {metric} is the name of another column")
    return Criterion(metric, more_is_better)


def parse_record(line: bytes, metric: str) -> tuple[str, dict[str, Any]] | None:
    """(its record type, the values of a line of metrics.jsonl that are used); None for a type that is not used."""
    raw = parse_object(line)
    record_type = raw.get("kind")
    if record_type not in list(RECORD_FIELDS):  # a list, as the value may not be hashable
        return None
    names = {"step", *RECORD_FIELDS[record_type], *([metric] if record_type == "eval" else [])}
    record = {key: numeric_value(raw, key) for key in names}
    memory = raw.get("memory")
    record["peak_memory"] = numeric_value(memory, "peak") if isinstance(memory, dict) else None
    if record["step"] is None:
        raise BrokenLogError("metrics.jsonl: a record without a step")
    return record_type, record


def read_metrics(path: Path, metric: str) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """metrics.jsonl → ({record type: records by ascending step}, count of unreadable lines).

    Args:
        path: the file.
        metric: of the criterion, read from the evaluations too.
    """
    lines = list(filter(bytes.strip, read_bytes(path).split(b"\n")))
    records: dict[str, dict[float, dict[str, Any]]] = {record_type: {} for record_type in RECORD_FIELDS}
    skipped = 0
    for line in lines:
        try:
            parsed = parse_record(line, metric)
        except BrokenLogError:
            skipped += 1
            continue
        if parsed is not None:
            record_type, record = parsed
            records[record_type][record["step"]] = record  # a resumed run repeats steps: the last record counts
    if lines and skipped == len(lines):
        raise BrokenLogError(f"metrics.jsonl: not one of its {skipped} lines is readable")
    return {name: [by_step[step] for step in sorted(by_step)] for name, by_step in records.items()}, skipped


def run_metrics(evals: list[dict[str, Any]], steps: list[dict[str, Any]], results: dict[str, Any],
                criterion: Criterion) -> Run:
    """The columns about training: from the records, or from the results of run.json where there are none."""
    metric = criterion.metric
    best = min((e for e in evals if e[metric] is not None), key=lambda e: criterion.sort_key(e[metric]), default={})
    timed = steps[1:] if len(steps) > 2 else steps  # the first step includes compilation and warm-up

    def median(key: str) -> Any:
        values = [s[key] for s in timed if s[key] is not None]
        return statistics.median(values) if values else numeric_value(results, key)

    def maximum(records: list[dict[str, Any]], key: str) -> Any:
        values = [*(record[key] for record in records), numeric_value(results, key)]
        return max((value for value in values if value is not None), default=None)

    step_time = median("step_time")
    return {
        "tokens": maximum(evals + steps, "tokens"),  # if one of the two logs is longer, it is the right one
        metric: best.get(metric) if evals else numeric_value(results, f"best_{metric}"),
        f"final_{metric}": evals[-1][metric] if evals else numeric_value(results, metric),
        "val_bpb": best.get("val_bpb") if evals else numeric_value(results, "best_val_bpb"),
        "tokens_per_sec": median("tokens_per_sec"),
        "mfu": median("mfu"),
        "step_ms": None if step_time is None else 1000 * step_time,
        "peak_memory": maximum(steps, "peak_memory"),
    }


def load_run(directory: str | os.PathLike[str]) -> Run:
    """A run directory as a dict.

    Never raises for the contents of the directory. If they are unusable, status is 'broken: reason' and its criterion's
    value None.

    Returns:
        A value or None for each column but rank and delta, which depend on the other runs; path, created_at, warnings,
        criterion; and the sections model, config, data and hardware of run.json.
    """
    path = Path(directory)
    file, metrics = path / "run.json", path / "metrics.jsonl"
    run: Run = dict.fromkeys(column.key for column in COLUMNS)
    run |= {"name": printable(os.path.basename(os.path.realpath(path))), "path": str(path), "warnings": [], "model": {},
            "config": {}, "data": {}, "hardware": {}, "criterion": Criterion(),
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(modified_time(path)))}
    try:
        document = read_document(file)
        run["criterion"] = criterion = read_criterion(document)
        run |= {key: plain_values(document.get(key) or {}) for key in ("model", "config", "data", "hardware")}
        if run["config"].get("init_from") in NO_INIT_FROM:
            run["config"].pop("init_from", None)
        run |= {"architecture": printable(document["arch_name"]), "created_at": printable(document["created_at"]),
                "parameters": numeric_value(document["parameters"], "total")}
        status, reason = document["status"], document.get("status_reason")
        quiet_seconds = time.time() - max(modified_time(file), modified_time(metrics))
        if status == "running" and quiet_seconds > QUIET_SECONDS:
            status, reason = "running?", f"nothing written for {quiet_seconds / 3600:.1f} h, possibly killed"
        just_begun = status == "running" and not modified_time(metrics)
        metric = criterion.metric
        records, skipped = ({"eval": [], "step": []}, 0) if just_begun else read_metrics(metrics, metric)
        run |= run_metrics(records["eval"], records["step"], document.get("results") or {}, criterion)
    except (BrokenLogError, RecursionError) as error:  # a value that can be parsed may be nested too deeply to print
        return run | {"status": f"broken: {printable(str(error))}"}
    run["status"] = f"{status}: {printable(reason)}" if reason else status
    if skipped:
        run["warnings"].append(f"{skipped} unreadable line{'s' * (skipped > 1)} of metrics.jsonl skipped")
    if run[metric] is not None and not records["eval"]:
        run["warnings"].append(f"metrics.jsonl has no evaluation: {metric} is that of run.json")
    if run[metric] is not None and run[f"final_{metric}"] is None:
        run["warnings"].append(f"the last evaluation gave no finite {metric}")
    return run


# ---- comparing runs ----

def group_by(runs: Iterable[Run], key: Callable[[Run], Hashable]) -> list[list[Run]]:
    """The runs in groups of equal keys."""
    groups: dict[Hashable, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())


def compared_values(run: Run) -> dict[str, Any]:
    """{key: value} of what is reported if runs differ in it: the model as built, some training keys, the hardware."""
    config, hardware = run["config"], run["hardware"]
    return {**run["model"], **{key: config.get(key) for key in TRAINING_KEYS},
            "dtype": hardware.get("dtype", config.get("dtype")), "hardware": hardware.get("name"),
            "world_size": hardware.get("world_size")}


def experiment(run: Run) -> Hashable:
    """Equal for runs that are repeats of one experiment."""
    config = {key: value for key, value in run["config"].items() if key not in NOT_THE_EXPERIMENT}
    return frozenset(run["model"].items()), frozenset(config.items()), run["data"].get("fingerprint"), run["tokens"]


def common_criterion(runs: list[Run]) -> Criterion:
    """The criterion of most runs that are not broken, of equally many the first one's."""
    counts = collections.Counter(run["criterion"] for run in runs if not (run["status"] or "").startswith("broken"))
    return counts.most_common(1)[0][0] if counts else Criterion()


def comparability_warnings(ranked: list[Run], criterion: Criterion) -> tuple[list[str], list[str]]:
    """(warnings, notes) about how far the ranking can be trusted."""
    metric_text = criterion.metric.replace("_", " ")

    def run_names(runs: list[Run]) -> str:
        return ", ".join(run["name"] for run in runs[:4]) + (f" and {len(runs) - 4} more" if len(runs) > 4 else "")

    warnings, notes = [], []
    arms = group_by(ranked, experiment)
    seeds = [{SAME_TOKENS["seed"](run) for run in arm} for arm in arms]
    for name, value in SAME_TOKENS.items():
        if name == "seed" and all(arm_seeds == seeds[0] for arm_seeds in seeds):
            continue  # every arm has the same seeds, so the arms saw the same tokens
        if len(groups := group_by(ranked, value)) > 1:
            values = "; ".join(f"{shorten_middle(printable(value(group[0])), 16)} in {run_names(group)}"
                               for group in groups)
            warnings.append(f"these runs did not see the same tokens: {name} differs: {values}")
    for arm, arm_seeds in zip(arms, seeds, strict=True):
        if len(arm_seeds) > 1:
            values_of_arm = [run[criterion.metric] for run in arm]
            notes.append(f"{arm[0]['architecture']}: best {metric_text} {min(values_of_arm):.4f}.."
                         f"{max(values_of_arm):.4f} over "
                         f"{len(arm_seeds)} seeds (n={len(arm)}: {run_names(arm)})")
    if len(arms) > 1 and not warnings and len(seeds[0]) == 1:
        notes.append(f"one seed each: a small difference in {metric_text} may be noise (repeat with --seed=…)")
    return warnings, notes


def compare(runs: list[Run], sort: str | None = None) -> Comparison:
    """Rank runs and find their differences.

    Rank and delta always refer to the best value of the criterion that most runs have. In any order, runs without one
    come after the others, and broken ones last.

    Args:
        runs: from `load_run`.
        sort: the key or header of a column; None: the criterion. `UserError` if there is none.
    """
    criterion = common_criterion(runs)
    metric, table_columns = criterion.metric, columns(criterion)
    column = {name: c for c in table_columns for name in (c.header, c.key)}.get(sort or metric)
    if column is None:
        raise UserError(f"--sort: {sort!r} is unknown{did_you_mean(str(sort), [c.key for c in table_columns])}")
    runs = [run | {"name": printable(run["path"])} if len(group) > 1 else dict(run)
            for group in group_by(runs, lambda run: run["name"]) for run in group]
    others = [run for run in runs if run["criterion"] != criterion and not run["status"].startswith("broken")]
    for run in runs:
        run |= dict.fromkeys({c.key for c in table_columns} - run.keys())
    for run in others:
        run |= {metric: None, f"final_{metric}": None}
    ranked = sorted((run for run in runs if run[metric] is not None),
                    key=lambda run: (criterion.sort_key(run[metric]), run["name"]))
    for rank, run in enumerate(ranked, 1):
        run |= {"rank": rank, "delta": run[metric] - ranked[0][metric]}

    def order(run: Run) -> tuple[Any, ...]:
        value = run[column.key]
        return (run["status"].startswith("broken"), run[metric] is None, value is None,
                -value if column.more_is_better and value is not None else value, run["name"])

    runs.sort(key=order)
    values = {run["name"]: compared_values(run) for run in runs if not run["status"].startswith("broken")}
    keys = dict.fromkeys(key for row in values.values() for key in row)
    by_key = {key: {name: row.get(key) for name, row in values.items()} for key in keys}
    warnings, notes = comparability_warnings(ranked, criterion)
    warnings += [f"{run['name']}: not ranked, its criterion is {run['criterion'].metric} and not {metric} (compare "
                 "such runs apart)" for run in others]
    return {"criterion": criterion, "runs": runs,
            "differences": {key: row for key, row in by_key.items() if len(set(row.values())) > 1},
            "warnings": warnings + [f"{run['name']}: {warning}" for run in runs for warning in run["warnings"]],
            "notes": notes}


# ---- printing ----

def shorten_middle(text: str, width: int) -> str:
    """`text` in at most `width` characters: the ends of a name identify a run better than its middle."""
    return text if len(text) <= width else text[:(width - 1) // 2] + "…" + text[len(text) - width // 2:]


def column_cells(runs: list[Run], column: Column) -> list[str]:
    return [column.header, *("-" if run[column.key] is None else column.format(run[column.key]) for run in runs)]


def wrap_text(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)


def as_table(comparison: Comparison) -> str:
    """For the terminal: per run a line of numbers, and below it the architecture and the reason for its status."""
    brief = [run | {"status": run["status"].split(":")[0]} for run in comparison["runs"]]
    cells = [column_cells(brief, c) for c in columns(comparison["criterion"]) if c.key != "architecture"]
    used = sum(2 + max(map(len, column)) for column in cells if column[0] != "run")
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
        column = [shorten_middle(name, max(20, *map(len, values))), *values]
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


def as_json(comparison: Comparison) -> str:
    keys = [*(c.key for c in columns(comparison["criterion"])), "path", "created_at"]
    return json.dumps({**comparison, "criterion": comparison["criterion"]._asdict(),
                       "runs": [{key: run[key] for key in keys} for run in comparison["runs"]]}, indent=2)


FORMATS: dict[str, Callable[[Comparison], str]] = {"table": as_table, "md": as_markdown, "csv": as_csv, "json": as_json}


def render(comparison: Comparison, format: str = "table") -> str:
    """A comparison as text, in one of FORMATS. CSV leaves out the warnings and notes."""
    return FORMATS[format](comparison)


# ---- the command ----

def find_directories(pattern: str) -> list[str]:
    return sorted(filter(os.path.isdir, glob.glob(pattern)))


def run_directories(path: str) -> list[str]:
    """The run directory itself, or the run directories in a directory of runs."""
    if os.path.lexists(os.path.join(path, "run.json")):
        return [path]
    return sorted(map(os.path.dirname, glob.glob(os.path.join(glob.escape(path), "*", "run.json")))) or [path]


def select_runs(patterns: list[str], out_dir: str) -> list[str]:
    """The run directories that the patterns name, each once; without patterns all in `out_dir`."""
    found = [] if patterns else find_directories(os.path.join(glob.escape(out_dir), "*"))
    for pattern in patterns:
        matches = [pattern] if os.path.isdir(pattern) else find_directories(pattern)
        if not matches:
            raise UserError(f"no such run directory: {pattern}")
        found += [run for path in matches for run in run_directories(path)]
    if not found:
        problem = "no runs in" if os.path.isdir(out_dir) else "no such directory:"
        raise UserError(f"{problem} {out_dir} ({HOW_TO_START})")
    return list({os.path.realpath(path): path for path in found}.values())


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="compare_architectures.py", description="Compare training runs: an ablation table.")
    parser.add_argument("runs", nargs="*", help="run directories or globs (default: all in --out_dir)")
    parser.add_argument("--out_dir", default="runs", help="directory of the runs")
    parser.add_argument("--latest", type=int, metavar="N", help="only the newest N of them")
    parser.add_argument("--format", choices=FORMATS, default="table", help="output format")
    parser.add_argument("--sort", metavar="KEY", help="one of " + ", ".join(c.key for c in COLUMNS) + " (default: the "
                        "criterion of the runs, usually val_loss)")
    args = parser.parse_args(argv)
    check_ranges(args, {"latest": (args.latest is None or args.latest >= 1, "at least 1")})
    runs = sorted(map(load_run, select_runs(args.runs, args.out_dir)), key=lambda run: run["created_at"], reverse=True)
    comparison = compare(runs[:args.latest], args.sort)
    print(render(comparison, args.format), flush=True)  # flushed here, so that a closed pipe is handled below
    if args.format in ("csv", "json"):  # stdout is read by a program, stderr by people
        for warning in comparison["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may not have the characters of a run's name
    with exit_on_user_error():
        main()
