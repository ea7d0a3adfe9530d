"""Architectures to test with: a covering array over the whole option space, every pair of values somewhere together."""

import itertools
import random

from blockgpt.errors import ConfigError
from model_config import AXES, ModelConfig

TINY = dict(n_layer=3, n_head=4, n_embd=32, vocab_size=48, block_size=12, mup_base_width=16)

FLAGS = {
    "bias": (False, True), "qkv_bias": (None, True), "weight_tying": (False, True), "dropout": (0.0, 0.1),
    "n_kv_head": (None, 1, 2), "head_dim": (None, 12), "d_ff": (None, 40), "ffn_multiple_of": (None, 48),
    "rope_fraction": (1.0, 0.5), "rope_theta_local": (None, 500.0), "rope_scaling_factor": (1.0, 4.0),
    "attn_scale": (None, 0.3), "attn_softcap": (None, 5.0), "logit_softcap": (None, 3.0),
    "sliding_window": (None, 1, 5, 100), "window_pattern": ("S", "SL", "LLS"), "causal": (True, False),
    "mask_documents": (False, True), "embedding_scale": (1.0, "sqrt", 0.5), "embedding_norm": (False, True),
    "residual_scale": (1.0, 0.5), "x0_mix": (False, True), "value_embeddings": (0, 1),
    "zero_init_residual": (False, True),
}
SPACE = {**{axis: tuple(table) for axis, table in AXES.items()}, "activation": (None, *AXES["activation"]), **FLAGS}


def builds(chosen):
    """Whether this combination is one that the configuration accepts."""
    try:
        ModelConfig(**TINY | chosen)
    except ConfigError:
        return False
    return True


def covering(space=None, at_least=1, seed=0, **fixed):
    """([combinations], {pairs that no combination has}): all that build, and every pair that can stand together does.

    space: {key: its values}, the whole by default; fixed: values that all of them have.
    """
    space, rng = space or SPACE, random.Random(seed)
    uncovered = {((a, x), (b, y)): None for a, b in itertools.combinations(space, 2)
                 for x in space[a] for y in space[b]}  # a dict: every test worker must meet them in one order
    found, impossible = [], set()

    def draw(pair):
        for _ in range(500):
            chosen = {key: rng.choice(values) for key, values in space.items()} | dict(pair)
            if builds(chosen | fixed):
                return chosen
        return None

    while uncovered or len(found) < at_least:
        pair = next(iter(uncovered), ())
        chosen = draw(pair)
        if chosen is None:
            impossible.add(pair)
            del uncovered[pair]
            continue
        found.append(chosen | fixed)
        for together in itertools.combinations(chosen.items(), 2):
            uncovered.pop(together, None)
    return found, impossible


def name(chosen):
    """A short name for a test's parameter: what is not the first value of its key."""
    return "-".join(str(v) for k, v in chosen.items() if k not in SPACE or v != SPACE[k][0]) or "plain"
