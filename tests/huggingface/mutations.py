"""Every rule of every family broken in turn, and the tiny checkpoint that notices it.

    python tests/huggingface/mutations.py              the table of docs/HUGGING_FACE.md: families × kinds of mutations
    python tests/huggingface/mutations.py llama opt    each mutation of these families, and what catches it

A kind of mutation is a function here: a family -> (what is wrong, the family with that rule broken). A mutation is
caught if one of the family's checkpoints is refused, or is a model with other logits.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tiny_checkpoints as tiny
import torch

from blockgpt.errors import UserError
from blockgpt.huggingface import read, rules
from blockgpt.huggingface.families import FAMILIES, LLAMA3, YARN
from blockgpt.huggingface.rules import Family
from model_config import AXES

Mutations = Iterator[tuple[str, Family]]


def with_tensors(family: Family, changes: dict[int, rules.TensorRule]) -> Family:
    """The family with other rules at some places of its table of tensors."""
    return dataclasses.replace(family, tensors=tuple(changes.get(i, rule) for i, rule in enumerate(family.tensors)))


def with_key_rule(family: Family, index: int, read_rule: Any) -> Family:
    """The family whose rule of keys at `index` reads a config.json in another way."""
    rule = dataclasses.replace(family.keys[index], read=read_rule)
    return dataclasses.replace(family, keys=(*family.keys[:index], rule, *family.keys[index + 1:]))


# ---------------------------------------------------------------- kinds


def layouts(family: Family) -> Mutations:
    """A layout forgotten: matrices not transposed, pairs not permuted, rows not skipped."""
    for i, rule in enumerate(family.tensors):
        plain = rules.Stacked() if isinstance(rule.layout, rules.Grouped) else rules.Layout()
        if type(rule.layout) is not rules.Layout and getattr(rule.layout, "offset", 1):  # 0: all rows, as they are
            yield f"{rule.theirs} without its layout", with_tensors(family, {i: rule._replace(layout=plain)})


def orders(family: Family) -> Mutations:
    """The parts of a fused tensor in another order."""
    for i, rule in enumerate(family.tensors):
        if len(rule.ours) > 1:
            ours = (rule.ours[1], rule.ours[0], *rule.ours[2:])
            yield f"{rule.theirs} in another order", with_tensors(family, {i: rule._replace(ours=ours)})


def exchange(family: Family, i: int, j: int) -> tuple[str, Family]:
    """Two tensors exchanged."""
    a, b = family.tensors[i], family.tensors[j]
    return (f"{a.theirs} and {b.theirs} exchanged",
            with_tensors(family, {i: a._replace(ours=b.ours), j: b._replace(ours=a.ours)}))


def exchanges(family: Family) -> Mutations:
    """Each tensor exchanged with another one."""
    for i, rule in enumerate(family.tensors):
        if len(rule.ours) == 1:
            indices = [*range(i + 1, len(family.tensors)), *range(i)]
            indices.sort(key=lambda j, when=rule.when: family.tensors[j].when != when)  # one that the same models have
            yield exchange(family, i, next(j for j in indices if len(family.tensors[j].ours) == 1
                                           and family.tensors[j].ours != rule.ours))


def norms(family: Family) -> Mutations:
    """Each pair of norms exchanged; they have the same shapes, so that only the logits can show it."""
    at = [i for i, rule in enumerate(family.tensors) if "norm" in rule.ours[0].rpartition(".")[2]]
    for n, i in enumerate(at):
        for j in at[n + 1:]:
            a, b = family.tensors[i], family.tensors[j]
            if a.when == b.when or not a.when or not b.when:
                yield exchange(family, i, j)


def components(family: Family) -> Mutations:
    """Each component exchanged for every other one: the norm without its + 1, no rotation, another place of norms."""
    for name, value in family.components.items():
        others: list[Any] = ([other for other in AXES[name] if other != value] if name in AXES else
                             [not value] if isinstance(value, bool) else [1.0 if isinstance(value, str) else 2 * value])
        for other in others:
            changed = {**family.components, name: other}
            if name == "ffn_type":
                changed.pop("activation", None)
            yield f"{name}={other}", dataclasses.replace(family, components=changed)


def keys(family: Family) -> Mutations:
    """Each key not read: its default, whatever config.json says."""
    for i, rule in enumerate(family.keys):
        for key, default in rule.defaults.items():
            def not_read(t, rule=rule, key=key, default=default):
                return rule.read({**t, key: default})

            yield key, with_key_rule(family, i, not_read)


def rope_values(family: Family) -> Mutations:
    """Each value within rope_parameters not read, of those that the family's checkpoints have."""
    constants = {*YARN, *LLAMA3}  # other values of these are refused: test_read.py
    index = next((i for i, rule in enumerate(family.keys) if "rope_parameters" in rule.defaults), None)
    found = [c["rope_parameters"] for c in tiny.CHECKPOINTS[family.model_type].values() if "rope_parameters" in c]
    flat = [parameters for p in found for parameters in (p.values() if "full_attention" in p else (p,))]
    if all(parameters["rope_type"] == "default" for parameters in flat):
        constants.add("rope_type")  # it is what is read without it
    for name in sorted({name for parameters in flat for name in parameters} - constants) if index is not None else ():
        def without(value, name=name):
            return {k: without(v) if isinstance(v, dict) else v for k, v in (value or {}).items() if k != name}

        def not_read(t, rule=family.keys[index], without=without):
            return rule.read({**t, "rope_parameters": without(t["rope_parameters"])})

        yield f"rope_parameters: {name}", with_key_rule(family, index, not_read)


def windows(family: Family) -> Mutations:
    """The wrong window: in one layer, and one token too long."""
    for i, rule in enumerate(family.keys):
        if "sliding_window" not in rule.defaults:
            continue

        def one_layer(t, rule=rule):
            ours = rule.read(t)
            n = t["num_hidden_layers"]
            letters = (ours["window_pattern"] * n)[:n]
            return {**ours, "window_pattern": letters[:-1] + ("L" if letters[-1] == "S" else "S")}

        def longer(t, rule=rule):
            ours = rule.read(t)
            return {**ours, "sliding_window": ours["sliding_window"] and ours["sliding_window"] + 1}

        yield "the wrong window in the last layer", with_key_rule(family, i, one_layer)
        yield "a window one token longer", with_key_rule(family, i, longer)


KINDS = {"layout": layouts, "order": orders, "exchange": exchanges, "norms": norms, "component": components,
         "key": keys, "RoPE": rope_values, "window": windows}

# Keys that change nothing with the values that transformers itself accepts.
WITHOUT_EFFECT = {
    ("bloom", "seq_length"): "the context of the file; BLOOM has no largest position",
    ("phi3", "original_max_position_embeddings"): "transformers reads it for longrope only, which is refused",
    **{(family, "max_window_layers"): "transformers 5 writes layer_types, which list the layers with a window"
       for family in ("qwen2", "qwen3", "smollm3")},
}


# ---------------------------------------------------------------- what catches them


class Sources:
    """The checkpoints of a family, saved once, with their logits. Made and used within `tiny.in_float64`."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder = FAMILIES[family], folder
        self.entries: list[tuple[str, Path, torch.Tensor, int]] = []
        for i, name in enumerate(tiny.CHECKPOINTS[family]):
            model = tiny.reference_model(family, name)
            with torch.no_grad():
                logits = model(tiny.tokens()).logits
            context = 2048 if family == "bloom" else model.config.max_position_embeddings
            self.entries.append((name, tiny.save(model, folder / str(i)), logits, context))

    def catches(self, mutant: Family) -> str | None:
        """The checkpoint that is refused, or another model, under the rules of `mutant`; None if all are as before."""
        FAMILIES[self.family.model_type] = mutant
        try:
            for name, directory, logits, context in self.entries:
                try:
                    model, _ = tiny.load(directory)
                    with torch.no_grad():
                        found = tiny.difference(model(tiny.tokens()), logits)
                    if model.config.block_size != context or not found < 1e-7:
                        return f"{name}: other logits"
                except (UserError, RuntimeError, IndexError, ValueError, TypeError, AssertionError) as error:
                    return f"{name}: {type(error).__name__}"
        finally:
            FAMILIES[self.family.model_type] = self.family
        return None

    def catches_key(self, key: str, mutant: Family) -> str | None:
        """The same for a key that is not read.

        Where no checkpoint has another value than the default, another value must be refused, or be another model.
        """
        if (self.family.model_type, key) in WITHOUT_EFFECT:
            return WITHOUT_EFFECT[self.family.model_type, key]
        if caught := self.catches(mutant):
            return caught
        default = self.family.defaults[key]
        wrong = (not default if isinstance(default, bool) else "nonsense" if not isinstance(default, (int, float))
                 else 2 if default == 1 else 1)
        try:
            found = read.architecture(with_value(self.entries[0][1], self.folder / f"{key}={wrong}", **{key: wrong}))
        except UserError:
            return f"{key}={wrong}: refused"
        same = found[0] == read.architecture(with_value(self.entries[0][1], self.folder / f"{key} unset"))[0]
        return None if same else f"{key}={wrong}: another model"


def with_value(directory: Path, folder: Path, **values: Any) -> Path:
    """A folder whose config.json has other values, and nothing that transformers 5 derives from such keys."""
    folder.mkdir()
    config = json.loads((directory / "config.json").read_text())
    derived = ("rope_parameters", "layer_types", "_sliding_window_pattern", "no_rope_layers")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in derived} | values))
    return folder


def outcomes(family: str, kinds: tuple[str, ...] = tuple(KINDS), only_first: bool = False
             ) -> Iterator[tuple[str, str, str | None]]:
    """(kind, what is wrong, what catches it or None) of a family's mutations, of each kind the first or all."""
    with tempfile.TemporaryDirectory() as folder, tiny.in_float64():
        sources = Sources(family, Path(folder))
        assert sources.catches(sources.family) is None  # nothing is wrong before
        for kind in kinds:
            for what, mutant in KINDS[kind](sources.family):
                yield kind, what, (sources.catches_key(what, mutant) if kind == "key" else sources.catches(mutant))
                if only_first:
                    break


def counts(family: str) -> dict[str, int]:
    """{kind: number of mutations} of a family."""
    return {kind: len(list(mutations(FAMILIES[family]))) for kind, mutations in KINDS.items()}


def row(family: str, numbers: dict[str, int]) -> str:
    """A family's line of the table."""
    return f"| {family} | {' | '.join(str(n) if n else '–' for n in numbers.values())} |"


def main(families: list[str]) -> None:
    if not families:
        print(f"| model_type | {' | '.join(KINDS)} |\n{'|---' * (len(KINDS) + 1)}|")
    for family in families or FAMILIES:
        found = list(outcomes(family))
        if families:
            print("\n".join(f"{family}: {kind}: {what}: {caught or 'NOT CAUGHT'}" for kind, what, caught in found))
            continue
        missed = [what for _, what, caught in found if caught is None]
        print(f"{family}: NOT CAUGHT: {'; '.join(missed)}" if missed else row(family, counts(family)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
