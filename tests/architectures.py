"""Architectures to test with: a covering array over the whole option space, in which every pair of values occurs."""

import itertools
import random
from typing import Any

from blockgpt.errors import ConfigError
from model_config import AXES, ModelConfig, example_values

TINY: dict[str, Any] = dict(n_layer=3, n_head=4, n_embd=32, vocab_size=48, block_size=12, mup_base_width=16)

# Values besides the default and the example: windows inside these short sequences, grouped heads, a third pattern.
EDGE_CASES = {"sliding_window": (1, 5), "n_kv_head": (2,), "window_pattern": ("LLS",), "embedding_scale": (0.5,)}
SPACE: dict[str, tuple[Any, ...]] = {key: values + EDGE_CASES.get(key, ()) for key, values in example_values().items()
                                     if key not in TINY and key != "arch_preset"}
SPACE["activation"] = (None, *AXES["activation"])
SPACE["head_dim"] = (None, 12)  # the example, 128, is too wide for so many models

Choice = dict[str, Any]
Pair = tuple[tuple[str, Any], ...]  # two (key, value)


def builds(choice: Choice) -> bool:
    """Whether the configuration accepts this combination."""
    try:
        ModelConfig(**TINY | choice)
    except ConfigError:
        return False
    return True


def covering(space: dict[str, tuple[Any, ...]] | None = None, at_least: int = 1, at_most: int | None = None,
             seed: int = 0, **fixed: Any) -> tuple[list[Choice], set[Pair]]:
    """(combinations that build, pairs that no combination contains). Every other pair is in some combination.

    Args:
        space: {key: its values}; all keys by default.
        at_least: this many combinations.
        at_most: no more, though pairs are left.
        seed: of the random choice.
        fixed: values in every combination.
    """
    space, rng = space or SPACE, random.Random(seed)
    uncovered: dict[Pair, None] = {((a, x), (b, y)): None for a, b in itertools.combinations(space, 2)
                 for x in space[a] for y in space[b]}  # a dict: every test worker must see them in the same order
    found: list[Choice] = []
    impossible: set[Pair] = set()

    def draw(pair: Pair) -> Choice | None:
        for _ in range(500):
            choice = {key: rng.choice(values) for key, values in space.items()} | dict(pair)
            if builds(choice | fixed):
                return choice
        return None

    while (uncovered or len(found) < at_least) and len(found) != at_most:
        pair: Pair = next(iter(uncovered), ())
        choice = draw(pair)
        if choice is None:
            impossible.add(pair)
            del uncovered[pair]
            continue
        found.append(choice | fixed)
        for covered in itertools.combinations(choice.items(), 2):
            uncovered.pop(covered, None)
    return found, impossible


def name(choice: Choice) -> str:
    """A short name for a test's parameter: the values that are not the first of their key."""
    return "-".join(str(v) for k, v in choice.items() if k not in SPACE or v != SPACE[k][0]) or "plain"


def count_parameters(config: ModelConfig) -> int:
    """The parameters of a model, by formula from the config alone."""
    c = config.resolve()
    assert c.head_dim and c.n_kv_head and c.d_ff  # resolved
    queries, keys, qkv_bias = c.n_head * c.head_dim, c.n_kv_head * c.head_dim, bool(c.qkv_bias)

    def norm(dim: int) -> int:
        return {"layernorm": 2 * dim, "dyt": 2 * dim + 1}.get(c.normalization, dim)

    def linear(fan_in: int, fan_out: int, bias: bool) -> int:
        return fan_in * fan_out + bias * fan_out

    matrices_in = 1 if c.ffn_type == "standard" else 2
    gate_width = {"none": 0, "headwise": c.n_head, "elementwise": queries}[c.attn_gate]
    norms_per_residual = 2 if c.norm_position == "sandwich" else 1
    residuals = 1 if c.parallel_block == "one_norm" else 2
    block = (linear(c.n_embd, queries, qkv_bias) + 2 * linear(c.n_embd, keys, qkv_bias)
             + linear(queries, c.n_embd, c.bias) + linear(c.n_embd, gate_width, c.bias)
             + {"none": 0, "head": 2 * norm(c.head_dim), "projection": norm(queries) + norm(keys)}[c.qk_norm]
             + matrices_in * linear(c.n_embd, c.d_ff, c.bias) + linear(c.d_ff, c.n_embd, c.bias)
             + residuals * norms_per_residual * norm(c.n_embd) + 2 * c.x0_mix)
    layers_with_values = min(2 * c.value_embeddings, c.n_layer)
    return (c.vocab_size * c.n_embd * (1 if c.weight_tying else 2) + c.vocab_size * c.head_bias
            + (c.block_size * c.n_embd if c.position_encoding == "learned_absolute" else 0)
            + c.embedding_norm * norm(c.n_embd)
            + c.value_embeddings * c.vocab_size * keys + layers_with_values * 2
            + c.n_layer * block
            + (0 if c.norm_position == "post" else norm(c.n_embd)))
