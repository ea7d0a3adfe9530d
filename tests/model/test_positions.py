"""model_positions: position encodings and RoPE's scalings against transformers and the papers' formulas."""

import itertools
import math

import pytest
import torch
from parity import config, draw, equal, equal_with_gradients, randomised
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from model_components import component
from model_config import POSITION_ENCODING, ROPE_SCALING
from model_positions import apply_rotary_emb


def position(**keys):
    c = config(**keys)
    return component("position_encoding", c)(c)


def rope(**keys):
    return position(position_encoding="rope", **keys)


# ---------------------------------------------------------------- on the embeddings


@pytest.mark.parametrize("C, T, start", [(48, 24, 0), (48, 1, 23), (7, 24, 0), (1, 3, 5), (2, 1, 0)])
def test_sinusoidal_positions_are_the_paper_s(C, T, start):
    """Vaswani et al. 2017, section 3.5: PE(p, 2i) = sin(p / 10000^(2i/C)), PE(p, 2i + 1) = cos of the same."""
    x, encoding = draw(2, T, C), position(position_encoding="sinusoidal", n_embd=C, n_head=1)
    waves = torch.zeros(T, C, dtype=torch.float64)
    for t, c in itertools.product(range(T), range(C)):
        angle = (start + t) / 10000 ** ((c - c % 2) / C)
        waves[t, c] = math.cos(angle) if c % 2 else math.sin(angle)
    # our angles are float32
    equal_with_gradients(encoding.embed(x, torch.arange(start, start + T)), x + waves, x, rtol=1e-5, atol=1e-5)
    assert not list(encoding.parameters())


def test_learned_positions_are_rows_of_a_table():
    learned, x = randomised(position(position_encoding="learned_absolute", block_size=10)), draw(2, 3, 48)
    table = learned.embedding.weight
    assert table.shape == (10, 48)
    equal_with_gradients(learned.embed(x, torch.tensor([7, 8, 9])), x + table[7:10], x, table)


@pytest.mark.parametrize("name", POSITION_ENCODING)
def test_a_position_encoding_acts_at_one_point(name):
    encoding, x = position(position_encoding=name), draw(1, 6, 48)
    q, k, positions = draw(1, 4, 6, 12), draw(1, 4, 6, 12, seed=1), torch.arange(1, 7)
    if name == "learned_absolute":
        randomised(encoding)
    embeds = not torch.equal(encoding.embed(x, positions), x)
    rotated = apply_rotary_emb(q, k, encoding.cos_sin(positions, None))
    rotates = not (torch.equal(rotated[0], q) and torch.equal(rotated[1], k))
    biases = encoding.alibi_slopes() is not None
    point = {"learned_absolute": 0, "sinusoidal": 0, "rope": 1, "alibi": 2, "none": None}[name]
    assert [embeds, rotates, biases] == [point == i for i in range(3)]


# ---------------------------------------------------------------- on the scores


def test_alibi_slopes_are_the_published_ones():
    eight = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    between = [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]  # of 16 heads every other one, as the authors' code has it
    for n, alibi_slopes in {8: eight, 12: eight + between, 4: [1 / 4, 1 / 16, 1 / 64, 1 / 256], 1: [1 / 256],
                      2: [1 / 16, 1 / 256], 3: [1 / 16, 1 / 256, 1 / 4]}.items():
        torch.testing.assert_close(position(position_encoding="alibi", n_head=n, head_dim=4).alibi_slopes(),
                                   torch.tensor(alibi_slopes))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8, 12, 16, 20, 31, 32, 33, 112])
def test_alibi_slopes_are_transformers(n):
    alibi_slopes = position(position_encoding="alibi", n_head=n, head_dim=4).alibi_slopes()
    expected = build_alibi_tensor(torch.ones(1, 2), n, torch.float32)[:, 0, 1]  # at position one
    torch.testing.assert_close(alibi_slopes, expected)
    assert alibi_slopes.dtype == torch.float32 and len(alibi_slopes) == n


# ---------------------------------------------------------------- on queries and keys


def reference_frequencies(scaling, factor, original, theta, head_dim, fraction):
    """(frequencies, factor on cos and sin) by transformers."""
    parameters = dict(rope_type=scaling, rope_theta=theta, factor=factor, partial_rotary_factor=fraction,
                      original_max_position_embeddings=original, low_freq_factor=1.0, high_freq_factor=4.0)
    if scaling == "none":
        parameters |= dict(rope_type="linear", factor=1.0)
    c = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim,
                    max_position_embeddings=int(original * factor))
    c.rope_parameters = parameters
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](c)


@pytest.mark.grid(6)
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("head_dim, fraction", [(128, 1.0), (64, 1.0), (64, 0.25), (20, 0.5), (12, 1.0), (2, 1.0)])
@pytest.mark.parametrize("scaling", ROPE_SCALING)
def test_rope_scalings_are_transformers(scaling, head_dim, fraction, theta):
    """Also where the original context is shorter than 32 turns of the fastest pair, 2π · 32 = 201 tokens."""
    for factor, original in itertools.product((1.0, 2.0, 4.0, 8.0, 40.0), (8, 64, 100, 201, 202, 4096, 8192, 32768)):
        encoding = rope(head_dim=head_dim, rope_fraction=fraction, rope_theta=theta, rope_scaling=scaling,
                    rope_scaling_factor=factor, rope_original_context=original)
        cos, sin = (t[0].double() for t in encoding.cos_sin(torch.tensor([1])))  # no pair turns more than 1 rad a token
        frequencies, attention_factor = reference_frequencies(scaling, factor, original, theta, head_dim, fraction)
        case = f"factor {factor}, original context {original}"
        # float32 on both sides, a dozen operations
        torch.testing.assert_close(torch.atan2(sin, cos), frequencies.double(), rtol=2e-6, atol=1e-12,
                                   msg=lambda m, case=case: f"{case}: {m}")
        torch.testing.assert_close(torch.hypot(sin, cos), torch.full_like(cos, attention_factor), rtol=1e-6, atol=0.0)


def test_yarn_is_its_paper_s():
    """Peng et al. 2023: tables times 0.1 ln(s) + 1; what turns over 32 times stays, what does not once slows by s."""
    keys = dict(head_dim=128, rope_scaling_factor=16.0, rope_original_context=4096)
    plain, scaled = rope(**keys), rope(**keys, rope_scaling="yarn")
    one = torch.tensor([1])
    (c0, s0), (c1, s1) = ([t[0].double() for t in r.cos_sin(one)] for r in (plain, scaled))
    before, after = torch.atan2(s0, c0), torch.atan2(s1, c1)
    turns = 4096 * before / (2 * math.pi)
    ratio = after / before
    torch.testing.assert_close(ratio[turns > 33], torch.ones_like(ratio[turns > 33]), rtol=1e-6, atol=0)
    torch.testing.assert_close(ratio[turns < 0.9], torch.full_like(ratio[turns < 0.9], 1 / 16), rtol=1e-6, atol=0)
    assert (ratio.diff() <= 1e-6).all() and 0.4 < ratio[len(ratio) // 2] < 0.7
    torch.testing.assert_close(torch.hypot(s1, c1), torch.full_like(c1, 0.1 * math.log(16) + 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scaling", ROPE_SCALING)
@pytest.mark.parametrize("T, start", [(24, 0), (1, 0), (1, 1000), (7, 100)])
def test_rope_rotates_queries_and_keys_as_transformers(scaling, T, start):
    parameters = dict(rope_theta=10_000.0, rope_type="default") if scaling == "none" else dict(
        rope_theta=10_000.0, rope_type=scaling, factor=8.0, original_max_position_embeddings=128, low_freq_factor=1.0,
        high_freq_factor=4.0)
    reference = LlamaRotaryEmbedding(LlamaConfig(hidden_size=96, num_attention_heads=4, head_dim=20,
                                              max_position_embeddings=1024, rope_parameters=parameters))
    encoding = rope(head_dim=20, rope_scaling=scaling, rope_scaling_factor=8.0, rope_original_context=128)
    q, k, positions = draw(2, 4, T, 20), draw(2, 2, T, 20, seed=1), torch.arange(start, start + T)
    rotated = apply_rotary_emb(q, k, encoding.cos_sin(positions))
    expected = apply_rotary_pos_emb(q, k, *reference(q, positions[None]))
    for a, b, leaf in zip(rotated, expected, (q, k), strict=True):
        equal_with_gradients(a, b, leaf, rtol=1e-6, atol=1e-7 * max(16, start + T))  # angles are float32 in both


@pytest.mark.parametrize("head_dim, fraction, R", [(12, 1.0, 12), (20, 0.5, 10), (64, 0.25, 16), (20, 0.33, 6)])
def test_rope_rotates_pairs_in_the_complex_plane(head_dim, fraction, R):
    """Su et al. 2021: the pair (x_i, x_{i + R/2}), a complex number, times exp(i p theta^(-2i/R)); the rest stays."""
    encoding, positions = rope(head_dim=head_dim, rope_fraction=fraction, rope_theta=100.0), torch.tensor([0, 1, 5, 23])
    q, k = draw(2, 4, 4, head_dim), draw(2, 1, 4, head_dim, seed=1)

    def reference(x):
        frequencies = 100.0 ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
        turn = torch.polar(torch.ones(4, R // 2, dtype=torch.float64), torch.outer(positions.double(), frequencies))
        z = torch.complex(x[..., : R // 2], x[..., R // 2 : R]) * turn
        return torch.cat((z.real, z.imag, x[..., R:]), dim=-1)

    for rotated, x in zip(apply_rotary_emb(q, k, encoding.cos_sin(positions)), (q, k), strict=True):
        equal_with_gradients(rotated, reference(x), x, rtol=1e-5, atol=1e-5)  # our angles are float32
        equal(rotated[..., R:], x[..., R:])


def test_rope_scores_depend_only_on_distance():
    encoding = rope(head_dim=8)
    q, k = draw(1, 1, 1, 8), draw(1, 1, 1, 8, seed=1)

    def score(i, j):
        q_turned, _ = apply_rotary_emb(q, k, encoding.cos_sin(torch.tensor([i])))
        _, k_turned = apply_rotary_emb(q, k, encoding.cos_sin(torch.tensor([j])))
        return (q_turned * k_turned).sum()

    # angles are float32, so agreement is to float32's rounding
    torch.testing.assert_close(score(3, 10), score(103, 110), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(score(3, 10), score(3, 11))
    equal(apply_rotary_emb(q, k, encoding.cos_sin(torch.tensor([0])))[0], q)


def test_layers_with_a_window_have_a_local_base_and_no_scaling():
    positions = torch.arange(24)
    keys = dict(rope_theta=1_000_000.0, sliding_window=5, window_pattern="SL")
    for scaling in ROPE_SCALING:
        scaled = dict(rope_scaling=scaling, rope_scaling_factor=4.0, rope_original_context=6)
        both = rope(**keys, **scaled, rope_theta_local=100.0)
        one = rope(**keys, **scaled)
        far, near = rope(rope_theta=1_000_000.0, **scaled), rope(rope_theta=100.0)
        for window, expected in ((5, near), (None, far)):
            for a, b in zip(both.cos_sin(positions, window), expected.cos_sin(positions), strict=True):
                assert torch.equal(a, b)
        for a, b in zip(one.cos_sin(positions, 5), far.cos_sin(positions), strict=True):
            assert torch.equal(a, b)  # without rope_theta_local all layers are the same


def test_rope_s_angles_are_float32_in_half_precision():
    encoding = rope(head_dim=64)
    q = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(0))
    cos_sin = encoding.cos_sin(torch.tensor([4001]))  # bfloat16 would round it to 4000
    assert all(t.dtype == torch.float32 for t in cos_sin)
    half, _ = apply_rotary_emb(q.bfloat16(), q.bfloat16(), cos_sin)
    assert half.dtype == torch.bfloat16
    full, _ = apply_rotary_emb(q, q, cos_sin)
    torch.testing.assert_close(half.float(), full, rtol=0.02, atol=0.05)  # bfloat16: 8 bits
