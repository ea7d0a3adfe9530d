"""model_init: what starts where, and that muP keeps what a step changes the same at every width."""

import math

import pytest
import torch

from blockgpt.training.optimizers import build_optimizer, set_learning_rate
from model_builder import build_model
from model_config import get_preset

WIDTHS = (64, 128, 256, 512)


class Run:  # of a configuration, what build_optimizer reads
    learning_rate, weight_decay, beta1, beta2, use_zero1 = 1e-2, 0.0, 0.9, 0.95, False


def change(width, seed, **overrides):
    """Root mean square of what four steps of AdamW change in the logits of a model so wide."""
    config = get_preset("llama", n_layer=2, n_head=4, n_embd=width, vocab_size=64, block_size=16, mup_base_width=64,
                        ffn_multiple_of=1, **overrides)
    model = build_model(config, seed)
    optimizer = build_optimizer(model, Run, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(0, 64, (4, 17), generator=generator)
    with torch.no_grad():
        before = model(idx[:, :-1])[0]
    for _ in range(4):
        set_learning_rate(optimizer, Run.learning_rate)
        optimizer.zero_grad()
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
    with torch.no_grad():
        return (model(idx[:, :-1])[0] - before).square().mean().sqrt().item()


def growth(**overrides):
    """The power of the width with which that change grows, fitted over WIDTHS."""
    x = torch.tensor([math.log(w) for w in WIDTHS])
    y = torch.tensor([math.log(sum(change(w, seed, **overrides) for seed in (1, 2)) / 2) for w in WIDTHS])
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x * x).sum()).item()


@pytest.mark.parametrize("tied", [False, True])
def test_coordinate_check(tied):
    """The check of Yang et al. 2022, appendix D: with muP a step moves the logits alike at every width, else more."""
    assert abs(growth(init="mup", weight_tying=tied)) < 0.25
    assert growth(init="gpt2", weight_tying=tied) > 0.4


def test_mup_at_its_base_width_starts_as_gpt2():
    shape = dict(n_layer=2, n_head=4, n_embd=64, vocab_size=64, block_size=16)
    mup, gpt2 = (build_model(get_preset("llama", **shape, **o)) for o in (dict(init="mup", mup_base_width=64), {}))
    for (name, p), q in zip(mup.named_parameters(), gpt2.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert set(mup.lr_multipliers().values()) == {1.0}
    assert mup.lm_head.scale == 1.0


def test_mups_multipliers_reach_the_optimizer_by_part_and_keep_the_decay():
    model = build_model(get_preset("gpt2_openai", n_layer=2, n_head=4, n_embd=64, vocab_size=64, block_size=16,
                                   init="mup", mup_base_width=16, weight_tying=False, value_embeddings=1, x0_mix=True))

    class Decaying(Run):
        weight_decay = 0.1

    optimizer = build_optimizer(model, Decaying, torch.device("cpu"))
    set_learning_rate(optimizer, 1.0)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(group_of) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        group = group_of[id(p)]
        matrix_inside = p.dim() >= 2 and ("attn." in name or "ffn." in name)
        assert group["lr"] == (0.25 if matrix_inside else 1.0), name
        assert math.isclose(group["lr"] * group["weight_decay"], 0.1 if p.dim() >= 2 else 0.0), name


def test_zero_init_leaves_the_stream_as_the_embeddings_made_it():
    model = build_model(get_preset("llama", n_layer=2, n_head=4, n_embd=64, vocab_size=64, block_size=16,
                                   zero_init_residual=True))
    idx = torch.arange(16)[None]
    expected = model.lm_head(model.final_norm(model.token_embedding(idx)))
    assert torch.equal(model(idx)[0], expected)
