"""Run directories as a study: which runs are repeats of one arm, which arms are one variant, what cannot be compared.

A plan knows this of its runs. Here it is found from what run.json records.
"""

import collections
import dataclasses
import fnmatch
from collections.abc import Collection, Hashable
from typing import Any, NamedTuple

from blockgpt.errors import UserError, did_you_mean
from blockgpt.experiments.comparison import (
    REPEATS_MAY_DIFFER,
    compared_values,
    group_by,
    is_broken,
    run_names,
    settings,
    val_data_groups,
    value_text,
)
from blockgpt.experiments.records import Run
from blockgpt.experiments.study import Reading, Study, trial_of_run
from blockgpt.training.criterion import Criterion

SIZE_KEYS = ("n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "d_ff", "ffn_multiple_of")
HORIZON_KEYS = ("max_iters", "warmup_iters", "lr_decay_iters", "eval_interval")  # follow from how long a run trains
SIZE_RATIO = 1.2  # of parameters: models that are closer are not two sizes of one architecture


def planned_tokens(run: Run) -> float:
    """Tokens of the whole run, also of one that ended early; those it saw where run.json does not say."""
    steps, tokens = run["config"].get("max_iters"), run["data"].get("tokens_per_step")
    planned = steps * tokens if isinstance(steps, int) and isinstance(tokens, int) else run["tokens"]
    return float(planned or 0)


class RunArm(NamedTuple):
    """The runs that differ in nothing but keys of REPEATS_MAY_DIFFER."""

    runs: list[Run]
    values: dict[str, Any]  # what they are compared by
    horizon: float
    size: str

    def without(self, *keys: str) -> Hashable:
        """Equal for arms that differ in these keys alone."""
        return frozenset((key, value) for key, value in self.values.items() if key not in keys)


def find_arms(runs: list[Run]) -> list[RunArm]:
    """The arms of the runs, in their order."""
    arms: dict[Hashable, RunArm] = {}
    for run in runs:
        horizon, model = planned_tokens(run), run["model"]
        key = settings(run), horizon
        if key not in arms:
            values = {key: value for key, value in compared_values(run).items() if key not in REPEATS_MAY_DIFFER}
            values["sequences_per_step"] = run["data"].get("sequences_per_step")
            size = f"{model.get('n_layer')}L-{model.get('n_head')}H-{model.get('n_embd')}D"
            arms[key] = RunArm([], values, horizon, size)
        arms[key].runs.append(run)
    return list(arms.values())


def find_baseline(arms: list[RunArm], name: str) -> RunArm:
    """The arm that a run, an architecture or a glob of runs names; `UserError` unless it is one.

    Of arms with one architecture that differ in size or horizon alone, it is the one with the longest horizon.
    """
    def matches(arm: RunArm) -> bool:
        return any(fnmatch.fnmatchcase(text, name) for run in arm.runs for text in (run["name"], run["path"]))

    found = [arm for arm in arms if any(run["name"] == name for run in arm.runs)]
    found = found or [arm for arm in arms if any(run["architecture"] == name for run in arm.runs)]
    found = found or [arm for arm in arms if matches(arm)]
    if not found:
        names = [text for arm in arms for run in arm.runs for text in (run["name"], run["architecture"])]
        raise UserError(f"--baseline: no run or architecture is named {name!r}{did_you_mean(name, names)}")
    first = max(found, key=lambda arm: arm.horizon)
    twins = {arm.without(*SIZE_KEYS, *HORIZON_KEYS) for arm in found}
    if len(twins) > 1:
        examples = ", ".join(arm.runs[0]["name"] for arm in found[:4])
        raise UserError(f"--baseline: {name!r} names {len(found)} different experiments (name one of their runs: "
                        f"{examples})")
    return first


def parameters_of(arm: RunArm) -> float:
    return float(arm.runs[0]["parameters"] or 0)


def arms_without_baseline(runs: list[Run], reading: Reading | None = None) -> Study:
    """The runs as a study in which every arm is a variant; broken ones and those without a seed are left out."""
    arms = find_arms([run for run in runs if not is_broken(run) and has_seed(run)])
    labels = label_variants([[arm] for arm in arms], False, ())
    return Study([trial_of_run(run, label, run["config"]["seed"], horizon=arm.horizon, reading=reading)
                  for label, arm in zip(labels, arms, strict=True) for run in arm.runs],
                 arms[0].runs[0]["criterion"] if arms else Criterion())


def study_of_runs(runs: list[Run], baseline: str, reading: Reading | None = None) -> tuple[Study, str]:
    """The runs as a study, and the name of the variant that is the baseline.

    Sizes are told apart where the baseline was trained at several (equal but for SIZE_KEYS, parameters more than
    SIZE_RATIO apart), horizons likewise (HORIZON_KEYS). Without that, whatever differs is a variant.

    Args:
        runs: from `read_run`, each with a name of its own; broken ones are left out.
        baseline: the name of a run or of an architecture.
        reading: which value of a run counts. With `at`, horizons are not told apart.

    Raises:
        UserError: `baseline` does not name one experiment.
    """
    reading = reading or Reading()
    usable = [run for run in runs if not is_broken(run)]
    seeded = list(filter(has_seed, usable))
    warnings = [f"{run['name']}: not judged: run.json has no seed" for run in usable if not has_seed(run)]
    arms = find_arms(seeded)
    base = find_baseline(arms, baseline)
    twins = [arm for arm in arms if arm.without(*SIZE_KEYS, *HORIZON_KEYS) == base.without(*SIZE_KEYS, *HORIZON_KEYS)]
    by_size = max(map(parameters_of, twins)) > SIZE_RATIO * min(map(parameters_of, twins)) > 0
    by_horizon = reading.at is None and len({arm.horizon for arm in twins}) > 1
    ignored = (*(SIZE_KEYS if by_size else ()), *(HORIZON_KEYS if by_horizon else ()))
    if vocabularies_differ(seeded):
        reading = dataclasses.replace(reading, bits_per_byte=True)
        warnings.append("the vocabularies differ: judged by bits per byte (val_bpb), which compares only if the "
                        "validation texts are the same")
    groups = group_by(arms, lambda arm: arm.without(*ignored))
    labels = label_variants(groups, by_size, ignored)
    factors = find_factors([group[0] for group in groups], labels, ignored)
    val_data = {id(run): index for index, group in enumerate(val_data_groups(seeded)) for run in group}
    base_data = {val_data[id(run)] for run in base.runs}
    name = next(label for label, group in zip(labels, groups, strict=True) if base in group)
    study = Study([], Criterion("val_bpb") if reading.bits_per_byte else base.runs[0]["criterion"], {}, {}, warnings)
    for label, group in zip(labels, groups, strict=True):
        for arm in group:
            if label != name:
                same_data = {val_data[id(run)] for run in arm.runs} <= base_data
                same_length = by_horizon or reading.at is not None or arm.horizon == base.horizon
                problem = incomparable(arm, base, same_data or reading.bits_per_byte, same_length)
                study.excluded.update({label: problem} if problem else {})
                caution = differs_besides(arm, base)
                study.cautions.update({label: caution} if caution else {})
            study.trials.extend(trial_of_run(run, label, run["config"]["seed"], arm.size if by_size else "",
                                             horizon_of(arm, reading), factors.get(label), reading) for run in arm.runs)
    warnings += middle_of_cosine(seeded, reading)
    return study, name


def has_seed(run: Run) -> bool:
    return isinstance(run["config"].get("seed"), int)


def horizon_of(arm: RunArm, reading: Reading) -> float:
    """Tokens that a value of the arm is read at; 0 where that differs from run to run."""
    if reading.at is None:
        return arm.horizon
    spend, amount = reading.at
    return amount if spend == "tokens" else 0.0


def vocabularies_differ(runs: list[Run]) -> bool:
    """Whether losses per token cannot be compared, and bits per byte can."""
    return (len({run["data"].get("vocab_size") for run in runs}) > 1
            and all(point.bpb is not None for run in runs for point in run["curve"]))


def label_variants(groups: list[list[RunArm]], by_size: bool, ignored: Collection[str]) -> list[str]:
    """A name for each variant: its architecture, and where several have it the keys in which these differ."""
    firsts = [group[0] for group in groups]
    names = [str(arm.runs[0]["architecture"]).removeprefix(f"{arm.size}-" if by_size else "") for arm in firsts]
    differing = {}
    for name in dict.fromkeys(names):
        rivals = [arm for arm, own in zip(firsts, names, strict=True) if own == name]
        differing[name] = [key for key in rivals[0].values if key not in ignored
                           and len({rival.values.get(key) for rival in rivals}) > 1]
    labels = [" ".join([name, *(f"{key}={value_text(arm.values.get(key))}" for key in differing[name])])
              for name, arm in zip(names, firsts, strict=True)]
    counts = collections.Counter(labels)
    # Arms that differ in nothing but changes at resumes or in what is ignored.
    return [label if counts[label] == 1 else f"{label} ({arm.runs[0]['name']})"
            for label, arm in zip(labels, firsts, strict=True)]


def find_factors(arms: list[RunArm], labels: list[str], ignored: Collection[str]) -> dict[str, dict[str, str]]:
    """{variant: {factor: level}} of the keys in which the arms differ; keys that change together are one factor."""
    keys = [key for key in arms[0].values if key not in ignored]
    patterns: dict[tuple[int, ...], list[str]] = {}
    for key in keys:
        values = [arm.values.get(key) for arm in arms]
        levels = list(dict.fromkeys(values))
        if len(levels) > 1:
            patterns.setdefault(tuple(levels.index(value) for value in values), []).append(key)
    return {label: {names[0]: value_text(arm.values.get(names[0])) for names in patterns.values()}
            for label, arm in zip(labels, arms, strict=True)}


def incomparable(arm: RunArm, base: RunArm, same_data: bool, same_length: bool) -> str:
    """Why an arm cannot be compared with the baseline; '' if it can."""
    if arm.runs[0]["criterion"] != base.runs[0]["criterion"]:
        return f"its criterion is {arm.runs[0]['criterion'].metric}"
    if not same_data:
        return "it was evaluated on other validation data"
    if not same_length:
        return (f"it was planned for {arm.horizon:.4g} tokens, the baseline for {base.horizon:.4g} (--at tokens=… "
                "compares them at an equal spend)")
    return ""


def differs_besides(arm: RunArm, base: RunArm) -> str:
    """What differs from the baseline besides the architecture, so that a verdict may be due to it."""
    def values(arm: RunArm, key: str) -> list[str]:
        return sorted({value_text(arm.values.get(key, compared_values(run).get(key))) for run in arm.runs})

    keys = {"data": "data", "sequences per step": "sequences_per_step", "code version": "git_commit"}
    return "; ".join(f"{name}: {', '.join(values(arm, key))}, the baseline {', '.join(values(base, key))}"
                     for name, key in keys.items() if values(arm, key) != values(base, key))


def middle_of_cosine(runs: list[Run], reading: Reading) -> list[str]:
    """A warning if runs are read before the end of their learning rate's decay."""
    if reading.at is None:
        return []
    spend, amount = reading.at
    early = [run for run in runs if run["config"].get("lr_schedule") == "cosine" and run["curve"]
             and (getattr(run["curve"][-1], spend) or 0) > 1.001 * amount]
    return [f"--at {spend}={amount:g} is in the middle of the cosine of {run_names(early)}: a run of that length, with "
            "a decay of its own, would end better"] if early else []
