"""model_init: initial weights, and that muP keeps the effect of a step the same at every width."""

import math
import multiprocessing
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import config, equal

import model_init
from blockgpt.checkpoints.files import LocalChunk, local_chunk, tiles
from blockgpt.training import launch, sharding
from blockgpt.training.optimizers import build_optimizer, set_learning_rate
from model_builder import build_model
from model_config import PRESETS, ModelConfig, get_preset
from model_init import BLOCK, NormalBlock, fill_normal, init_weights

# ---- muP

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
        before = model(idx[:, :-1])
    for _ in range(4):
        set_learning_rate(optimizer, RunConfig.learning_rate)
        optimizer.zero_grad()
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
    with torch.no_grad():
        return (model(idx[:, :-1]) - before).square().mean().sqrt().item()


def growth(**overrides):
    """The exponent of the width in that change, fitted over WIDTHS."""
    x = torch.tensor([math.log(w) for w in WIDTHS])
    y = torch.tensor([math.log(sum(change(w, seed, **overrides) for seed in (1, 2)) / 2) for w in WIDTHS])
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x * x).sum()).item()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_coordinate_check(tied):
    """Yang et al. 2022, appendix D: with muP the change of the logits by a step does not grow with the width."""
    assert abs(growth(init="mup", weight_tying=tied)) < 0.25
    assert growth(init="gpt2", weight_tying=tied) > 0.4


@pytest.mark.parametrize("preset, keys", [
    *((preset, {}) for preset in PRESETS), ("llama", dict(head_dim=24, d_ff=100, n_kv_head=2, attn_gate="headwise")),
    ("gpt2", dict(value_embeddings=1, weight_tying=False, zero_init_residual=True))], ids=str)
def test_mup_at_its_base_width_is_the_model_without_mup(preset, keys):
    shape = dict(n_layer=2, n_head=4, n_embd=64, vocab_size=64, block_size=16, **keys)
    mup, gpt2 = (build_model(get_preset(preset, **shape, **o)) for o in (dict(init="mup", mup_base_width=64), {}))
    for (name, p), q in zip(mup.named_parameters(), gpt2.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert mup.lr_multipliers() == gpt2.lr_multipliers() and set(mup.lr_multipliers().values()) == {1.0}
    assert mup.init.attention_scale() == gpt2.init.attention_scale() == mup.config.head_dim**-0.5
    assert mup.lm_head.scale == gpt2.lm_head.scale == 1.0
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        assert torch.equal(mup(tokens)[0], gpt2(tokens)[0])


def test_mup_follows_the_fan_in_of_each_matrix():
    """d_ff has its default value at both widths, rounded up to 64: its ratio is not that of n_embd."""
    keys = dict(n_layer=1, n_head=4, vocab_size=64, block_size=16, value_embeddings=0)
    plain, wide = (build_model(get_preset("llama", **keys, n_embd=256, head_dim=96, **o))
                   for o in ({}, dict(init="mup", mup_base_width=64)))
    base = ModelConfig(n_embd=64, n_head=4, ffn_type="swiglu").resolve().d_ff
    ratio = {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 4, "gate_proj": 4, "up_proj": 4, "down_proj": 704 / base}
    assert (base, wide.config.d_ff) == (192, 704)
    parameters = dict(plain.named_parameters())
    for name, p in wide.named_parameters():
        mult = ratio.get(name.split(".")[-2], 1)
        assert wide.lr_multipliers()[name] == pytest.approx(1 / mult), name
        torch.testing.assert_close(p, parameters[name] * mult**-0.5, msg=name)
    explicit = build_model(get_preset("llama", **keys, n_embd=256, d_ff=700, init="mup", mup_base_width=64))
    assert explicit.lr_multipliers()["blocks.0.ffn.down_proj.weight"] == 1 / 4


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
    """Yang et al. 2022 (Tensor Programs V), table 8, for Adam: variances of hidden weights 1/fan_in, their rates
    1/fan_in, logits 1/width, scores 1/head_dim, relative to the base model; embeddings and vectors as they are."""
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
    assert base.blocks[0].attn.scale == plain.blocks[0].attn.scale == 32**-0.5
    assert wide.blocks[0].attn.scale == pytest.approx(8**0.5 / 32)  # 8: head_dim of the base model


# ---- the other initialisations


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
        equal(m(idx), m.lm_head(m.final_norm(x)))


# ---- the generator


def normal(shape=(1000, 1000), key=1, std=1.0):
    data = torch.empty(shape)
    fill_normal(LocalChunk(tuple(shape), [0] * len(shape), data), key, std)
    return data


def splitmix64(seed, index):
    """The output of this index (from 0) of SplitMix64, as its paper has it."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_values_are_the_box_muller_transform_of_splitmix64():
    assert [splitmix64(1234567, i) for i in range(3)] == [  # a published test vector
        6457827717110365317, 3203168211198807973, 9817491932198370423]
    for key, start in ((1234567, 0), (2**64 - 1, 10**9), (0, 2**63)):
        values = NormalBlock().generate(key, np.array([start, start + 7], np.uint64), 2000)
        for row, first in zip(values, (start, start + 7), strict=True):
            for i, value in enumerate(row):
                bits = splitmix64(key, first + i)
                low = bits % 2**32 - (2**32 if bits % 2**32 >= 2**31 else 0)
                radius = math.sqrt(-2 * math.log(((bits >> 33) + 0.5) / 2**31))
                # float32 near u = 1, where the radius is small and u is rounded
                assert value == pytest.approx(radius * math.sin(math.pi / 2 * low / 2**31), rel=1e-6, abs=2e-4)


def test_values_are_the_same_on_every_machine_and_with_every_version():
    """The exact bits: only float32 + - * / sqrt are used, which IEEE 754 defines to the last bit."""
    model = build_model(get_preset("llama", n_layer=1, n_head=2, n_embd=16, vocab_size=8, block_size=8), seed=1337)
    first = model.token_embedding.weight.view(torch.int32)[0, :4].tolist()
    assert first == [1024601448, 1011302721, 1021847038, -1134010928]
    assert sum(p.view(torch.int32).sum(dtype=torch.int64).item() for p in model.parameters()) == -245046415984


def test_values_are_normal():
    x = normal().double().ravel()
    n = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((x**power).mean().item() - moment) < 3 * (variance / n) ** 0.5, power
    distance = torch.special.ndtr(x.sort().values) - (torch.arange(n) + 0.5) / n
    assert distance.abs().max() * n**0.5 < 1.63  # Kolmogorov-Smirnov, p = 0.01
    tail = (x.abs() > 4).sum().item()  # 63 expected
    assert 40 < tail < 90 and 4.4 < x.abs().max() < 6.67
    assert normal(std=0.02).std().item() == pytest.approx(0.02, rel=0.003)


def test_neighbouring_elements_rows_parameters_and_seeds_are_independent():
    x, others = normal(), [normal(key=key) for key in (0, 2, 3, 2**63 + 1, 2**64 - 1)]
    pairs = [(x.ravel()[lag:], x.ravel()[:-lag]) for lag in (1, 2, 3, 64, 1000, 1001, 32768)]
    for a, b in (*pairs, *((x.ravel(), other.ravel()) for other in others)):
        for f in (torch.clone, torch.square, torch.abs):
            correlation = torch.corrcoef(torch.stack((f(a).double(), f(b).double())))[0, 1].item()
            assert abs(correlation) < 4 / len(a) ** 0.5
    assert torch.linalg.matrix_norm(x, 2) < 2.02 * 1000**0.5  # a random matrix: 2 sqrt(n)


def test_no_sequence_repeats_across_parameters_or_seeds():
    keys = dict(n_layer=2, n_head=2, n_embd=64, vocab_size=96, block_size=8, weight_tying=False, init="normal")
    matrices = [p for seed in range(3) for p in build_model(get_preset("llama", **keys), seed).parameters()
                if p.dim() == 2]
    words = torch.cat([p.detach().ravel().view(torch.int32) for p in matrices])
    runs = words.unfold(0, 3, 1)  # three successive values
    assert len(torch.unique(runs, dim=0)) == len(runs) > 300_000


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_shard_equals_its_part_of_the_whole(data):
    shape = data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=3))
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    key, block = data.draw(st.integers(0, 2**64 - 1)), data.draw(st.sampled_from((7, 64, BLOCK)))
    shard = torch.full([end - start for start, end in bounds], math.nan)
    whole = normal(shape, key, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_init, "BLOCK", block)
        patch.setattr(torch, "get_num_threads", lambda: data.draw(st.integers(1, 3)))
        fill_normal(LocalChunk(tuple(shape), [start for start, _ in bounds], shard), key, 0.5)
    assert torch.equal(shard, whole[tuple(slice(*bound) for bound in bounds)])


def test_a_large_matrix_and_its_shards_are_equal_across_blocks():
    shape = (70, 3 * BLOCK // 64 + 5)
    whole = normal(shape)
    flat = NormalBlock().generate(1, np.array([BLOCK - 5], np.uint64), 10)
    assert torch.equal(whole.ravel()[BLOCK - 5:BLOCK + 5], torch.from_numpy(flat[0]))
    for rows, columns in ((slice(3, 41), slice(0, shape[1])), (slice(0, 70), slice(100, 1301))):
        shard = torch.empty_like(whole[rows, columns], memory_format=torch.contiguous_format)
        fill_normal(LocalChunk(shape, [rows.start, columns.start], shard), 1, 1.0)
        assert torch.equal(shard, whole[rows, columns])


def test_generating_needs_little_memory():
    data = torch.empty(4000, 1000)
    tracemalloc.start()
    fill_normal(LocalChunk((4000, 1000), [0, 0], data), 1, 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6 * torch.get_num_threads() < data.nbytes


SHARDED = dict(n_layer=1, n_head=4, n_embd=20, head_dim=6, vocab_size=38, block_size=7, d_ff=26, weight_tying=False)


def shards_of_a_rank(rank):
    """({name: (offsets, sizes, values)}, elements generated) on one rank of FSDP over tensor parallelism, 3 x 2."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=6)
    runtime = launch.Runtime(rank, rank, 6, torch.device("cpu"), torch.float32, False, False, tp_size=2)
    run_config = SimpleNamespace(use_fsdp=True, dp_replicate=1, fsdp_reshard_after_forward=True, fsdp_cpu_offload=False)
    generated, generate = [], NormalBlock.generate

    def count(self, key, starts, width):
        generated.append(len(starts) * width)
        return generate(self, key, starts, width)

    NormalBlock.generate = count
    model = build_model(get_preset("gpt2", **SHARDED), 5, "cpu",
                        lambda model: sharding.shard_model(model, run_config, runtime))
    chunks = {name: local_chunk(p) for name, p in model.named_parameters()}
    return {name: (c.offsets, list(c.data.shape), c.data.tolist()) for name, c in chunks.items()}, sum(generated)


@pytest.mark.slow
def test_each_rank_generates_only_its_own_shards_of_the_same_weights():
    import torch.distributed.fsdp
    import torch.testing._internal.distributed.fake_pg  # before the forks

    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:  # torch remembers the rank
        ranks = pool.map(shards_of_a_rank, range(6), chunksize=1)
    model = build_model(get_preset("gpt2", **SHARDED), 5)
    for name, p in model.named_parameters():
        blocks = {(tuple(offsets), tuple(sizes)) for shards, _ in ranks for offsets, sizes, _ in [shards[name]]}
        assert tiles([block for block in blocks if math.prod(block[1])], p.shape), name
        for shards, _ in ranks:
            offsets, sizes, values = shards[name]
            expected = p[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
            assert torch.equal(torch.tensor(values).view(sizes), expected), name
    for shards, generated in ranks:
        assert generated == sum(math.prod(sizes) for _, sizes, _ in shards.values() if len(sizes) > 1)


def test_initialising_again_gives_the_same_weights_with_another_number_of_threads(monkeypatch):
    model = build_model(get_preset("llama", n_layer=1, n_head=4, n_embd=256, vocab_size=512, block_size=8))
    before = {name: p.clone() for name, p in model.named_parameters()}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    init_weights(model, 1337)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    init_weights(model, 1338)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.dim() == 2)
