"""A run directory as a `Run`: run.json and metrics.jsonl, read without trust. No torch.

Metrics come from metrics.jsonl; the results in run.json are stale if a run was killed, so they are used only where
metrics.jsonl has none. To add a column: a line in `columns` and its value in `run_metrics`.
"""

import itertools
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from blockgpt.errors import did_you_mean
from blockgpt.experiments.log_values import (
    BrokenLogError,
    is_missing,
    modified_time,
    numeric_value,
    parse_lines,
    parse_object,
    plain_value,
    plain_values,
    printable,
    read_bytes,
    without_index,
)
from blockgpt.training.criterion import Criterion

SCHEMA_VERSION = 1  # of run.json; this program does not know what a newer one means
STATUSES = ("running", "finished", "interrupted", "failed")
QUIET_SECONDS = 15 * 60  # a run with status running that has written nothing for so long may have been killed

REQUIRED_SECTIONS = {"schema_version": int, "status": str, "created_at": str, "arch_name": str, "parameters": dict,
                     "model": dict, "config": dict, "data": dict}
OPTIONAL_SECTIONS = {"status_reason": str, "results": dict, "hardware": dict, "criterion": dict, "resumes": list,
                     "launches": list, "initial_weights": dict, "val_data": dict, "flops_per_token": dict}
TYPE_NAMES = {int: "a number", str: "text", dict: "an object", list: "a list"}
RECORD_FIELDS = {"step": ("tokens", "tokens_per_sec", "mfu", "step_time"), "eval": ("tokens", "val_loss", "val_bpb")}
DATA_KEYS = ("data", "dataset", "dataset_schedule", "eval_tokens", "block_size", "objective")  # decide the val data

Run: TypeAlias = dict[str, Any]  # a value for each column, and more: see `read_run`
# (config, model) of a run.json -> the same in the present names, with the default of every key that they lack.
Upgrade: TypeAlias = Callable[[dict[str, Any], dict[str, Any]], tuple[dict[str, Any], dict[str, Any]]]


class Change(NamedTuple):
    """A value that a run had up to a step, and another one from there on."""

    step: int
    key: str
    before: Any
    now: Any
    forced: bool  # whether resume_force was needed


class Point(NamedTuple):
    """One evaluation: what had been spent, and the value of the criterion.

    Attributes:
        tokens: trained on so far; None if it was not recorded.
        flops: of training so far; None if run.json has no FLOPs per token.
        time: seconds of training so far, without evaluations and checkpoints; None if steps were not timed.
        value: of the criterion; None if it was not finite.
        bpb: bits per byte; None if it was not evaluated.
    """

    step: float
    tokens: float | None
    flops: float | None
    time: float | None
    value: float | None
    bpb: float | None = None


class ValData(NamedTuple):
    """What the evaluations of a run were made on.

    tokens: None if it was not recorded, as in runs of earlier versions.
    digest: of the validation windows; None if it was not recorded.
    description: of what the windows depend on, as far as run.json has it: it stands in for a missing digest.
    """

    tokens: int | None
    digest: str | None
    description: str


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


# ---- run.json ----

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


def first_launch(document: dict[str, Any]) -> dict[str, Any]:
    """The launch of a run.json that has no `launches`, as versions before these recorded it: the newest one alone."""
    resumes = document.get("resumes") or []
    return {"step": resumes[-1]["step"] if resumes else 0, "started_at": document.get("created_at"),
            **{key: document.get(key) for key in ("command", "git_commit", "versions", "hardware")}}


def launch_command(launch: Any) -> tuple[str, ...]:
    """The words that start what a launch started, with the variable that results depend on; none if not recorded."""
    launch = launch if isinstance(launch, dict) else {}
    words, threads, hardware = (launch.get(key) for key in ("command", "omp_num_threads", "hardware"))
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        return ()
    processes = hardware.get("world_size") if isinstance(hardware, dict) else None
    start = ["torchrun", f"--nproc_per_node={processes}"] if type(processes) is int and processes > 1 else ["python"]
    variable = f"OMP_NUM_THREADS={threads}" if isinstance(threads, str) and re.fullmatch("[0-9,]+", threads) else ""
    return (*filter(None, [variable]), *start, *words)


def launch_environment(launch: dict[str, Any]) -> dict[str, Any]:
    """{what: value} of a launch: what a process computes with, but not where (the index of a GPU, the computer)."""
    versions, hardware = (section if isinstance(section := launch.get(key), dict) else {}
                          for key in ("versions", "hardware"))
    name, threads = hardware.get("name"), hardware.get("threads")
    if with_threads := re.fullmatch(r"(.*), ([0-9]{1,6}) threads", str(name)):  # of earlier versions
        name, threads = with_threads[1], int(with_threads[2])
    if without_index(hardware.get("device")) != "cpu":
        threads = None  # a GPU sums in its own order
    values = {"git_commit": launch.get("git_commit"),
              **{name: version for name, version in versions.items() if name != "platform"},
              "device": without_index(hardware.get("device")),
              "hardware": name, "threads": threads, "world_size": hardware.get("world_size"),
              "dtype": hardware.get("dtype"), "tf32": hardware.get("tf32"), "compile": hardware.get("compile")}
    return plain_values({name: value for name, value in values.items() if value is not None})


def read_changes(document: dict[str, Any], renamed: dict[str, str]) -> list[Change]:
    """What changed at the resumes of a run, oldest first.

    A resume that goes back takes earlier changes with it: what was trained since then is abandoned, and the new values
    hold from the step that it goes back to. What changed before the first step is not a change.

    Args:
        document: run.json.
        renamed: {key of an earlier version: its new name}.
    """
    launches, resumes = document.get("launches") or [], document.get("resumes") or []
    pairs = list(itertools.pairwise(launches))
    pairs = [({}, {})] * (len(resumes) - len(pairs)) + pairs  # versions before `launches` recorded the resumes alone
    changes: dict[tuple[int, str], Change] = {}
    for resume, (earlier, later) in zip(resumes, pairs, strict=False):
        try:
            step, forced = int(resume["step"]), resume["forced"]
            changed = {renamed.get(key, key): values for key, values in resume["changed"].items()}
            if "device" in changed:
                changed["device"] = list(map(without_index, changed["device"]))
            before, now = launch_environment(earlier), launch_environment(later)
            if now:  # what was in force, in place of what was asked for, such as dtype=auto
                changed = {key: values for key, values in changed.items() if key not in now}
            changed |= {key: [before[key], now[key]] for key in now if key in before and before[key] != now[key]}
            # A later change at the same step replaces the earlier one.
            new = [Change(step, printable(key), plain_value(old), plain_value(value), key in forced)
                   for key, (old, value) in changed.items()]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise BrokenLogError("run.json: resumes or launches are not what train.py writes") from None
        earlier_changes, changes = list(changes.values()), {}
        for change in [*(c._replace(step=min(c.step, step)) for c in earlier_changes), *new]:
            at = (change.step, change.key)
            first = changes.pop(at, change)
            changes[at] = change._replace(before=first.before, forced=first.forced or change.forced)
    return [change for change in changes.values() if change.step > 0 and change.before != change.now]


def describe_val_data(document: dict[str, Any], config: dict[str, Any], model: dict[str, Any]) -> str:
    """What the validation windows of a run depend on, as far as its run.json has it."""
    data, sources = document["data"], document["data"].get("sources")
    content: Any = data.get("fingerprint")
    if isinstance(sources, dict) and all(isinstance(source, dict) for source in sources.values()):
        content = sorted(json.dumps([source.get("fingerprint"), source.get("share")]) for source in sources.values()
                         if source.get("share"))
    return printable([config.get("eval_tokens"), model.get("block_size"), content])


# ---- metrics.jsonl ----

def read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """metrics.jsonl → (its records, count of lines that are no object).

    A resume continues at its step. Records from before it that lie beyond that step are of training that was abandoned,
    and are left out.
    """
    records: list[dict[str, Any]] = []
    lines = list(filter(bytes.strip, read_bytes(path).split(b"\n")))
    broken = 0
    for record in parse_lines(lines):
        if record is not None and record.get("kind") == "resume":
            try:
                step = numeric_value(record, "step")
                records = [r for r in records if step is None or not is_beyond(r, step)]
            except BrokenLogError:
                record = None
        if record is None:
            broken += 1
        else:
            records.append(record)
    if lines and broken == len(lines):
        raise BrokenLogError(f"metrics.jsonl: not one of its {broken} lines is readable")
    return records, broken


def is_beyond(record: dict[str, Any], step: float) -> bool:
    """Whether a record is of a later step."""
    return type(record.get("step")) in (int, float) and record["step"] > step


def read_val_data(section: dict[str, Any]) -> tuple[Any, str | None]:
    """(tokens, digest) of what evaluations were made on, None where it was not recorded."""
    return numeric_value(section, "tokens"), printable(section["digest"]) if section.get("digest") else None


def parse_record(raw: dict[str, Any], metric: str) -> tuple[str, dict[str, Any]] | None:
    """(its record type, the values of a record of metrics.jsonl that are used); None for a type that is not used."""
    record_type = raw.get("kind")
    if not isinstance(record_type, str) or record_type not in RECORD_FIELDS:
        return None
    names = RECORD_FIELDS[record_type] if record_type == "step" else (*RECORD_FIELDS[record_type], metric)
    record = {key: numeric_value(raw, key) for key in ("step", *names)}
    memory, val_data = raw.get("memory"), raw.get("val_data")
    record["peak_memory"] = numeric_value(memory, "peak") if isinstance(memory, dict) else None
    if isinstance(val_data, dict):
        record["val_data"] = read_val_data(val_data)
    if record["step"] is None:
        raise BrokenLogError("metrics.jsonl: a record without a step")
    return record_type, record


def read_metrics(path: Path, metric: str) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """metrics.jsonl → ({record type: records by ascending step}, count of unreadable lines).

    Args:
        path: the file.
        metric: of the criterion, read from the evaluations too.
    """
    log, skipped = read_log(path)
    n_lines = len(log) + skipped
    records: dict[str, dict[float, dict[str, Any]]] = {record_type: {} for record_type in RECORD_FIELDS}
    for raw in log:
        try:
            parsed = parse_record(raw, metric)
        except BrokenLogError:
            skipped += 1
            continue
        if parsed is not None:
            record_type, record = parsed
            records[record_type][record["step"]] = record  # a resumed run may repeat steps: the last record counts
    if skipped and skipped == n_lines:
        raise BrokenLogError(f"metrics.jsonl: not one of its {skipped} lines is readable")
    return {name: [by_step[step] for step in sorted(by_step)] for name, by_step in records.items()}, skipped


def on_final_val_data(evals: list[dict[str, Any]], changes: list[Change]) -> list[dict[str, Any]]:
    """The evaluations that were made on the same validation data as the last one."""
    def phase(record: dict[str, Any]) -> int:
        """How often the validation data had changed, for records that do not say on what they were made."""
        return sum(change.step < record["step"] for change in changes if change.key in DATA_KEYS)

    def is_same(record: dict[str, Any], last: dict[str, Any]) -> bool:
        if "val_data" in record and "val_data" in last:
            return bool(record["val_data"] == last["val_data"])
        return phase(record) == phase(last)

    return [record for record in evals if is_same(record, evals[-1])]


def run_metrics(evals: list[dict[str, Any]], steps: list[dict[str, Any]], results: dict[str, Any],
                criterion: Criterion) -> Run:
    """The columns about training: from the records, or from the results of run.json where there are none."""
    metric = criterion.metric
    best = min((e for e in evals if e[metric] is not None), key=lambda e: criterion.sort_key(e[metric]), default={})
    timed = steps[1:] if len(steps) > 2 else steps  # the first step includes compilation and warm-up

    def median(key: str) -> Any:
        values = [s[key] for s in timed if s[key] is not None]
        return statistics.median(values) if values else numeric_value(results, key)

    def maximum(values: Iterable[Any]) -> Any:
        return max((value for value in values if value is not None), default=None)

    step_time = median("step_time")
    recorded = numeric_value(results, "tokens")
    logged = maximum(record["tokens"] for record in evals + steps)
    return {
        "tokens": recorded if logged is None else logged,
        metric: best.get(metric) if evals else numeric_value(results, f"best_{metric}"),
        f"final_{metric}": evals[-1][metric] if evals else numeric_value(results, metric),
        "val_bpb": best.get("val_bpb") if evals else numeric_value(results, "best_val_bpb"),
        "tokens_per_sec": median("tokens_per_sec"),
        "mfu": median("mfu"),
        "step_ms": None if step_time is None else 1000 * step_time,
        "peak_memory": maximum([*(step["peak_memory"] for step in steps), numeric_value(results, "peak_memory")]),
    }


def training_times(steps: list[dict[str, Any]], at: Iterable[float]) -> list[float | None]:
    """Seconds of training up to each of the steps `at` (ascending), from the logged step times.

    A record's step_time is the mean since the record before it. A step before the first record or after the last has
    the time of the nearest.
    """
    if not steps or any(record["step_time"] is None for record in steps):
        return [None for _ in at]
    times: list[float | None] = []
    total, previous, index = 0.0, 0.0, 0
    for step in at:
        while index < len(steps) and steps[index]["step"] <= step:
            total += steps[index]["step_time"] * (steps[index]["step"] - previous)
            previous, index = steps[index]["step"], index + 1
        times.append(total + steps[min(index, len(steps) - 1)]["step_time"] * (step - previous))
    return times


def learning_curve(evals: list[dict[str, Any]], steps: list[dict[str, Any]], metric: str, flops_per_token: float | None
                   ) -> list[Point]:
    """The evaluations of a run with what had been spent."""
    times = training_times(steps, [record["step"] for record in evals])
    return [Point(record["step"], record["tokens"], record["tokens"] * flops_per_token
                  if flops_per_token is not None and record["tokens"] is not None else None, seconds, record[metric],
                  record.get("val_bpb")) for record, seconds in zip(evals, times, strict=True)]


# ---- a run ----

def read_run(directory: str | os.PathLike[str], upgrade: Upgrade, renamed: dict[str, str]) -> Run:
    """A run directory as a dict.

    Never raises for the contents of the directory. If they are unusable, status is 'broken: reason' and its criterion's
    value None.

    Args:
        directory: of the run.
        upgrade: see `Upgrade`.
        renamed: {key of an earlier version: its new name}.

    Returns:
        A value or None for each column but rank and delta, which depend on the other runs; path, created_at, warnings,
        criterion; the sections model, config, data and hardware of run.json; environment (see `launch_environment`) of
        the newest launch; command (see `launch_command`) of the first; initial_weights (text or None); changes
        ([`Change`]), val_data (`ValData`) and curve ([`Point`]); flops_per_token (of training) and unique_tokens (of
        the training data), None if not recorded.
    """
    path = Path(directory)
    file, metrics = path / "run.json", path / "metrics.jsonl"
    run: Run = dict.fromkeys(column.key for column in COLUMNS)
    run |= {"name": printable(os.path.basename(os.path.realpath(path))), "path": str(path), "warnings": [], "model": {},
            "config": {}, "data": {}, "hardware": {}, "environment": {}, "initial_weights": None, "changes": [],
            "val_data": ValData(None, None, ""), "criterion": Criterion(), "curve": [], "flops_per_token": None,
            "unique_tokens": None, "command": (),
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(modified_time(path)))}
    try:
        document = read_document(file)
        run["criterion"] = criterion = read_criterion(document)
        run |= describe_run(document, upgrade, renamed)
        status, reason = document["status"], document.get("status_reason")
        quiet_seconds = time.time() - max(modified_time(file), modified_time(metrics))
        if status == "running" and quiet_seconds > QUIET_SECONDS:
            status, reason = "running?", f"nothing written for {quiet_seconds / 3600:.1f} h, possibly killed"
        just_begun = status == "running" and is_missing(metrics)
        metric = criterion.metric
        records, skipped = ({"eval": [], "step": []}, 0) if just_begun else read_metrics(metrics, metric)
        evals = on_final_val_data(records["eval"], run["changes"])
        run |= run_metrics(evals, records["step"], document.get("results") or {}, criterion)
        run["curve"] = learning_curve(evals, records["step"], metric, run["flops_per_token"])
    except (BrokenLogError, RecursionError) as error:  # a value that can be parsed may be nested too deeply to print
        return run | {"status": f"broken: {printable(str(error))}"}
    run["status"] = f"{status}: {printable(reason)}" if reason else status
    if evals:
        tokens, digest = evals[-1].get("val_data", (None, None))
        run["val_data"] = run["val_data"]._replace(tokens=tokens, digest=digest)
    if left_out := len(records["eval"]) - len(evals):
        run["warnings"].append(f"its first {left_out} evaluations were made on other validation data and do not count")
    if skipped:
        run["warnings"].append(f"{skipped} unreadable line{'s' * (skipped > 1)} of metrics.jsonl skipped")
    if run[metric] is not None and not evals:
        run["warnings"].append(f"metrics.jsonl has no evaluation: {metric} is that of run.json")
    if run[metric] is not None and run[f"final_{metric}"] is None:
        run["warnings"].append(f"the last evaluation gave no finite {metric}")
    return run


def describe_run(document: dict[str, Any], upgrade: Upgrade, renamed: dict[str, str]) -> Run:
    """What run.json says of a run, apart from its status and results."""
    config, model = upgrade(document["config"], document["model"])
    changes = read_changes(document, renamed)  # which checks the resumes and launches
    launches, weights = document.get("launches") or [first_launch(document)], document.get("initial_weights") or {}
    # The hardware of the newest launch is a section of its own, also in run.json files without launches.
    newest = {**(launches[-1] if isinstance(launches[-1], dict) else {}), "hardware": document.get("hardware")}
    digest = weights.get("sha256")
    step = "" if weights.get("step") is None else f"@{printable(weights['step'])}"  # of a checkpoint of transformers
    tokens, val_digest = read_val_data(document.get("val_data") or {})
    return {"architecture": printable(document["arch_name"]), "created_at": printable(document["created_at"]),
            "command": launch_command(launches[0]),
            "parameters": numeric_value(document["parameters"], "total"),
            "config": plain_values(config), "model": plain_values(model),
            "data": plain_values(document["data"]), "hardware": plain_values(document.get("hardware") or {}),
            "environment": launch_environment(newest),
            "initial_weights": f"{printable(digest)[:12]}{step}" if digest else None,
            "changes": changes,
            "flops_per_token": numeric_value(document.get("flops_per_token") or {}, "train"),
            "unique_tokens": numeric_value(document["data"], "train_tokens"),
            "val_data": ValData(tokens, val_digest, describe_val_data(document, config, model))}
