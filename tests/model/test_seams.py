"""The seams bend: a mixture of experts and a latent attention are each one class and one line in an axis table.

Both are throw-away components. They are built, counted, accounted for in memory, trained, compiled and sampled from
without a change anywhere else.
"""

import dataclasses

import architectures
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model_config
from blockgpt.accounting.flops import flops_per_token
from blockgpt.accounting.memory import LinearBytes, MemoryAccount
from blockgpt.training.recompute import CHECKPOINTING_MODES, recompute
from model_attention import Attention
from model_builder import build_model
from model_components import ResidualProjection, SwiGLU, build_norm
from model_config import ModelConfig, Option
from model_positions import apply_rotary_emb

SIZES = dict(n_layer=2, n_head=4, n_embd=32, d_ff=24, vocab_size=48, block_size=12)


class MixtureOfExperts(nn.Module):
    """The weighted outputs of the 2 of 4 experts with the largest router probabilities, and Switch's auxiliary loss.

    Fedus et al. 2021, equation 4. Each token gathers the weights of its experts, so that no shape depends on data.
    """

    n_experts, top_k, aux_weight = 4, 2, 0.01

    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.n_embd, self.n_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(config) for _ in range(self.n_experts))

    def forward(self, x):
        tokens = x.flatten(0, 1)  # (N, C)
        p = self.router(tokens).float().softmax(dim=-1)  # (N, E)
        weight, chosen = p.topk(self.top_k)  # (N, K) each
        self.load = F.one_hot(chosen, self.n_experts).float().mean(dim=(0, 1))  # (E,)
        self.balance = self.aux_weight * self.n_experts * (self.load * p.mean(dim=0)).sum()

        def weights(name):
            return torch.stack([getattr(e, name).weight for e in self.experts])[chosen.flatten()]  # (N K, out, in)

        rows = tokens.repeat_interleave(self.top_k, dim=0)[..., None]  # (N K, C, 1)
        h = self.experts[0].gate(weights("gate_proj") @ rows, weights("up_proj") @ rows)
        y = (weights("down_proj") @ h).view(*chosen.shape, -1)  # (N, K, C)
        return (y * weight[..., None].to(y.dtype)).sum(dim=1).view(x.shape)

    def aux_loss(self):
        return self.balance

    def metrics(self):
        return {f"load/{i}": fraction for i, fraction in enumerate(self.load.detach())}

    def flops(self, seq_len):
        return {"router": 2 * self.router.weight.numel(),
                "ffn": self.top_k * sum(self.experts[0].flops(seq_len).values())}

    def inactive_parameters(self):
        return (self.n_experts - self.top_k) * sum(p.numel() for p in self.experts[0].parameters())


class LatentAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values from a latent vector, which the cache stores.

    A key has head_dim channels of its head without rotation, and rotated ones that all heads share.
    """

    class Cache:
        def __init__(self, window):
            self.window, self.length, self.stored = window, 0, None

        def append(self, latent):  # (B, T, rank + d_rope)
            self.length += latent.shape[1]
            latent = latent if self.stored is None else torch.cat((self.stored, latent), dim=1)
            self.stored = latent if self.window is None else latent[:, max(0, latent.shape[1] - self.window + 1):]
            return latent

    def __init__(self, config, layer):
        self.rank, self.d_rope, self.d_nope = 8, config.rotary_dim(), config.head_dim
        super().__init__(config, layer, config.n_head, d_qk=self.d_rope + self.d_nope, d_v=config.head_dim)
        self.q_proj = nn.Linear(config.n_embd, self.n_head * self.d_qk, bias=False)
        self.latent_proj = nn.Linear(config.n_embd, self.rank + self.d_rope, bias=False)
        self.norm = build_norm(config, self.rank)
        self.kv_proj = nn.Linear(self.rank, self.n_head * (self.d_nope + self.d_v), bias=False)
        self.o_proj = ResidualProjection(self.n_head * self.d_v, config.n_embd, bias=False)

    def forward(self, x, context):
        q = self.q_proj(x).unflatten(2, (self.n_head, self.d_qk)).transpose(1, 2)  # (B, H, T, d_qk)
        latent, shared = self.latent_proj(x).split((self.rank, self.d_rope), dim=-1)  # (B, T, …)
        q, shared = apply_rotary_emb(q, shared[:, None], context.cos_sin[self.window])
        latent = torch.cat((self.norm(latent), shared[:, 0]), dim=-1)
        if context.caches is not None:
            latent = context.caches[self.layer].append(latent)  # (B, S, rank + d_rope)
        latent, shared = latent.split((self.rank, self.d_rope), dim=-1)
        own, v = self.kv_proj(latent).unflatten(2, (self.n_head, -1)).transpose(1, 2).split(
            (self.d_nope, self.d_v), dim=-1)  # (B, H, S, …)
        k = torch.cat((shared[:, None].expand(-1, self.n_head, -1, -1), own), dim=-1)
        return self.o_proj(self.attend(q, k, v, context).transpose(1, 2).flatten(2))

    def new_cache(self):
        return self.Cache(self.window)

    def flops(self, seq_len):
        projections = (self.q_proj, self.latent_proj, self.kv_proj, self.o_proj)
        return {"attention projections": 2 * sum(p.weight.numel() for p in projections), **super().flops(seq_len)}


BASE = dict(normalization="rmsnorm", ffn_type="swiglu", position_encoding="rope", rope_fraction=0.5, **SIZES)
NEW = {"moe": dict(ffn_type="moe"), "mla": dict(attention_type="mla"),
       "both": dict(ffn_type="moe", attention_type="mla"),
       "mla, windows": dict(attention_type="mla", sliding_window=4, window_pattern="SL")}


@pytest.fixture(autouse=True)
def table_entries(monkeypatch):
    """The one line for each of the two."""
    monkeypatch.setitem(model_config.FFN_TYPE, "moe", Option(
        lambda: MixtureOfExperts, "MoE", "2 of 4 experts", implies=model_config.allow_activations("silu")))
    monkeypatch.setitem(model_config.ATTENTION_TYPE, "mla", Option(
        lambda: LatentAttention, "MLA", "keys and values from a latent vector"))


def config(name, **keys):
    return ModelConfig(**{**BASE, **NEW[name], **keys})


def tokens(B=2, T=12, seed=0):
    return torch.randint(0, 48, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NEW)
def test_its_parameters_follow_from_the_config_by_formula(name):
    c, model = config(name).resolve(), build_model(config(name))
    C, H, D, expert = 32, 4, 8, 3 * 32 * 24
    total = architectures.count_parameters(dataclasses.replace(c, ffn_type="swiglu", attention_type="standard"))
    inactive = 0
    if c.ffn_type == "moe":
        total += 2 * (3 * expert + 4 * C)  # in both layers three more experts, and a router
        inactive = 2 * 2 * expert
    if c.attention_type == "mla":
        total += 2 * (C * H * 12 + C * (8 + 4) + 8 + 8 * H * (D + D) + H * D * C - 4 * C * C)
    counts = model.parameter_counts()
    assert counts["total"] == counts["trainable"] == total == sum(p.numel() for p in model.parameters())
    assert counts["active"] == total - inactive
    assert {n for n, m in model.named_modules() if isinstance(m, ResidualProjection) and "experts" in n} == (
        {f"blocks.{i}.ffn.experts.{e}.down_proj" for i in range(2) for e in range(4)} if inactive else set())


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("replaced", [False, True], ids=["", "class replaced as by FSDP"])
def test_its_config_is_inferred_and_its_label_is_in_the_name(name, replaced):
    model = build_model(config(name))
    if replaced:
        for module in (*model.blocks, *(m for b in model.blocks for m in (b.attn, b.ffn)), model):
            module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {})
    inferred = model.infer_config()
    assert inferred == config(name).resolve()
    words = inferred.arch_name().split("-")
    assert ("MoE" in words, "MLA" in words) == ("ffn_type" in NEW[name], "attention_type" in NEW[name])


def test_a_component_speaks_for_those_inside_it():
    model = build_model(config("both"))
    for block in model.blocks:
        block.ffn.config_values = lambda: {"d_ff": 24, "bias": False}
        for expert in block.ffn.experts:
            expert.down_proj = nn.Linear(7, 32)  # another width, and a bias
    assert model.infer_config() == config("both").resolve()


def test_its_scale_follows_from_its_own_width_of_keys():
    assert build_model(config("mla")).blocks[0].attn.scale == pytest.approx(12**-0.5)
    mup = build_model(config("mla", init="mup", mup_base_width=8))
    assert mup.blocks[0].attn.scale == pytest.approx((12 * 4)**-0.5) and mup.infer_config().attn_scale is None
    explicit = build_model(config("mla", attn_scale=0.5))
    assert explicit.blocks[0].attn.scale == explicit.infer_config().attn_scale == 0.5


@pytest.mark.parametrize("backend", ["sdpa", "manual"])
@pytest.mark.parametrize("name", NEW)
def test_its_flops_equal_torchs_count(name, backend):
    model, idx = build_model(config(name, attention_backend=backend)), tokens()
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(idx, idx)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    flops = flops_per_token(model, 12)
    assert forward.get_total_flops() == 2 * 12 * sum(flops["forward"].values())
    assert backward.get_total_flops() == 2 * forward.get_total_flops()
    windows = [12 if b.attn.window is None else 4 for b in model.blocks]
    d_qk = 12 if "attention_type" in NEW[name] else 8
    assert flops["train"] == 3 * (sum(flops["forward"].values()) - sum(2 * (12 - w) * 4 * (d_qk + 8) for w in windows))


def saved_by_autograd(c, sequences):
    """Bytes that autograd saves in a forward pass: every storage once, without the parameters."""
    model, saved = build_model(c), {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def save(t):
        saved[t.untyped_storage().data_ptr()] = t
        return t

    idx = tokens(sequences)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        model(idx, idx)
    return sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in parameters)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["both", "mla, windows"])
def test_its_memory_is_accounted_for(name):
    account = MemoryAccount(build_model, config(name), torch.float32, gpu=False)
    for sequences in (2, 5):  # a single one has views where several need copies
        assert account.saved_in()(sequences) == saved_by_autograd(config(name), sequences)
    assert account.parameter_bytes == 4 * build_model(config(name)).parameter_counts()["total"]
    peaks = {mode: max(p.gradients + p.activations + p.logits for p in account.phases(4, mode, accumulating=False))
             for mode in CHECKPOINTING_MODES}
    assert peaks["full"] < peaks["none"]


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_a_gpus_fused_attention_saves_no_scores_where_d_v_is_not_d_qk(backend):
    def attention(block_size):
        c = config("mla", block_size=block_size, attention_backend=backend)
        return MemoryAccount(build_model, c, torch.float32, gpu=True).saved_in("blocks.0.attn")

    short, long = attention(12), attention(24)
    assert long.per_sequence == 2 * short.per_sequence and isinstance(short, LinearBytes)  # linear in the length


def test_the_auxiliary_loss_is_added_in_training_alone_and_reaches_the_router():
    model, idx = build_model(config("both")), tokens()
    loss = model(idx, idx)
    aux = sum(block.ffn.balance for block in model.blocks)
    torch.testing.assert_close(loss, model.lm_head.loss(model.hidden(idx), idx) + aux)
    assert model.aux_loss() >= 2 * 0.01 * 0.99  # each is at least aux_weight, reached if all experts get the same
    assert torch.equal(model(idx, idx, reduction="sum"), model.lm_head.loss(model.hidden(idx), idx, "sum"))
    model.aux_loss().backward()
    assert all(block.ffn.router.weight.grad.abs().max() > 0 for block in model.blocks)
    model.eval()
    torch.testing.assert_close(model(idx, idx), loss - aux)


@pytest.mark.parametrize("name", NEW)
def test_it_learns_and_reports_its_metrics(name):
    torch.manual_seed(0)
    model, idx = build_model(config(name)), tokens(T=13)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.0
    metrics = {key: value.item() for key, value in model.metrics().items()}
    if "ffn_type" in NEW[name]:
        assert list(metrics) == [f"load/{i}" for i in range(4)] and sum(metrics.values()) == pytest.approx(1.0)
        assert metrics["load/0"] == pytest.approx(sum(b.ffn.load[0].item() for b in model.blocks) / 2)
    else:
        assert metrics == {} and model.aux_loss() is None


@pytest.mark.parametrize("mode", sorted(set(CHECKPOINTING_MODES) - {"none"}))
def test_activation_checkpointing_changes_no_gradient(mode):
    plain, recomputed, idx = build_model(config("both")), recompute(build_model(config("both")), mode), tokens()
    for model in (plain, recomputed):
        model(idx, idx).backward()
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("name", NEW)
def test_a_cache_changes_no_token(name):
    model = build_model(config(name, init_std=0.5)).double()
    generated = [model.generate(tokens(T=5), 10, temperature=0, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*generated) and len(set(generated[0][0, 5:].tolist())) > 2
    caches = [block.attn.new_cache() for block in model.blocks]
    model.hidden(tokens(T=7), caches=caches)
    assert [cache.length for cache in caches] == [7, 7]
    if "attention_type" in NEW[name]:
        assert caches[0].stored.shape == (2, 3 if model.blocks[0].attn.window else 7, 8 + 4)


@pytest.mark.slow
def test_it_compiles_into_one_graph():
    torch.compiler.reset()
    model, idx = build_model(config("both")), tokens()
    loss = model(idx, idx)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    compiled_loss = torch.compile(model, fullgraph=True, backend="aot_eager")(idx, idx)
    compiled_loss.backward()
    torch.testing.assert_close(compiled_loss, loss)
    for (name, p), expected in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, expected, msg=lambda m, name=name: f"{name}: {m}")
