"""A judgement as text: for the terminal, Markdown, LaTeX, CSV and JSON. To add a column: a line in `CELLS`."""

import csv
import io
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from blockgpt.console import align_columns
from blockgpt.experiments.comparison import shorten_middle
from blockgpt.experiments.judgement import Arm, Cell, Judgement, NoiseFloor, Regime, Verdict, cell_text
from blockgpt.experiments.records import human_count
from blockgpt.experiments.statistics import MAX_SEEDS, Effect
from blockgpt.experiments.verdicts import POWER
from blockgpt.experiments.worth import Law, Ratio, Worth

SCHEMA_VERSION = 1  # of the JSON
SPEND_WORDS = {"tokens": ("fewer tokens", "more tokens"), "flops": ("fewer FLOPs", "more FLOPs"),
               "time": ("less time", "more time")}
LATEX_ESCAPES = str.maketrans({**{c: f"\\{c}" for c in "&%$#_{}"}, "~": "\\textasciitilde{}",
                               "^": "\\textasciicircum{}", "\\": "\\textbackslash{}", "±": "$\\pm$", "→": "$\\to$"})


# ---- words ----

def confidence(level: float) -> str:
    """0.05 → '95 %'."""
    return f"{100 * (1 - level):.4g} %"


def interval_text(low: float | None, high: float | None, form: str = ".4f") -> str:
    return "-" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"


def outcome_text(verdict: Verdict) -> str:
    """The verdict in words."""
    if verdict.outcome == "equal":
        return f"equal within ±{verdict.margin:.4g}"
    if verdict.outcome in ("better", "worse"):
        return verdict.outcome + f" (by less than the margin, {verdict.margin:.4g})" * verdict.within_margin
    if verdict.outcome is None:
        return "no verdict"
    if verdict.needed is None:
        return "inconclusive"
    seeds = f"more than {MAX_SEEDS:,}" if verdict.needed > MAX_SEEDS else f"about {verdict.needed:,}"
    return f"inconclusive ({seeds} seeds would settle it)"


def ratio_text(ratio: Ratio, spend: str, level: float) -> str:
    """'18 % fewer tokens, 95 % [9, 27]'."""
    less, more = SPEND_WORDS[spend]
    sign = 1 if ratio.ratio <= 1 else -1
    text = f"{abs(100 * (1 - ratio.ratio)):.3g} % {less if sign > 0 else more}"
    if ratio.low is None or ratio.high is None:
        return text
    ends = sorted(sign * 100 * (1 - end) for end in (ratio.low, ratio.high))
    return f"{text}, {confidence(level)} [{ends[0]:.3g}, {ends[1]:.3g}]"


def worth_text(worth: Worth, level: float) -> str:
    """'needs 18 % fewer tokens, 95 % [9, 27]; …' for tokens, FLOPs and time, as far as they are known."""
    texts = [ratio_text(ratio, spend, level) for spend in SPEND_WORDS if (ratio := getattr(worth, spend)) is not None]
    return "needs " + "; ".join(texts) if texts else ""


def speed_text(speed: Ratio | None, level: float) -> str:
    """'0.97 × the tokens/s of the baseline, 95 % [0.95, 0.99]'."""
    if speed is None:
        return ""
    interval = f", {confidence(level)} {interval_text(speed.low, speed.high, '.3g')}" if speed.low is not None else ""
    return f"{speed.ratio:.3g} × the tokens/s of the baseline{interval}"


def pairing_text(ratio: float, seeds: int) -> str:
    """How much pairing by seed is worth."""
    return (f"pairing by seed: the variance of the differences is {ratio:.2g} × that of unpaired seeds, so that "
            f"{seeds} pairs tell as much as {seeds / ratio:.3g} unpaired seeds")


def regime_text(regime: Regime) -> str:
    """'4M tokens, 2M unique tokens (2 epochs), 1M parameters (4 tokens each)'."""
    amounts = {"tokens": regime.tokens, "unique tokens": regime.unique_tokens, "parameters": regime.parameters}
    texts = [f"{human_count(amount)} {name}" if amount else f"{name} not recorded" for name, amount in amounts.items()]
    if regime.epochs is not None:
        texts[1] += f" ({regime.epochs:.2g} epochs)"
    ratio = regime.tokens_per_parameter
    return ", ".join(texts) + (f" ({ratio:.3g} tokens each)" if ratio is not None else "")


def floor_text(floor: NoiseFloor, baseline: str, level: float) -> str:
    """The noise floor: how far runs of the baseline lie apart that differ in the seed alone."""
    where = f" at {cell_text(floor.size, floor.horizon)}" if floor.size or floor.horizon else ""
    if floor.std is None:
        text = f"noise floor (A/A) of {baseline}{where}: unknown, {floor.n} seed{'s' * (floor.n != 1)} (2 are needed)"
    else:
        text = (f"noise floor (A/A) of {baseline}{where}: std {floor.std:.2g} over {floor.n} seeds, "
                f"{confidence(level)} {interval_text(floor.low, floor.high, '.2g')}; two of its runs differ by "
                f"{2**0.5 * floor.std:.2g} (rms)")
    if floor.again:
        largest = max(abs(now - before) for before, now in floor.again)
        verdict = "" if floor.std is None else ", within the floor" if largest <= 2**0.5 * 2 * floor.std else \
            ", MORE THAN THE FLOOR: something else has changed"
        text += f"; run again with the same seed ({len(floor.again)}×): differs by {largest:.2g} at most{verdict}"
    return text


def header_text(judgement: Judgement) -> str:
    """Against what, by which test, at which level and margin."""
    n = sum(verdict.p is not None for verdict in judgement.verdicts)
    test = "sign flips" if judgement.test == "sign_flip" else "t"
    look = ("for one look at the study" if judgement.look is None
            else f"over all looks: {judgement.level_here:.3g} at look {judgement.look}")
    margin = (f"the margin of equality is ±{judgement.declared_margin:.4g}, declared"
              if judgement.declared_margin is not None else
              "the margin of equality is the noise floor, tested at its lower confidence bound")
    better = "more" if judgement.criterion.more_is_better else "less"
    return (f"against {judgement.baseline} by {judgement.criterion.metric} ({better} is better), paired by seed "
            f"({test}); level {judgement.level:g} {look}, adjusted for {n} verdict{'s' * (n != 1)} (Holm); {margin}")


def law_text(law: Law) -> str:
    """The law and how a worth follows from it."""
    return (f"{law.formula()} (D in tokens; {len(law.horizons)} horizons, {len(law.seeds)} seeds, residual "
            f"{law.residual:.2g}); tokens needed, relative to the baseline: (1 + difference / (L(D) - E))^(1/α), "
            f"α = {law.exponent:.4g}")


def effect_text(effect: Effect, level: float) -> str:
    names = " × ".join(f"{factor} {first} → {second}" for factor, (first, second) in effect.factors.items())
    label = "interaction" if len(effect.factors) > 1 else "main effect"
    p = "" if effect.p_adjusted is None else f", p {effect.p_adjusted:.2g} (Holm)"
    return (f"{label}: {names}: {effect.estimate.mean:+.4f}, {confidence(level)} "
            f"{interval_text(effect.estimate.low, effect.estimate.high, '+.4f')}, n={effect.estimate.n}{p}")


def counts_text(arm: Arm) -> str:
    """'4/5 diverged: 1' : finished seeds of planned ones, and what became of the others."""
    n = arm.estimate.n if arm.estimate else 0
    lost = {"diverged": len(arm.diverged), "failed": len(arm.failed), "missing": len(arm.missing),
            "unread": len(arm.unread)}
    planned = n + sum(lost.values())
    return " ".join([f"{n}/{planned}" if planned > n else f"{n}",
                     *(f"{word} {count}" for word, count in lost.items() if count)])


# ---- cells ----

class Line(NamedTuple):
    """An arm, with its verdict if it has one."""

    arm: Arm
    verdict: Verdict | None = None
    is_baseline: bool = False


def optional(form: str, value: Callable[[Line], float | None]) -> Callable[[Line], str]:
    return lambda line: "-" if (found := value(line)) is None else format(found, form)


CELLS: dict[str, Callable[[Line], str]] = {  # {header: text of a line}
    "variant": lambda line: line.arm.variant,
    "size": lambda line: line.arm.size,
    "horizon": lambda line: human_count(line.arm.horizon) if line.arm.horizon else "",
    "mean": optional(".4f", lambda line: line.arm.estimate.mean if line.arm.estimate else None),
    "interval": lambda line: interval_text(line.arm.estimate.low, line.arm.estimate.high) if line.arm.estimate else "-",
    "n": lambda line: counts_text(line.arm),
    "difference": optional("+.4f", lambda line: line.verdict.difference.mean
                           if line.verdict and line.verdict.difference else None),
    "its interval": lambda line: (interval_text(line.verdict.difference.low, line.verdict.difference.high, "+.4f")
                                  if line.verdict and line.verdict.difference else "-"),
    "p": optional(".2g", lambda line: line.verdict.p_adjusted if line.verdict else None),
    "verdict": lambda line: ("baseline" if line.is_baseline else "not judged" if line.verdict is None
                             else line.verdict.outcome or "no verdict"),
}
LEFT = ("variant", "size", "verdict")  # aligned to the left
UNJUDGED = ("variant", "mean", "interval", "n")  # columns where there is no baseline


def lines_of(judgement: Judgement) -> list[Line]:
    """The arms with their verdicts, by size and horizon, the baseline first, then by mean."""
    verdicts = {(v.variant, v.size, v.horizon): v for v in judgement.verdicts}
    cells = list(dict.fromkeys((arm.size, arm.horizon) for arm in judgement.arms))

    def order(arm: Arm) -> tuple[Any, ...]:
        return (cells.index((arm.size, arm.horizon)), arm.variant != judgement.baseline, arm.estimate is None,
                judgement.criterion.sort_key(arm.estimate.mean) if arm.estimate else 0, arm.variant)

    return [Line(arm, verdicts.get((arm.variant, arm.size, arm.horizon)), arm.variant == judgement.baseline)
            for arm in sorted(judgement.arms, key=order)]


def table_columns(lines: Sequence[Line], level: float, names: Sequence[str] = tuple(CELLS)) -> dict[str, list[str]]:
    """{header: cells}, without columns that are empty."""
    columns = {name: [CELLS[name](line) for line in lines] for name in names}
    labels = {"interval": confidence(level), "its interval": confidence(level) + " ", "p": "p (Holm)"}
    return {labels.get(name, name): cells for name, cells in columns.items() if any(cells)}


def aligned(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Columns as lines of text."""
    rows = [[header.strip() for header in columns], *zip(*columns.values(), strict=True)]
    return align_columns(rows, [i for i, header in enumerate(columns) if header in LEFT])


def detail_texts(line: Line, level: float) -> list[str]:
    """The lines below a verdict: what it means, its worth, its regime, and its notes."""
    verdict, regime = line.verdict, f"regime: {regime_text(line.arm.regime)}"
    if verdict is None:
        return [regime] * line.is_baseline
    worth = worth_text(verdict.worth, level)
    words = outcome_text(verdict)
    method = [f"by {verdict.method}"] if verdict.method and verdict.method not in ("paired t", "sign flips") else []
    speed = speed_text(verdict.speed, level)
    return [*([words] if words not in (verdict.outcome, "no verdict") else []), *([worth] if worth else []),
            *([speed] if speed else []), *method, *verdict.notes, regime]


def general_texts(judgement: Judgement) -> tuple[list[str], list[str]]:
    """(notes, warnings) that are not of one verdict: effects, laws, what the worth lacks, the front."""
    notes = [f"{cell_prefix(cell)}{effect_text(effect, judgement.level)}" for cell, effects in judgement.effects.items()
             for effect in effects]
    laws = dict.fromkeys(f"worth: the baseline's law{f' at {v.size}' if v.size else ''} is {law_text(v.worth.law)}"
                         for v in judgement.verdicts if v.worth.law)
    notes += [*laws, *dict.fromkeys(f"worth: {note}" for v in judgement.verdicts for note in v.worth.notes)]
    for cell, names in judgement.front.items():
        if names:
            notes.append(f"{cell_prefix(cell)}Pareto front of {judgement.criterion.metric}, tokens/s and memory: "
                         + ", ".join(names))
    if judgement.pairing:
        notes.append(pairing_text(judgement.pairing, max(len(v.differences) for v in judgement.verdicts)))
    if any(v.needed for v in judgement.verdicts):
        notes.append(f"seeds to settle a verdict: with power {POWER:g}, if the differences go on as observed")
    return notes + list(judgement.notes), list(judgement.warnings)


def cell_prefix(cell: Cell) -> str:
    return f"{cell_text(*cell)}: " if any(cell) else ""


# ---- formats ----

def arms_table(arms: Sequence[Arm], width: int, level: float = 0.05) -> list[str]:
    """Lines of the means over seeds, where there is no baseline."""
    columns = table_columns([Line(arm) for arm in arms], level, UNJUDGED)
    return aligned(fit(columns, width))


def fit(columns: dict[str, list[str]], width: int) -> dict[str, list[str]]:
    """The columns with the names of the variants shortened, so that a line has at most `width` characters."""
    used = sum(2 + max(map(len, [header.strip(), *cells])) for header, cells in columns.items() if header != "variant")
    return {**columns, "variant": [shorten_middle(name, max(12, width - used)) for name in columns["variant"]]}


def judgement_table(judgement: Judgement, width: int) -> str:
    """For the terminal: the noise floor and the header, then a line for each arm with its details below it."""
    def wrap(text: str, indent: str = "") -> list[str]:
        return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent + "  ",
                             break_on_hyphens=False)

    lines, level = lines_of(judgement), judgement.level
    header, *rows = aligned(fit(table_columns(lines, level), width))
    text = [row for floor in judgement.floors for row in wrap(floor_text(floor, judgement.baseline, level))]
    text += [*wrap(header_text(judgement)), "", header, "-" * max(map(len, (header, *rows)))]
    for line, row in zip(lines, rows, strict=True):
        text += [row, *(detail for words in detail_texts(line, level) for detail in wrap(words, "    "))]
    for label, messages in zip(("note", "warning"), general_texts(judgement), strict=True):
        text += [""] * bool(messages) + [row for message in messages for row in wrap(f"{label}: {message}")]
    return "\n".join(text)


def judgement_markdown(judgement: Judgement) -> str:
    """A table to paste."""
    lines = lines_of(judgement)
    columns = table_columns(lines, judgement.level)
    columns["verdict"] = [outcome_text(line.verdict) if line.verdict else cell
                          for line, cell in zip(lines, columns["verdict"], strict=True)]
    columns["worth"] = [worth_text(line.verdict.worth, judgement.level) if line.verdict else "" for line in lines]
    columns["speed"] = [speed_text(line.verdict.speed, judgement.level) if line.verdict else "" for line in lines]
    columns["regime"] = [regime_text(line.arm.regime) for line in lines]
    table = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    floors = [floor_text(floor, judgement.baseline, judgement.level) for floor in judgement.floors]
    rows = ["| " + " | ".join(cell.strip().replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([*(f"- {text}" for text in (*floors, header_text(judgement))), "", *rows, "",
                      *(f"- {text}" for text in all_notes(judgement))])


def all_notes(judgement: Judgement) -> list[str]:
    """Every note and warning, those of one verdict with its name."""
    notes, warnings = general_texts(judgement)
    own = [f"{v.variant}{f' at {v.size}' if v.size else ''}: {note}" for v in judgement.verdicts for note in v.notes]
    return [f"note: {text}" for text in own + notes] + [f"warning: {text}" for text in warnings]


def judgement_latex(judgement: Judgement) -> str:
    """A tabular for a paper (booktabs), with what the table rests on as comments."""
    columns = table_columns(lines_of(judgement), judgement.level)
    comments = [*(floor_text(floor, judgement.baseline, judgement.level) for floor in judgement.floors),
                header_text(judgement), *all_notes(judgement)]
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    return "\n".join([*(f"% {text}" for text in comments), latex_table(rows)])


def latex_table(rows: Sequence[Sequence[str]]) -> str:
    """A tabular (booktabs) of a header and its rows."""
    header, *lines = [" & ".join(cell.strip().translate(LATEX_ESCAPES) for cell in row) + " \\\\" for row in rows]
    return "\n".join([f"\\begin{{tabular}}{{{'l' * len(rows[0])}}}", "\\toprule", header, "\\midrule", *lines,
                      "\\bottomrule", "\\end{tabular}"])


def flat_record(line: Line) -> dict[str, Any]:
    """The numbers of an arm and its verdict in one row."""
    arm, verdict = line.arm, line.verdict
    own, difference = arm.estimate, verdict.difference if verdict else None
    ratios = {spend: getattr(verdict.worth, spend) if verdict else None for spend in SPEND_WORDS}
    return {
        "variant": arm.variant, "size": arm.size, "horizon": arm.horizon, "n": own.n if own else 0,
        **{name: getattr(own, name) if own else None for name in ("mean", "low", "high", "std")},
        **{name: len(getattr(arm, name)) for name in ("diverged", "failed", "missing", "unread")},
        "verdict": verdict.outcome if verdict else None,
        **{f"difference_{name}": getattr(difference, name) if difference else None
           for name in ("mean", "low", "high", "std", "n")},
        **{name: getattr(verdict, name) if verdict else None for name in (
            "method", "p", "p_adjusted", "p_equal", "p_equal_adjusted", "margin", "within_margin", "needed")},
        **{f"{spend}_{name}": getattr(ratio, name) if ratio else None
           for spend, ratio in ratios.items() for name in ("ratio", "low", "high")},
        **{f"speed_{name}": getattr(verdict.speed, name) if verdict and verdict.speed else None
           for name in ("ratio", "low", "high")},
        "tokens": arm.regime.tokens, "unique_tokens": arm.regime.unique_tokens, "epochs": arm.regime.epochs,
        "parameters": arm.regime.parameters, "tokens_per_parameter": arm.regime.tokens_per_parameter,
        "tokens_per_sec": arm.tokens_per_sec, "peak_memory": arm.peak_memory}


def judgement_csv(judgement: Judgement) -> str:
    """One row for each arm; notes and warnings are left out."""
    out = io.StringIO()
    records = list(map(flat_record, lines_of(judgement)))
    writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue().rstrip("\n")


def judgement_record(judgement: Judgement) -> dict[str, Any]:
    """A judgement as JSON has it."""
    def law_record(worth: Worth) -> dict[str, Any] | None:
        if worth.law is None:
            return None
        fields = {name: value for name, value in vars(worth.law).items() if name != "influence"}
        return {**fields, "formula": worth.law.formula()}

    def cells(by_cell: Mapping[Cell, Any]) -> list[dict[str, Any]]:
        return [{"size": size, "horizon": horizon, "of": value} for (size, horizon), value in by_cell.items() if value]

    def verdict_record(line: Line, verdict: Verdict) -> dict[str, Any]:
        return {**flat_record(line), "words": outcome_text(verdict), "law": law_record(verdict.worth),
                "worth": worth_text(verdict.worth, judgement.level), "worth_notes": verdict.worth.notes,
                "notes": verdict.notes, "differences": verdict.differences}

    lines = lines_of(judgement)
    effects = {cell: [{"factors": e.factors, **e.estimate._asdict(), "p": e.p, "p_adjusted": e.p_adjusted}
                      for e in found] for cell, found in judgement.effects.items()}
    return {"schema_version": SCHEMA_VERSION, "baseline": judgement.baseline,
            "criterion": judgement.criterion._asdict(), "test": judgement.test, "level": judgement.level,
            "look": judgement.look, "level_here": judgement.level_here, "declared_margin": judgement.declared_margin,
            "arms": list(map(arm_record, (line.arm for line in lines))),
            "verdicts": [verdict_record(line, line.verdict) for line in lines if line.verdict],
            "floors": [floor._asdict() for floor in judgement.floors], "effects": cells(effects),
            "front": cells(judgement.front), "pairing": judgement.pairing, "notes": judgement.notes,
            "warnings": judgement.warnings}


def arm_record(arm: Arm) -> dict[str, Any]:
    """An arm as JSON has it."""
    return {"variant": arm.variant, "size": arm.size, "horizon": arm.horizon,
            "estimate": arm.estimate._asdict() if arm.estimate else None, "values": arm.values,
            "diverged": arm.diverged, "failed": arm.failed, "missing": arm.missing, "unread": arm.unread,
            "tokens_per_sec": arm.tokens_per_sec, "peak_memory": arm.peak_memory,
            "flops_per_token": arm.flops_per_token, "regime": {**arm.regime._asdict(), "epochs": arm.regime.epochs,
                                                               "tokens_per_parameter": arm.regime.tokens_per_parameter}}


def render_judgement(judgement: Judgement, format: str = "table", width: int = 120) -> str:
    """A judgement in one of table, md, csv, json, latex."""
    if format == "table":
        return judgement_table(judgement, width)
    if format == "json":
        return json.dumps(judgement_record(judgement), indent=2)
    return {"md": judgement_markdown, "csv": judgement_csv, "latex": judgement_latex}[format](judgement)
