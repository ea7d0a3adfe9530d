"""Every rule of every family, broken, is caught by one of the family's checkpoints: mutations.py."""

import mutations
import pytest
from conftest import ROOT

from blockgpt.huggingface.families import FAMILIES

# Kinds that some families cannot have: no fused tensor, no component to exchange, no RoPE, no window.
ANY = {"exchange", "norms", "component", "key"}
WINDOWS = {"mistral", "ministral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo3", "smollm3", "starcoder2", "phi3"}
EXPECTED = {
    "layout": {"gpt2", "gpt_neox", "bloom", "falcon", "cohere", "phi3", "opt"},
    "order": {"gpt2", "gpt_neox", "bloom", "falcon", "phi3"},
    "RoPE": FAMILIES.keys() - {"gpt2", "bloom", "opt"},
    "window": WINDOWS,
}


@pytest.mark.grid(6)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_mutation_of_each_kind_is_caught(family):
    kinds = {kind for kind, n in mutations.counts(family).items() if n}
    assert kinds == ANY | {kind for kind, families in EXPECTED.items() if family in families}
    survivors = [what for _, what, caught in mutations.outcomes(family, only_first=True) if caught is None]
    assert not survivors


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rule_that_is_broken_is_caught(family):
    assert not [what for _, what, caught in mutations.outcomes(family) if caught is None]


def test_no_rule_is_without_a_mutation():
    for name, family in FAMILIES.items():
        broken = " ".join(what for mutate in mutations.KINDS.values() for what, _ in mutate(family))
        named = [*(rule.theirs for rule in family.tensors), *(key for rule in family.keys for key in rule.defaults)]
        assert not [rule for rule in named if rule not in broken], name
        assert not [key for key in family.components if f"{key}=" not in broken], name


def test_the_table_in_the_docs_counts_the_mutations():
    docs = (ROOT / "docs/HUGGING_FACE.md").read_text()
    assert not [row for family in FAMILIES if (row := mutations.row(family, mutations.counts(family))) not in docs]
