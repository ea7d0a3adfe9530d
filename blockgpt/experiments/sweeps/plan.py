"""A study as it is declared, and the runs that it takes. No torch.

A `Plan` says what is compared: a base, named variants, sizes, seeds. A `PlannedRun` is one run of train.py: the words
of its command line and an id. The id is a digest of the resolved configuration, the data and the code that a run
executes, so that a run is found again by what it is, and not by when or under which name it was declared. To add a
field: a line in `Plan`, which study.json reads from there, and its type in `read_plan`.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from blockgpt.config_fields import coerce, located, parse_value, read_config_file
from blockgpt.errors import UserError, did_you_mean, error_text, short_repr
from blockgpt.experiments.comparison import NOT_COMPARED
from blockgpt.experiments.sweeps.identity import Program, resolved_values, run_id
from blockgpt.files import write_json

SCHEMA_VERSION = 1  # of study.json
EQUAL = ("tokens", "flops", "time", "params")
TUNING_SEED, SCREENING_SEED = 1_000_001, 2_000_001  # the first of each; judging seeds are below
SIZE = "base"  # the name of the size of a study that declares none
COPY, SHUFFLED = "baseline-copy", "shuffled-tokens"  # the variants of the negative control
SHUFFLED_SUFFIX = "-shuffled"
OF_THE_RUNNER = {  # {key that a base must not set: what sets it}
    "run_name": "each run is named by its id", "resume": "a killed run is resumed", "resume_force": "nothing changes",
    "eval_only": "every run is trained", "seed": "--seeds sets it", "dry_run": "--dry_run of this command"}


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        name: of the study's folder.
        question: in words.
        base: words of train.py's command line, config files and flags.
        variants: {name: {key: value}}, the baseline among them.
        baseline: the variant that the others are compared with.
        sizes: {name: words}.
        seeds: of the runs that are judged.
        horizons: fractions of max_iters at which the baseline is trained, too, so that its loss law can be fitted.
        margin: difference of the criterion below which two variants count as equal; None: the spread of the baseline.
        level: of the whole family of comparisons.
        spread: the expected standard deviation of a pair's difference; None: unknown before the first runs.
        lr_sweep: learning rates, each tried by every variant on tuning_seeds.
        tuning_seeds: how many.
        equal: what all variants spend alike, one of EQUAL.
        control: whether a renamed copy of the baseline and a baseline on shuffled tokens run, too.
        overrides: words that override the base and the sizes, as the command line does a plan file.
    """

    name: str
    base: tuple[str, ...]
    variants: dict[str, dict[str, Any]]
    baseline: str
    question: str = ""
    sizes: dict[str, tuple[str, ...]] = field(default_factory=lambda: {SIZE: ()})
    seeds: tuple[int, ...] = (1, 2, 3)
    horizons: tuple[float, ...] = ()
    margin: float | None = None
    level: float = 0.05
    spread: float | None = None
    lr_sweep: tuple[float, ...] = ()
    tuning_seeds: int = 1
    equal: str = "tokens"
    control: bool = False
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, wrong, words in (
                ("name", not re.fullmatch(r"[\w+=-][\w.+=-]{0,99}", self.name),
                 "a folder's name of letters, digits, . + = -"),
                ("seeds", not self.seeds or len(set(self.seeds)) < len(self.seeds)
                 or not all(0 <= s < TUNING_SEED for s in self.seeds),
                 f"at least one, each once, from 0 to {TUNING_SEED - 1:,}"),
                ("variants", len(self.variants) + self.control < 2, "at least two, with the baseline"),
                ("baseline", self.baseline not in self.variants, f"one of {', '.join(self.variants)}"),
                ("level", not 0 < self.level < 0.5, "between 0 and 0.5"),
                ("margin", self.margin is not None and not self.margin > 0, "above 0"),
                ("spread", self.spread is not None and not self.spread > 0, "above 0"),
                ("horizons", not all(0 < h <= 100 for h in self.horizons), "fractions of max_iters, above 0"),
                ("lr_sweep", len(self.lr_sweep) == 1 or not all(lr > 0 for lr in self.lr_sweep),
                 "at least two learning rates above 0"),
                ("tuning_seeds", not 1 <= self.tuning_seeds <= 1000, "from 1 to 1000"),
                ("equal", self.equal not in EQUAL, f"one of {', '.join(EQUAL)}")):
            if wrong:
                raise UserError(f"{name}: {short_repr(getattr(self, name))} is out of range, must be {words}")

    @property
    def others(self) -> list[str]:
        """The variants that are compared with the baseline."""
        return [name for name in self.variants if name != self.baseline]


class PlannedRun(NamedTuple):
    """One run of train.py.

    Attributes:
        id: digest of all that decides the run.
        name: of its directory.
        words: of train.py's command line, without run_name, out_dir and resume.
        purpose: judge, horizon (the baseline's, for its loss law), tune (of the learning rate), screen (of successive
            halving) or probe (its speed).
        horizon: max_iters as a fraction of that of the judged runs of this variant.
        tokens: that it trains on.
        block: runs of one block run next to each other; None where the order does not matter.
    """

    id: str
    name: str
    variant: str
    size: str
    seed: int
    words: tuple[str, ...]
    purpose: str = "judge"
    horizon: float = 1.0
    steps: int = 0
    tokens: int = 0
    block: str | None = None


# ---- declaring


def read_plan(path: str, root: Path) -> dict[str, Any]:
    """{field of a study: value} of a plan file; `vary` and `one_at_a_time`, too.

    Raises:
        UserError: the file cannot be read, or has a name that is no field.
    """
    values = read_config_file(path, root)
    known = [f.name for f in dataclasses.fields(Plan) if f.name != "overrides"] + ["vary", "one_at_a_time"]
    for name in values:
        if name not in known:
            raise UserError(f"{path}: {name}: no such field of a plan{did_you_mean(name, known)}, or _{name} for a "
                            "variable of your own")
    types: dict[str, tuple[type, ...]] = {
        "question": (str,), "name": (str,), "baseline": (str,), "equal": (str,), "base": (list, tuple),
        "variants": (dict,), "vary": (dict,), "sizes": (dict,), "seeds": (list, tuple, range, int),
        "horizons": (list, tuple), "lr_sweep": (list, tuple), "margin": (int, float, type(None)),
        "level": (int, float), "spread": (int, float, type(None)), "tuning_seeds": (int,), "control": (bool,),
        "one_at_a_time": (bool,)}
    for name, value in values.items():
        if type(value) not in types[name]:
            raise UserError(f"{path}: {name}: {short_repr(value)} is {type(value).__name__}, not "
                            f"{' or '.join(t.__name__ for t in types[name])}")
    elements: dict[str, tuple[type, ...]] = {"base": (str,), "seeds": (int,), "horizons": (int, float),
                                             "lr_sweep": (int, float)}
    for name, element_types in elements.items():
        for element in () if isinstance(values.get(name), int) else values.get(name, ()):
            if type(element) not in element_types:
                raise UserError(f"{path}: {name}: {short_repr(element)} is {type(element).__name__}, not "
                                f"{element_types[0].__name__}")
    if "seeds" in values and isinstance(values["seeds"], int):
        values["seeds"] = range(1, values["seeds"] + 1)
    for name in ("seeds", "horizons", "lr_sweep", "base"):
        if name in values:
            values[name] = tuple(values[name])
    for name, words in values.get("sizes", {}).items():
        if type(name) is not str or type(words) not in (list, tuple, dict):
            raise UserError(f"{path}: sizes: {short_repr(name)} is not a name with a list of words or a dict of keys")
    if "sizes" in values:
        values["sizes"] = {name: flags(words) if isinstance(words, dict) else tuple(map(str, words))
                           for name, words in values["sizes"].items()}
    for name, keys in values.get("variants", {}).items():
        if type(name) is not str or type(keys) is not dict:
            raise UserError(f"{path}: variants: {short_repr(name)} is not a name with a dict of keys")
    for name, choices in values.get("vary", {}).items():
        if type(choices) not in (list, tuple):
            raise UserError(f"{path}: vary: {short_repr(name)} has no list of values")
    return values


def split_values(text: str) -> list[str]:
    """'a,b' → ['a', 'b']; a comma inside brackets or quotes separates nothing: "{'a': 1, 'b': 2},code"."""
    values, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        else:
            depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += c
    return values


def parse_vary(texts: Iterable[str], program: Program) -> dict[str, list[Any]]:
    """{key: [values]} of flags `--vary key=a,b`.

    Raises:
        UserError: a key or value that does not exist, a key that the runner sets, or a key given twice.
    """
    vary: dict[str, list[Any]] = {}
    for text in texts:
        name, separator, values = text.lstrip("-").partition("=")
        if not separator or not values:
            raise UserError(f"--vary: {short_repr(text)} is not key=value,value")
        if name in vary:
            raise UserError(f"--vary: {name} is given twice (--vary {name}=a,b,c)")
        check_key("--vary", name, program)
        with located(f"--vary {text}"):
            vary[name] = [coerce(program.keys[name], program.types[name],
                                 parse_value(program.keys[name], program.types[name], value))
                          for value in split_values(values)]
    return vary


def check_key(location: str, name: str, program: Program) -> None:
    """`UserError` unless a variant may set the key."""
    if name not in program.keys:
        raise UserError(f"{location}: {name}: no such key{did_you_mean(name, program.keys)}")
    if name in OF_THE_RUNNER:
        raise UserError(f"{location}: {name}: cannot vary: {OF_THE_RUNNER[name]}")
    if name in NOT_COMPARED and name != "arch_preset":
        raise UserError(f"{location}: {name}: cannot vary: it does not change what a run learns "
                        f"({NOT_COMPARED[name]})")


def variant_name(values: Mapping[str, Any], vary: Mapping[str, Sequence[Any]]) -> str:
    """'rmsnorm+rope'. A value that is no word, or that two keys have, is named with its key: 'beta2=0.95'."""
    words = [str(value) for choices in vary.values() for value in choices]
    return "+".join(value if isinstance(value, str) and words.count(value) == 1
                    else f"{name}={value}" for name, value in values.items()) or "baseline"


def grid(vary: Mapping[str, Sequence[Any]], base: Mapping[str, Any],
         one_at_a_time: bool = False) -> tuple[dict[str, dict[str, Any]], str]:
    """The variants of a grid, and the name of its baseline.

    Args:
        vary: {key: values}.
        base: {key: value} of the resolved base.
        one_at_a_time: the base, and variants that depart from it in one key each. Otherwise every combination; the
            baseline is the one with the base's values, where the grid has it, else the first.

    Raises:
        UserError: a value is given twice.
    """
    for name, choices in vary.items():
        if len({json.dumps(value, sort_keys=True) for value in choices}) < len(choices):
            raise UserError(f"vary: {name} has a value twice: {short_repr(list(choices))}")
    if one_at_a_time:
        departures = [{name: value} for name, choices in vary.items() for value in choices if value != base[name]]
        return {"baseline": {}, **{variant_name(values, vary): values for values in departures}}, "baseline"
    combinations = [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]
    own = [values for values in combinations if all(base[name] == value for name, value in values.items())]
    return {variant_name(values, vary): values for values in combinations}, variant_name((own or combinations)[0], vary)


def flags(values: Mapping[str, Any]) -> tuple[str, ...]:
    """{key: value} as words of a command line."""
    return tuple(f"--{name}={value}" for name, value in values.items())


def base_values(words: Sequence[str], program: Program) -> dict[str, Any]:
    """{key: value} of the base, derived keys resolved.

    Raises:
        UserError: a mistake in the base, or a key that the runner sets.
    """
    config = program.load_config(list(words))
    for name, reason in OF_THE_RUNNER.items():
        if name in config.explicit:
            raise UserError(f"{config.explicit[name]}: {name}: must not be set in a study: {reason}")
    return resolved_values(config)


def with_control(plan: Plan) -> Plan:
    """The plan with the variants of the negative control: a copy of the baseline, and the baseline on shuffled tokens.

    Raises:
        UserError: a variant has one of their names.
    """
    if not plan.control:
        return plan
    for name in (COPY, SHUFFLED):
        if name in plan.variants:
            raise UserError(f"variants: {name!r} is the name of a variant of --control (rename it)")
    own = plan.variants[plan.baseline]
    return dataclasses.replace(plan, variants={**plan.variants, COPY: dict(own), SHUFFLED: dict(own)})


# ---- the runs


class Planner:
    """The runs of a study: its variants, sizes and seeds as command lines with ids.

    Args:
        plan: with the variants of its control, if it has one.
        program: see there.
        environment: see `run_id`.
        control_data: the folder of the shuffled dataset of the control.
    """

    def __init__(self, plan: Plan, program: Program, environment: Mapping[str, Any] | None = None,
                 control_data: Path | None = None) -> None:
        self.plan, self.program, self.environment = plan, program, dict(environment or {})
        self.control_data = control_data
        self.extra: dict[tuple[str, str], dict[str, Any]] = {}  # {(variant, size): keys that --equal or the sweep set}

    def words(self, variant: str, size: str, **keys: Any) -> tuple[str, ...]:
        """The command line of a variant at a size; later keys override earlier ones."""
        return (*self.plan.base, *self.plan.sizes[size], *self.plan.overrides, *flags(self.plan.variants[variant]),
                *flags(self.extra.get((variant, size), {})), *self.data_words(variant, size), *flags(keys))

    def data_words(self, variant: str, size: str) -> tuple[str, ...]:
        """The keys of the dataset of the control whose tokens are shuffled; none for other variants."""
        if not (self.plan.control and variant == SHUFFLED):
            return ()
        config = self.program.load_config([*self.plan.base, *self.plan.sizes[size], *self.plan.overrides])
        return flags({"dataset": f"{config.dataset}{SHUFFLED_SUFFIX}", "data_dir": self.control_data})

    def config(self, variant: str, size: str, **keys: Any) -> Any:
        """The configuration of a variant at a size; `UserError` names both in front of a mistake."""
        try:
            return self.program.load_config(list(self.words(variant, size, **keys)))
        except UserError as error:
            raise UserError(f"variant {variant}{'' if size == SIZE else f', size {size}'}: {error}") from None

    def run(self, variant: str, size: str, seed: int, purpose: str = "judge", horizon: float = 1.0,
              block: str | None = None, **keys: Any) -> PlannedRun:
        """One run; `horizon` multiplies the steps of the variant."""
        full = self.config(variant, size, seed=seed, **keys)
        steps = max(1, round(full.max_iters * horizon))
        if horizon != 1 and full.lr_decay_iters is not None:
            raise UserError(f"{full.explicit['lr_decay_iters']}: lr_decay_iters={full.lr_decay_iters} does not follow "
                            "max_iters, which horizons and screening change (drop it)")
        if steps != full.max_iters:
            keys["max_iters"] = steps
        config = self.config(variant, size, seed=seed, **keys)
        identifier = run_id(config, self.program, self.environment, self.salt(variant))
        words = self.words(variant, size, seed=seed, **keys)
        tokens = steps * tokens_per_step(config)
        name = f"{config.model.arch_name()[:80]}-s{seed}-{identifier}"
        return PlannedRun(identifier, name, variant, size, seed, words, purpose, horizon, steps, tokens, block)

    def salt(self, variant: str) -> str:
        """Tells the runs of the baseline's copy from the baseline's."""
        return COPY if self.plan.control and variant == COPY else ""

    def check(self, run: PlannedRun) -> None:
        """`UserError` if a run would be another one now: a config file or the data have changed since."""
        config = self.program.load_config(run.words)
        if run_id(config, self.program, self.environment, self.salt(run.variant)) != run.id:
            raise UserError(f"{run.variant}, seed {run.seed}: a config file or the data have changed since the study "
                            "was planned (the same command plans it anew)")

    def judged(self, variants: Collection[str] | None = None,
               learning_rates: Mapping[tuple[str, str], float] | None = None) -> list[PlannedRun]:
        """The runs that are judged, in the order in which they run.

        The variants of one seed and size are a block. Every second block runs backwards (AB, BA), so that a slow drift
        of the machine cancels in the differences. The baseline's horizons come last.

        Args:
            variants: those that are left after screening; None: all.
            learning_rates: {(variant, size): learning rate} that the sweep has chosen.
        """
        runs: list[PlannedRun] = []
        names = [name for name in self.plan.variants if variants is None or name in variants]
        for index, seed in enumerate(self.plan.seeds):
            for size in self.plan.sizes:
                block = [self.run(name, size, seed, block=f"{size} seed {seed}",
                                    **self.rate(name, size, learning_rates))
                         for name in (names if index % 2 == 0 else reversed(names))]
                runs += block
        runs += [self.run(self.plan.baseline, size, seed, "horizon", horizon,
                              **self.rate(self.plan.baseline, size, learning_rates))
                   for horizon in self.plan.horizons if horizon != 1
                   for seed in self.plan.seeds for size in self.plan.sizes]
        return distinct_runs(runs)

    def rate(self, variant: str, size: str, chosen: Mapping[tuple[str, str], float] | None) -> dict[str, Any]:
        """The key learning_rate as the sweep has chosen it; nothing without a sweep."""
        return {"learning_rate": chosen[variant, size]} if chosen else {}

    def tuning(self) -> list[PlannedRun]:
        """The runs of the learning rate sweep: for every variant the same rates and the same seeds."""
        seeds = range(TUNING_SEED, TUNING_SEED + self.plan.tuning_seeds)
        return distinct_runs([self.run(variant, size, seed, "tune", learning_rate=lr)
                       for seed in seeds for size in self.plan.sizes for lr in self.plan.lr_sweep
                       for variant in self.plan.variants])

    def screening(self, variants: Iterable[str], horizon: float,
                  learning_rates: Mapping[tuple[str, str], float] | None = None) -> list[PlannedRun]:
        """The runs of one rung of successive halving, on a seed that judges nothing."""
        return distinct_runs([self.run(variant, size, SCREENING_SEED, "screen", horizon,
                                  **self.rate(variant, size, learning_rates))
                       for size in self.plan.sizes for variant in variants])


def distinct_runs(runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    """The runs without later ones of the same id.

    Raises:
        UserError: two variants that are judged are one and the same run.
    """
    found: dict[str, PlannedRun] = {}
    for run in runs:
        first = found.setdefault(run.id, run)
        if first.variant != run.variant:
            raise UserError(f"variants {first.variant} and {run.variant} are the same run: their resolved "
                            "configurations do not differ (drop one)")
    return list(found.values())


def tokens_per_step(config: Any) -> int:
    """Tokens that a step of a run trains on."""
    return config.batch_size * config.gradient_accumulation_steps * config.model.block_size


# ---- study.json


def plan_record(plan: Plan, runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """The content of study.json: the plan's fields, and for each run its directory, variant, size, seed and purpose."""
    planned = [{"run": r.name, "variant": r.variant, "size": r.size, "seed": r.seed, "purpose": r.purpose,
                "horizon": r.horizon, "steps": r.steps, "tokens": r.tokens, "block": r.block,
                "command": ["train.py", *r.words]} for r in runs]
    return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(plan), "runs": planned}


def write_plan(folder: Path, plan: Plan, runs: Sequence[PlannedRun]) -> None:
    """Replace the study.json of a study's folder: what is declared. What is done is in the run directories alone.

    Raises:
        UserError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "study.json", plan_record(plan, runs))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error_text(error)} (--out_dir=…)") from None


# ---- figures of a plan


def pooled_spread(differences: Iterable[Sequence[float]]) -> float | None:
    """The standard deviation of a pair's difference, pooled over comparisons; None without two pairs in one."""
    squares = freedom = 0.0
    for values in differences:
        if len(values) > 1:
            mean = math.fsum(values) / len(values)
            squares += math.fsum((value - mean) ** 2 for value in values)
            freedom += len(values) - 1
    return math.sqrt(squares / freedom) if freedom else None
