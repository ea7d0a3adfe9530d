"""Which architecture is better? Reads run logs (run.json, metrics.jsonl) and prints an ablation table.

    python compare_architectures.py                             every run in runs/
    python compare_architectures.py 'runs/llama-*' --latest 5   some of them
    python compare_architectures.py --format json               for other programs

A run is called by what was built, never by what was asked for. Losses come from metrics.jsonl, which is
what happened; run.json's results, stale where a run was killed, only fill in. A broken or unfinished log
is listed as such and stops nothing. A new column is a line in COLUMNS and its value in `measured`.
"""

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
from pathlib import Path
from typing import Any, NamedTuple

from blockgpt.console import ArgumentParser
from blockgpt.errors import UserError, did_you_mean, exit_on_user_error

SCHEMA_VERSION = 1  # of run.json; what a newer one means, this program cannot know
STATES = ("running", "finished", "interrupted", "failed")
QUIET_SECONDS = 15 * 60  # a run that calls itself running and has written nothing for so long may be dead
WIDTH = 120  # of the terminal table
HOW_TO_START = "train one: python train.py config/arch_llama.py config/size_demo.py"

SECTIONS = {"schema_version": int, "status": str, "created_at": str, "arch_name": str, "parameters": dict,
            "model": dict, "config": dict, "data": dict}  # what a comparison cannot do without
OPTIONAL = {"status_reason": str, "results": dict, "hardware": dict}
TYPES = {int: "a number", str: "text", dict: "an object"}
FIELDS = {"step": ("tokens", "tokens_per_sec", "mfu", "step_time"), "eval": ("tokens", "val_loss", "val_bpb")}

# Called out where runs differ in them, beside every key of the model that was built.
TRAINING_KEYS = ("learning_rate", "max_iters", "batch_size", "gradient_accumulation_steps", "seed", "weight_decay")
# Runs whose config differs only here are repeats of one another: another seed, or kept and watched otherwise.
NOT_THE_EXPERIMENT = ("seed", "run_name", "out_dir", "init_from", "resume", "resume_force", "data_dir",
                      "checkpoint_interval", "keep_last", "checkpoint_async", "log_interval",
                      "gradient_log_interval", "wandb_log", "wandb_project", "profile", "memory_snapshot",
                      "rank_timeout", "save_timeout", "use_zero1", "use_fsdp", "fsdp_reshard_after_forward",
                      "fsdp_cpu_offload", "dp_replicate", "tensor_parallel", "activation_checkpointing")
SEEN = {  # runs that agree in all of these saw the same tokens in the same order
    "data fingerprint": lambda run: run["data"].get("fingerprint"),
    "seed": lambda run: run["config"].get("seed"),
    "tokens seen": lambda run: run["tokens"],
    "block_size": lambda run: run["model"].get("block_size"),
    "sequences per step": lambda run: run["data"].get("sequences_per_step"),
}


def human(n):
    """124439808 → '124.4M'."""
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= 0.99995 * unit:  # what would round to 1000k is 1M
            return f"{n / unit:.4g}{suffix}"
    return f"{n:.4g}"


class Column(NamedTuple):
    key: str  # in JSON, CSV and for --sort
    header: str  # in the tables; --sort takes it too
    show: Any = str  # value → what the tables print
    more_is_better: bool = False


COLUMNS = (
    Column("rank", "#"),
    Column("name", "run"),
    Column("architecture", "architecture"),
    Column("parameters", "params", human),
    Column("tokens", "tokens", human),
    Column("val_loss", "val loss", "{:.4f}".format),  # the best evaluation's: what runs are ranked by
    Column("delta", "vs best", "{:+.4f}".format),
    Column("final_val_loss", "final", "{:.4f}".format),
    Column("val_bpb", "bpb", "{:.3f}".format),  # bits per byte, of the best evaluation too
    Column("tokens_per_sec", "tokens/s", human, more_is_better=True),
    Column("mfu", "MFU", "{:.1%}".format, more_is_better=True),
    Column("step_ms", "step ms", "{:.1f}".format),
    Column("peak_memory", "GiB", lambda n: f"{n / 2**30:.2f}"),
    Column("status", "status"),
)


# ---- reading ----

class Broken(Exception):
    """A log, or a line of metrics.jsonl, cannot be used. Lines are only counted: messages speak of run.json."""


def parse(data):
    """JSON object → dict, with None for every spelling of a number that is not finite (NaN, Infinity, 1e999)."""
    def finite(digits):
        return value if math.isfinite(value := float(digits)) else None

    try:
        value = json.loads(data, parse_float=finite, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        raise Broken(f"run.json is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Broken("run.json is not an object")
    return value


def number(section, key):
    """section[key], or None if it is absent or null; `Broken` if it is no number."""
    value = section.get(key)
    # Nothing that is logged comes near the bound; beyond it, arithmetic on a damaged log could overflow.
    if value is not None and (type(value) not in (int, float) or not -1e18 < value < 1e18):
        raise Broken(f"run.json: {key} is {shown(value)[:20]}, which is no number or a senseless one")
    return value


def shown(value):
    """A value from a log as one printable line: logs may hold line feeds, terminal escapes, half characters."""
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def flat(section):
    """A section with numbers as they are and all else as text, so that values can be compared, hashed and printed."""
    plain = (bool, int, float, type(None))
    return {shown(key): value if type(value) in plain else shown(value) for key, value in section.items()}


def read(path):
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Broken(f"{path.name} is missing") from None
    except OSError as error:
        raise Broken(f"{path.name} cannot be read: {error.strerror}") from None


def touched(path):
    """When it was last written, in seconds since 1970; 0 if it is not there."""
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def read_document(path):
    """run.json, whose sections are then all of the type that they should be."""
    data = read(path)
    if not data.strip():
        raise Broken("run.json is empty")
    document = parse(data)
    version = number(document, "schema_version")
    if version is not None and version > SCHEMA_VERSION:
        raise Broken(f"schema_version {version} is newer than this program, which reads up to {SCHEMA_VERSION}")
    for key, kind in (SECTIONS | OPTIONAL).items():
        if type(document.get(key)) is not kind and not (key in OPTIONAL and document.get(key) is None):
            raise Broken(f"run.json: {key} is {'not ' + TYPES[kind] if key in document else 'missing'}")
    if document["status"] not in STATES:
        raise Broken(f"run.json: status {document['status']!r} is unknown{did_you_mean(document['status'], STATES)}")
    return document


def read_metrics(path):
    """metrics.jsonl → ({kind: its records, by ascending step}, number of unreadable lines)."""
    lines, records, skipped = list(filter(bytes.strip, read(path).split(b"\n"))), {kind: {} for kind in FIELDS}, 0
    for line in lines:
        try:
            raw = parse(line)
            kind = raw.get("kind")
            if kind not in list(FIELDS):  # a kind that means nothing here is no damage
                continue
            record = {key: number(raw, key) for key in ("step", *FIELDS[kind])}
            memory = raw.get("memory")
            record["peak_memory"] = number(memory, "peak") if isinstance(memory, dict) else None
        except Broken:
            record = {"step": None}
        if record["step"] is None:
            skipped += 1
        else:
            records[kind][record["step"]] = record  # a resumed run repeats steps: the last one counts
    if lines and skipped == len(lines):
        raise Broken(f"metrics.jsonl: not one of its {skipped} lines is readable")
    return {kind: [by_step[step] for step in sorted(by_step)] for kind, by_step in records.items()}, skipped


def measured(evals, steps, results):
    """The columns that say how the run went: from its records; from run.json's results where it has none."""
    best = min((e for e in evals if e["val_loss"] is not None), key=lambda e: e["val_loss"], default={})
    timed = steps[1:] if len(steps) > 2 else steps  # the first pays for compilation and warm-up

    def median(key):
        values = [s[key] for s in timed if s[key] is not None]
        return statistics.median(values) if values else number(results, key)

    step_time = median("step_time")
    return {
        "tokens": largest(evals + steps, "tokens", number(results, "tokens")),  # of two logs, the longer one is right
        "val_loss": best.get("val_loss") if evals else number(results, "best_val_loss"),
        "final_val_loss": evals[-1]["val_loss"] if evals else number(results, "val_loss"),
        "val_bpb": best.get("val_bpb") if evals else number(results, "best_val_bpb"),
        "tokens_per_sec": median("tokens_per_sec"),
        "mfu": median("mfu"),
        "step_ms": None if step_time is None else 1000 * step_time,
        "peak_memory": largest(steps, "peak_memory", number(results, "peak_memory")),
    }


def largest(records, key, other):
    return max((n for n in [*(r[key] for r in records), other] if n is not None), default=None)


def load_run(path):
    """A run directory as a dict: a value (or None) for each column but rank and delta, which are relative; path,
    created_at, warnings, and run.json's sections model, config, data and hardware.

    Never raises for what the directory holds or lacks: then status is 'broken: why', and val_loss is None.
    """
    path = Path(path)
    file, metrics = path / "run.json", path / "metrics.jsonl"
    run = dict.fromkeys(column.key for column in COLUMNS)
    run |= {"name": shown(os.path.basename(os.path.realpath(path))), "path": str(path), "warnings": [], "model": {},
            "config": {}, "data": {}, "hardware": {},
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(touched(path)))}
    try:
        document = read_document(file)
        run |= {key: flat(document.get(key) or {}) for key in ("model", "config", "data", "hardware")}
        run |= {"architecture": shown(document["arch_name"]), "created_at": shown(document["created_at"]),
                "parameters": number(document["parameters"], "total")}
        status, reason = document["status"], document.get("status_reason")
        hours = (time.time() - max(touched(file), touched(metrics))) / 3600
        if status == "running" and hours * 3600 > QUIET_SECONDS:
            status, reason = "running?", f"nothing written for {hours:.1f} h, possibly killed"
        just_begun = status == "running" and not touched(metrics)
        records, skipped = ({"eval": [], "step": []}, 0) if just_begun else read_metrics(metrics)
        run |= measured(records["eval"], records["step"], document.get("results") or {})
    except (Broken, RecursionError) as why:  # what Python can just parse may nest too deep to print
        return run | {"status": f"broken: {shown(str(why))}"}
    run["status"] = f"{status}: {shown(reason)}" if reason else status
    if skipped:
        run["warnings"].append(f"{skipped} unreadable line{'s' * (skipped > 1)} of metrics.jsonl skipped")
    if run["val_loss"] is not None and not records["eval"]:
        run["warnings"].append("metrics.jsonl holds no evaluation: the losses are those of run.json")
    if run["val_loss"] is not None and run["final_val_loss"] is None:
        run["warnings"].append("the last evaluation gave no finite loss")
    return run


# ---- comparing ----

def gathered(runs, key):
    """The runs in groups of equal keys."""
    groups = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())


def facts(run):
    """Everything in which runs may differ, by key: the model as built, a few training keys, the machine."""
    config, hardware = run["config"], run["hardware"]
    return {**run["model"], **{key: config.get(key) for key in TRAINING_KEYS},
            "dtype": hardware.get("dtype", config.get("dtype")), "hardware": hardware.get("name"),
            "world_size": hardware.get("world_size")}


def experiment(run):
    """What must be equal in two runs for one to be a repeat of the other."""
    asked = {key: value for key, value in run["config"].items() if key not in NOT_THE_EXPERIMENT}
    return frozenset(run["model"].items()), frozenset(asked.items()), run["data"].get("fingerprint"), run["tokens"]


def trust(ranked):
    """(warnings, notes) on how far the ranking goes."""
    def some(runs):
        return ", ".join(run["name"] for run in runs[:4]) + (f" and {len(runs) - 4} more" if len(runs) > 4 else "")

    arms, warnings, notes = gathered(ranked, experiment), [], []
    seeds = [{SEEN["seed"](run) for run in arm} for arm in arms]
    for what, value in SEEN.items():
        if what == "seed" and all(its_seeds == seeds[0] for its_seeds in seeds):
            continue  # every arm ran with the same seeds: arm against arm, the tokens are the same
        if len(groups := gathered(ranked, value)) > 1:
            who = "; ".join(f"{middle(shown(value(group[0])), 16)} in {some(group)}" for group in groups)
            warnings.append(f"these runs did not see the same tokens: {what} differs: {who}")
    for arm, its_seeds in zip(arms, seeds, strict=True):
        if len(its_seeds) > 1:
            losses = [run["val_loss"] for run in arm]
            notes.append(f"{arm[0]['architecture']}: best val loss {min(losses):.4f}..{max(losses):.4f} over "
                         f"{len(its_seeds)} seeds (n={len(arm)}: {some(arm)})")
    if len(arms) > 1 and not warnings and len(seeds[0]) == 1:
        notes.append("one seed each: a small difference in val loss cannot be told from noise (repeat with --seed=…)")
    return warnings, notes


def compare(runs, sort="val_loss"):
    """Runs from `load_run` → {"runs": in order, with rank and delta, "differences": {key: {run name: value}} of the
    keys in which they differ, "warnings": [str], "notes": [str]}.

    Rank and delta always go by the best val loss. In any order, runs without one come after, broken ones last.
    """
    column = {name: c for c in COLUMNS for name in (c.header, c.key)}.get(sort)
    if column is None:
        raise UserError(f"--sort: {sort!r} is unknown{did_you_mean(sort, [c.key for c in COLUMNS])}")
    same_name = gathered(runs, lambda run: run["name"])
    runs = [run | {"name": shown(run["path"])} if len(group) > 1 else dict(run) for group in same_name for run in group]
    ranked = sorted((run for run in runs if run["val_loss"] is not None), key=lambda r: (r["val_loss"], r["name"]))
    for rank, run in enumerate(ranked, 1):
        run |= {"rank": rank, "delta": run["val_loss"] - ranked[0]["val_loss"]}

    def order(run):
        value = run[column.key]
        return (run["status"].startswith("broken"), run["val_loss"] is None, value is None,
                -value if column.more_is_better and value is not None else value, run["name"])

    runs.sort(key=order)
    described = {run["name"]: facts(run) for run in runs if not run["status"].startswith("broken")}
    keys = dict.fromkeys(key for values in described.values() for key in values)
    by_key = {key: {name: values.get(key) for name, values in described.items()} for key in keys}
    warnings, notes = trust(ranked)
    return {"runs": runs,
            "differences": {key: row for key, row in by_key.items() if len(set(row.values())) > 1},
            "warnings": warnings + [f"{run['name']}: {warning}" for run in runs for warning in run["warnings"]],
            "notes": notes}


# ---- showing ----

def middle(text, width):
    """`text` in at most `width` characters: the ends of a name tell more than its middle."""
    return text if len(text) <= width else text[:(width - 1) // 2] + "…" + text[len(text) - width // 2:]


def cells(runs, column):
    return [column.header, *("-" if run[column.key] is None else column.show(run[column.key]) for run in runs)]


def aligned(columns, left):
    """Columns of text, header first → lines; the columns whose header is in `left` keep left, the others right."""
    padded = []
    for column in columns:
        width = max(map(len, column))
        padded.append([text.ljust(width) if column[0] in left else text.rjust(width) for text in column])
    return ["  ".join(row).rstrip() for row in zip(*padded, strict=True)]


def folded(text, indent=""):
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)


def as_table(comparison):
    """The terminal's: a line of numbers per run, and under it what was built and what went wrong."""
    brief = [run | {"status": run["status"].split(":")[0]} for run in comparison["runs"]]
    columns = [cells(brief, c) for c in COLUMNS if c.key != "architecture"]
    taken = sum(2 + max(map(len, column)) for column in columns if column[0] != "run")
    columns[1] = [middle(name, max(12, WIDTH - taken)) for name in columns[1]]  # where room is short, names give way
    header, *rows = aligned(columns, left=("run", "status"))
    lines, indent = [header, "-" * max(map(len, (header, *rows)))], " " * (4 + max(map(len, columns[0])))
    for run, short, row in zip(comparison["runs"], brief, rows, strict=True):
        lines += [row, *folded(run["architecture"] or "", indent)]
        lines += folded(run["status"], indent) if run["status"] != short["status"] else []

    blocks, differences = [], comparison["differences"]
    for name in next(iter(differences.values()), ()):  # as many runs beside each other as fit, then the next ones below
        values = [middle(shown(row[name]), 24) for row in differences.values()]
        column = [middle(name, max(20, *map(len, values))), *values]
        if not blocks or sum(2 + max(map(len, c)) for c in [*blocks[-1], column]) > WIDTH + 2:
            blocks.append([["differs in", *differences]])
        blocks[-1].append(column)
    for block in blocks:
        lines += ["", *aligned(block, left=[column[0] for column in block])]
    for label in ("notes", "warnings"):
        lines += [""] * bool(comparison[label])
        lines += [line for text in comparison[label] for line in folded(f"{label[:-1]}: {text}")]
    return "\n".join(lines)


def as_markdown(comparison):
    """A table to paste, its caveats under it."""
    header, *rows = zip(*(cells(comparison["runs"], c) for c in COLUMNS), strict=True)
    table = [header, ["---"] * len(header), *([text.replace("|", "\\|") for text in row] for row in rows)]
    caveats = [f"- {label[:-1]}: {text}" for label in ("notes", "warnings") for text in comparison[label]]
    return "\n".join(["| " + " | ".join(row) + " |" for row in table] + [""] * bool(caveats) + caveats)


def as_csv(comparison):
    out = io.StringIO()
    writer = csv.DictWriter(out, [c.key for c in COLUMNS], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(comparison["runs"])
    return out.getvalue().rstrip("\n")


def as_json(comparison):
    keys = [*(c.key for c in COLUMNS), "path", "created_at"]
    return json.dumps(comparison | {"runs": [{key: run[key] for key in keys} for run in comparison["runs"]]}, indent=2)


FORMATS = {"table": as_table, "md": as_markdown, "csv": as_csv, "json": as_json}


def render(comparison, format="table"):
    """What `compare` returned as text, in one of FORMATS; CSV alone has no room for the warnings."""
    return FORMATS[format](comparison)


# ---- the command ----

def directories(pattern):
    return sorted(filter(os.path.isdir, glob.glob(pattern)))


def runs_in(path):
    """A run's directory as it is; a directory of runs stands for them."""
    if os.path.lexists(os.path.join(path, "run.json")):
        return [path]
    return sorted(map(os.path.dirname, glob.glob(os.path.join(glob.escape(path), "*", "run.json")))) or [path]


def select(patterns, out_dir):
    """The run directories that the user means: all in `out_dir`, or those named; each once."""
    found = [] if patterns else directories(os.path.join(glob.escape(out_dir), "*"))
    for pattern in patterns:
        matches = [pattern] if os.path.isdir(pattern) else directories(pattern)
        if not matches:
            raise UserError(f"no such run directory: {pattern}")
        found += [run for path in matches for run in runs_in(path)]
    if not found:
        wrong = "no runs in" if os.path.isdir(out_dir) else "no such directory:"
        raise UserError(f"{wrong} {out_dir} ({HOW_TO_START})")
    return list({os.path.realpath(path): path for path in found}.values())


def main(argv=None):
    parser = ArgumentParser(prog="compare_architectures.py", description="Compare training runs: an ablation table.")
    parser.add_argument("runs", nargs="*", help="run directories or globs (all in --out_dir if none is given)")
    parser.add_argument("--out_dir", default="runs", help="where the runs are")
    parser.add_argument("--latest", type=int, metavar="N", help="only the newest N of them")
    parser.add_argument("--format", choices=FORMATS, default="table", help="how to print")
    parser.add_argument("--sort", default="val_loss", metavar="KEY", help="one of " + ", ".join(c.key for c in COLUMNS))
    args = parser.parse_args(argv)
    if args.latest is not None and args.latest < 1:
        raise UserError(f"--latest: {args.latest} is not at least 1")
    runs = sorted(map(load_run, select(args.runs, args.out_dir)), key=lambda run: run["created_at"], reverse=True)
    comparison = compare(runs[:args.latest], args.sort)
    print(render(comparison, args.format), flush=True)  # flushed here, where a closed pipe is told in one line
    if args.format in ("csv", "json"):  # stdout is for a program: people read the other stream
        for warning in comparison["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a run's name may not exist in the terminal's encoding
    with exit_on_user_error():
        main()
