"""model_init: initial weights, and that muP keeps the effect of a step the same at every width."""

import math

import pytest
import torch
from parity import config, equal

from blockgpt.training.optimizers import build_optimizer, set_learning_rate
from model_builder import build_model
from model_config import get_preset

WIDTHS = (64, 128, 256, 512)


class RunConfig:  # the keys that build_optimizer reads
    learning_rate, weight_decay, beta1, beta2, use_zero1 = 1e-2, 0.0, 0.9, 0.95, False


def change(width, seed, **overrides):
    """Root mean square change of the logits by four AdamW steps, in a model of this width."""
    config = get_preset("llama", n_layer=2, n_head=4, n_embd=width, vocab_size=64, block_size=16, mup_base_width=64,
                        ffn_multiple_of=1, **overrides)
    model = build_model(config, seed)
    optimizer = build_optimizer(model, RunConfig, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(0, 64, (4, 17), generator=generator)
    with torch.no_grad():
        before = model(idx[:, :-1])[0]
    for _ in range(4):
        set_learning_rate(optimizer, RunConfig.learning_rate)
        optimizer.zero_grad()
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
    with torch.no_grad():
        return (model(idx[:, :-1])[0] - before).square().mean().sqrt().item()


def growth(**overrides):
    """The exponent of the width in that change, fitted over WIDTHS."""
    x = torch.tensor([math.log(w) for w in WIDTHS])
    y = torch.tensor([math.log(sum(change(w, seed, **overrides) for seed in (1, 2)) / 2) for w in WIDTHS])
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x * x).sum()).item()


@pytest.mark.parametrize("tied", [False, True])
def test_coordinate_check(tied):
    """Yang et al. 2022, appendix D: with muP the change of the logits by a step does not grow with the width."""
    assert abs(growth(init="mup", weight_tying=tied)) < 0.25
    assert growth(init="gpt2", weight_tying=tied) > 0.4


def test_mup_at_its_base_width_is_initialised_as_gpt2():
    shape = dict(n_layer=2, n_head=4, n_embd=64, vocab_size=64, block_size=16)
    mup, gpt2 = (build_model(get_preset("llama", **shape, **o)) for o in (dict(init="mup", mup_base_width=64), {}))
    for (name, p), q in zip(mup.named_parameters(), gpt2.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert set(mup.lr_multipliers().values()) == {1.0}
    assert mup.lm_head.scale == 1.0


def test_mup_s_multipliers_set_the_lr_of_each_role_and_not_its_decay():
    model = build_model(get_preset("gpt2_openai", n_layer=2, n_head=4, n_embd=64, vocab_size=64, block_size=16,
                                   init="mup", mup_base_width=16, weight_tying=False, value_embeddings=1, x0_mix=True))

    class Decaying(RunConfig):
        weight_decay = 0.1

    optimizer = build_optimizer(model, Decaying, torch.device("cpu"))
    set_learning_rate(optimizer, 1.0)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(group_of) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        group = group_of[id(p)]
        in_block = p.dim() >= 2 and ("attn." in name or "ffn." in name)
        assert group["lr"] == (0.25 if in_block else 1.0), name
        assert math.isclose(group["lr"] * group["weight_decay"], 0.1 if p.dim() >= 2 else 0.0), name


def test_mup_is_table_8_of_its_paper():
    """Tensor Programs V, table 8, for Adam: variances of hidden weights 1/fan_in, their rates 1/fan_in, logits
    1/width, scores 1/head_dim, all relative to the base width; embeddings and vectors as they are."""
    keys = dict(n_head=8, n_embd=256, vocab_size=512, block_size=256, init="mup", init_std=0.03, weight_tying=False)
    wide, base = (build_model(config(**keys, mup_base_width=w)) for w in (64, 256))
    plain = build_model(config(**{**keys, "init": "gpt2"}))
    multipliers = wide.lr_multipliers()
    assert set(base.lr_multipliers().values()) == {1.0}
    for (name, w), b, p in zip(wide.named_parameters(), base.parameters(), plain.parameters(), strict=True):
        assert torch.equal(b, p), name
        hidden = "_proj.weight" in name
        assert multipliers[name] == (0.25 if hidden else 1.0), name
        torch.testing.assert_close(w, b * (0.5 if hidden else 1.0), msg=name)
    x = torch.randn(3, 256)
    torch.testing.assert_close(wide.lm_head(x), x @ wide.lm_head.weight.T / 4)
    torch.testing.assert_close(base.lm_head(x), x @ base.lm_head.weight.T)
    assert wide.blocks[0].attn.scale == base.blocks[0].attn.scale == 1 / 32
    assert plain.blocks[0].attn.scale == 32**-0.5


def test_gpt2_and_normal_initialisation_have_their_standard_deviations():
    keys = dict(n_layer=3, n_embd=256, vocab_size=512, block_size=256, init_std=0.05)
    for init, residual in (("gpt2", 0.05 / 6**0.5), ("normal", 0.05)):
        for name, p in build_model(config(**keys, init=init)).named_parameters():
            if p.dim() == 2:  # tens of thousands of draws
                expected = residual if "o_proj" in name or "down_proj" in name else 0.05
                assert abs(p.std().item() / expected - 1) < 0.03, (init, name)


def test_zero_init_makes_every_initial_block_the_identity():
    for init in ("gpt2", "normal", "mup"):
        m = build_model(config(zero_init_residual=True, init=init, mup_base_width=12)).double()
        idx = torch.arange(24)[None]
        x = m.position.embed(m.token_embedding(idx), torch.arange(24))
        equal(m(idx)[0], m.lm_head(m.final_norm(x)))
