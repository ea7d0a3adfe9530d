"""Ranks runs, finds what they differ in, and says how far the ranking can be trusted. No torch.

Compared is every configuration key but those of `NOT_COMPARED`, and the environment that a run computed in. Runs that
differ in nothing else than keys of `REPEATS_MAY_DIFFER` are repeats of one experiment. A new key is compared unless it
gets a line in one of the two tables, with its reason. arms.py makes them the arms of a
study, which verdicts.py judges.
"""

import collections
import re
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypedDict, TypeVar

from blockgpt.errors import UserError, did_you_mean
from blockgpt.experiments.log_values import printable, without_index
from blockgpt.experiments.records import Change, Run, ValData, columns
from blockgpt.training.criterion import Criterion

T = TypeVar("T")
NOT_COMPARED = {  # {key: why it cannot matter}
    "arch_preset": "a name for the values of other keys, which are compared",
    "run_name": "where the run is stored",
    "out_dir": "where the run is stored",
    "data_dir": "where the data is; the fingerprint says which data it is",
    "max_epochs": "only refuses a run, at its start",
    "resume": "a resumed run equals an uninterrupted one; what changed is compared",
    "resume_force": "what it allowed to change is compared",
    "checkpoint_interval": "only saves",
    "keep_last": "only removes checkpoints",
    "keep_best": "only saves",
    "checkpoint_async": "only saves, and step time excludes saves",
    "rank_timeout": "only ends a run whose processes are lost",
    "join_timeout": "only ends a run whose processes do not meet",
    "save_timeout": "only ends a run whose processes are lost",
    "dry_run": "a dry run leaves no run directory",
    "dry_run_gpus": "of a dry run",
    "dry_run_gpu": "of a dry run",
    "dry_run_mfu": "of a dry run",
    "log_interval": "only logs",
    "gradient_log_interval": "only logs",
    "profile": "only logs; profiled steps are not timed",
    "memory_snapshot": "only logs",
    "tracker": "only logs",
    "tracker_project": "only logs",
}
DIGEST = re.compile("^([0-9a-f]{12})[0-9a-f]{28,}")
ROUNDING = "the same computation, its sums in another order"
REPEATS_MAY_DIFFER = {  # {what is shown where runs differ in it: why such runs are still repeats}
    "seed": "repeats exist to vary it",
    "dataset": "the data's fingerprint is compared, whatever its folder is named",
    "dataset_schedule": "the data's fingerprint is compared, and has the schedule",
    "batch_size": f"sequences per step are compared; {ROUNDING}",
    "gradient_accumulation_steps": f"sequences per step are compared; {ROUNDING}",
    "use_zero1": ROUNDING,
    "use_fsdp": ROUNDING,
    "fsdp_reshard_after_forward": ROUNDING,
    "fsdp_cpu_offload": ROUNDING,
    "dp_replicate": ROUNDING,
    "tensor_parallel": ROUNDING,
    "activation_checkpointing": ROUNDING,
    "loss_chunk": ROUNDING,
    "kernels": ROUNDING,
    "mfu_peak": "decides the column MFU alone",
    "world_size": ROUNDING,
    "hardware": ROUNDING,
    "threads": ROUNDING,
    "git_commit": "most commits do not change what a run computes",
    "python": "a version; seldom changes what a run computes",
    "numpy": "a version; seldom changes what a run computes",
    "torch": "a version; seldom changes what a run computes",
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


def group_by(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Runs or arms in groups of equal keys."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def shorten_middle(text: str, width: int) -> str:
    """`text` in at most `width` characters: the ends of a name identify a run better than its middle."""
    return text if len(text) <= width else text[:(width - 1) // 2] + "…" + text[len(text) - width // 2:]


def is_broken(run: Run) -> bool:
    return bool(run["status"].startswith("broken"))


# ---- what is compared ----

def changes_of(run: Run) -> list[Change]:
    """The changes at a run's resumes of what is compared."""
    return [change for change in run["changes"] if change.key not in NOT_COMPARED]


def value_text(value: Any) -> str:
    """A value in a message; a digest or commit by its first characters."""
    text = printable(value)
    return DIGEST.sub(r"\1", text) if len(text) >= 40 else text  # a dirty tree's commit ends in -dirty


def change_text(change: Change) -> str:
    """learning_rate: 0.01 → 0.0001 at step 40."""
    return f"{change.key}: {value_text(change.before)} → {value_text(change.now)} at step {change.step:,}"


def compared_values(run: Run) -> dict[str, Any]:
    """{key: value} of what is reported if runs differ in it: the model as built, other keys as set, the environment.

    A value that changed at a resume is a text that says so. `compare` computes them once for each run.
    """
    if "compared" in run:
        return run["compared"]
    values = {**run["config"], **run["model"]}
    values["device"] = without_index(values.get("device"))
    values |= run["environment"]  # what was in force, in place of what was asked for, such as dtype=auto
    values["data"] = run["data"].get("fingerprint")
    values["initial_weights"] = run["initial_weights"]
    if run["initial_weights"] is not None:
        values.pop("init_from", None)  # where they come from
    for key in {change.key for change in changes_of(run)}:
        changes = [change for change in changes_of(run) if change.key == key]
        values[key] = value_text(changes[0].before) + "".join(
            f" → {value_text(change.now)} at step {change.step:,}" for change in changes)
    # Texts of a log are printable; only long ones, such as digests, are shortened.
    return {key: value_text(value) if isinstance(value, str) and len(value) >= 40 else value
            for key, value in values.items() if key not in NOT_COMPARED}


def differences(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """{key: {run name: value}} of the keys in which the runs differ, without those that only follow from others."""
    values = {run["name"]: compared_values(run) for run in runs}
    rows = list(values.values())
    # Run by run, as the values of thousands of runs do not fit in the processor's cache. None may stand for no value.
    unequal = {key for row in rows for key, _ in row.items() ^ rows[0].items()}
    by_key = {key: {name: row.get(key) for name, row in values.items()}
              for key in dict.fromkeys(key for row in rows for key in row) if key in unequal}
    differing = {key: row for key, row in by_key.items() if len(set(row.values())) > 1}
    # A key of the model that no run sets is derived from others, as d_ff is from n_embd.
    listed = {key: row for key, row in differing.items()
              if not all(key in run["model"] and run["config"].get(key, "") is None for run in runs)}
    return listed or differing


def settings(run: Run) -> Hashable:
    """Equal for runs that are repeats of one experiment, if they saw as many tokens.

    `compare` computes it once for each run.
    """
    if "settings" in run:
        return run["settings"]
    values = [(key, value) for key, value in compared_values(run).items() if key not in REPEATS_MAY_DIFFER]
    # The seed of a repeat may be another one, but not change on the way.
    changes = [change_text(change) for change in changes_of(run)
               if change.key == "seed" or change.key not in REPEATS_MAY_DIFFER]
    return frozenset(values), tuple(changes), run["data"].get("sequences_per_step")


def experiment(run: Run) -> Hashable:
    """Equal for runs that are repeats of one experiment."""
    return settings(run), run["tokens"]


# ---- how far the ranking can be trusted ----

SAME_TOKENS: dict[str, Callable[[Run], Any]] = {  # runs that are equal in all of these saw the same tokens in one order
    "data fingerprint": lambda run: compared_values(run)["data"],
    "seed": lambda run: compared_values(run).get("seed"),
    "tokens seen": lambda run: run["tokens"],
    "block_size": lambda run: run["model"].get("block_size"),
    "sequences per step": lambda run: run["data"].get("sequences_per_step"),
}


def run_names(runs: list[Run]) -> str:
    return ", ".join(run["name"] for run in runs[:4]) + (f" and {len(runs) - 4} more" if len(runs) > 4 else "")


def comparability_warnings(ranked: list[Run], criterion: Criterion) -> tuple[list[str], list[str]]:
    """(warnings, notes) about how far the ranking can be trusted."""
    metric_text = criterion.metric.replace("_", " ")
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


def change_messages(runs: list[Run]) -> tuple[list[str], list[str]]:
    """(warnings, notes): what changed at the resumes of each run. What only resume_force allowed is a warning."""
    messages: tuple[list[str], list[str]] = ([], [])
    for run in runs:
        for forced, texts in zip((True, False), messages, strict=True):
            changed = [change_text(change) for change in changes_of(run) if change.forced == forced]
            if changed:
                texts.append(f"{run['name']}: {'resume_force changed ' * forced}{'; '.join(changed)}")
    return messages


def val_data_text(val_data: ValData) -> str:
    if val_data.digest is None:
        return "not recorded"
    return f"{'?' if val_data.tokens is None else f'{val_data.tokens:,}'} tokens, digest {val_data.digest[:8]}"


def val_data_groups(runs: list[Run]) -> list[list[Run]]:
    """The runs in groups that were evaluated on the same data, the largest first, of equally large ones the first.

    Runs of earlier versions recorded no digest. They belong to those with a digest whose run.json describes the same
    data, if these all have the same.
    """
    digests: dict[str, set[str]] = {}
    for run in runs:
        if (digest := run["val_data"].digest) is not None:
            digests.setdefault(run["val_data"].description, set()).add(digest)

    def identity(run: Run) -> Hashable:
        val_data: ValData = run["val_data"]
        known = digests.get(val_data.description, set())
        digest = next(iter(known)) if val_data.digest is None and len(known) == 1 else val_data.digest
        return run["config"].get("objective"), digest or val_data.description

    return sorted(group_by(runs, identity), key=len, reverse=True)


# ---- the comparison ----

def common_criterion(runs: list[Run]) -> Criterion:
    """The criterion of most runs that are not broken, of equally many the first one's."""
    counts = collections.Counter(run["criterion"] for run in runs if not is_broken(run))
    return counts.most_common(1)[0][0] if counts else Criterion()


def compare(runs: list[Run], sort: str | None = None) -> Comparison:
    """Rank runs and find their differences.

    Rank and delta refer to the runs that have the criterion and the validation data of most. In any order, other runs
    come after these, those without a value of the criterion next, and broken ones last.

    Args:
        runs: from `read_run`.
        sort: the key or header of a column; None: the criterion. `UserError` if there is none.
    """
    criterion = common_criterion(runs)
    metric, table_columns = criterion.metric, columns(criterion)
    column = {name: c for c in table_columns for name in (c.header, c.key)}.get(sort or metric)
    if column is None:
        raise UserError(f"--sort: {sort!r} is unknown{did_you_mean(str(sort), [c.key for c in table_columns])}")
    runs = [run | {"name": printable(run["path"])} if len(group) > 1 else dict(run)
            for group in group_by(runs, lambda run: run["name"]) for run in group]
    for run in runs:
        run["compared"] = compared_values(run)
        run["settings"] = settings(run)
    others = [run for run in runs if run["criterion"] != criterion and not is_broken(run)]
    for run in runs:
        run |= dict.fromkeys({c.key for c in table_columns} - run.keys())
    for run in others:
        run |= {metric: None, f"final_{metric}": None}
    group, *other_groups = val_data_groups([run for run in runs if run[metric] is not None]) or [[]]
    ranked = sorted(group, key=lambda run: (criterion.sort_key(run[metric]), run["name"]))
    for rank, run in enumerate(ranked, 1):
        run |= {"rank": rank, "delta": run[metric] - ranked[0][metric]}

    def order(run: Run) -> tuple[Any, ...]:
        value = run[column.key]
        return (is_broken(run), run[metric] is None, run["rank"] is None, value is None,
                -value if column.more_is_better and value is not None else value, run["name"])

    runs.sort(key=order)
    warnings, notes = comparability_warnings(ranked, criterion)
    warnings += [f"{run['name']}: not ranked, its criterion is {run['criterion'].metric} and not {metric} (compare "
                 "such runs apart)" for run in others]
    warnings += [f"{run['name']}: not ranked, it was evaluated on other validation data "
                 f"({val_data_text(run['val_data'])}) than {ranked[0]['name']} "
                 f"({val_data_text(ranked[0]['val_data'])}) (compare such runs apart)"
                 for other in other_groups for run in other]
    usable = [run for run in runs if not is_broken(run)]
    forced, changed = change_messages(usable)
    return {"criterion": criterion, "runs": runs, "differences": differences(usable),
            "warnings": warnings + forced + [f"{run['name']}: {text}" for run in runs for text in run["warnings"]],
            "notes": notes + changed}
