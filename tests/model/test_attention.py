"""model_attention: every backend and mask against the definition as loops over queries and keys; KV caches."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from parity import config, draw, equal, equal_with_gradients, model, randomised
from torch.func import functional_call
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from blockgpt.errors import UserError
from model_attention import AttentionMaskSpec, ForwardContext
from model_builder import build_model
from model_components import component
from model_config import ATTENTION_BACKEND

CPU_TRAINABLE = ("sdpa", "manual")  # flex has no backward pass on the CPU


def attention(backend, **keys):
    """One layer's attention with random weights, in float64."""
    c = config(**keys, attention_backend=backend)
    return randomised(component("attention_type", c)(c, 0))


def backend_of(name):
    return ATTENTION_BACKEND[name].load_class()()


def context(layer, T):
    """The context of a forward pass of T tokens through one layer, without rotation."""
    spec = mask_spec(T, window=layer.window)
    return ForwardContext(spec.queries, {layer.window: None}, {layer.window: layer.backend.mask(spec)})


def mask_spec(T, S=None, window=None, causal=True, documents=None, alibi_slopes=None):
    """T queries, the last of S tokens."""
    keys = torch.arange(S or T)
    return AttentionMaskSpec(keys[-T:], keys, window, causal, documents, alibi_slopes)


def by_definition(q, k, v, s, scale, cap=None):
    """Attention of q (B, H, T, D) to k, v (B, G, S, D), one query at a time: softmax over the keys that it sees."""
    B, H, G = len(q), q.shape[1], k.shape[1]
    q_at, k_at, v_at = ([[rows.unbind() for rows in heads.unbind()] for heads in t.unbind()] for t in (q, k, v))
    out = []
    for b, h, i in itertools.product(range(B), range(H), range(len(s.queries))):
        scores, values = [], []
        for j in range(len(s.keys)):
            distance = int(s.queries[i]) - int(s.keys[j])
            if s.causal and distance < 0:
                continue
            if s.window is not None and abs(distance) >= s.window:
                continue
            if s.documents is not None and s.documents[b, i] != s.documents[b, j]:
                continue
            score = q_at[b][h][i].dot(k_at[b][h * G // H][j]) * scale
            if cap is not None:
                score = cap * torch.tanh(score / cap)
            scores.append(score if s.alibi_slopes is None else score - float(s.alibi_slopes[h]) * abs(distance))
            values.append(v_at[b][h * G // H][j])
        weights = torch.stack(scores).exp()  # the scores are small
        out.append(weights @ torch.stack(values) / weights.sum())
    return torch.stack(out).view(q.shape)


SIZES = {  # B, H, G, T; block_size is 24
    "grouped": (2, 4, 2, 9), "one head": (1, 1, 1, 24), "one key head": (3, 3, 1, 5), "one token": (2, 4, 2, 1)}
MASKS = list(itertools.product((True, False), (None, 1, 7, 24), (False, True), (False, True)))
# Every mask on the first size, and on one of the others in turn.
CASES = [(*mask, size) for n, mask in enumerate(MASKS) for size in ("grouped", list(SIZES)[1 + n % 3])]


def alibi_slopes_of(n):
    return torch.exp2(-torch.arange(1, n + 1, dtype=torch.float32))


def documents_of(B, T):
    """Documents of several lengths; each row has a different count of them."""
    return torch.stack([torch.arange(T) // (3 + 2 * b) for b in range(B)])


@pytest.mark.grid(5)
@pytest.mark.parametrize("causal, window, documents, alibi, size", CASES)
def test_every_backend_is_attention_by_definition_for_every_mask(causal, window, documents, alibi, size, untraced):
    B, H, G, T = SIZES[size]
    q, k, v = draw(B, H, T, 6), draw(B, G, T, 6, seed=1), draw(B, G, T, 6, seed=2)
    s = mask_spec(T, None, window, causal, documents_of(B, T) if documents else None,
                  alibi_slopes_of(H) if alibi else None)
    for cap in (None, 0.7):
        expected, cotangent = by_definition(q, k, v, s, 0.4, cap), draw(*q.shape, seed=3).detach()
        gradients = torch.autograd.grad(expected, (q, k, v), cotangent)
        for backend in config(attn_softcap=cap).supported_backends():
            chosen = backend_of(backend)
            if backend in CPU_TRAINABLE:
                y = chosen.attend(q, k, v, chosen.mask(s), 0.4, cap)
                for grad, expected_grad in zip(torch.autograd.grad(y, (q, k, v), cotangent), gradients, strict=True):
                    equal(grad, expected_grad)
            else:
                y = chosen.attend(q.detach(), k.detach(), v.detach(), chosen.mask(s), 0.4, cap)
            equal(y, expected)


@pytest.mark.parametrize("T, S", [(1, 9), (4, 9), (9, 10), (1, 1)])
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("backend", ATTENTION_BACKEND)
def test_queries_after_a_cache_see_the_keys_that_their_positions_allow(backend, window, T, S, untraced):
    chosen = backend_of(backend)
    q, k, v = (draw(2, n, length, 6, seed=n).detach() for n, length in ((4, T), (2, S), (2, S)))
    for alibi_slopes in (None, alibi_slopes_of(4)):
        cached = S if window is None else min(S, window - 1 + T)
        s = mask_spec(T, S, window, alibi_slopes=alibi_slopes)
        recent = s._replace(keys=s.keys[S - cached:])  # what a bounded cache has stored
        y = chosen.attend(q, k[:, :, S - cached:], v[:, :, S - cached:], chosen.mask(recent), 6**-0.5)
        equal(y, by_definition(q, k, v, s, 6**-0.5))


@pytest.mark.parametrize("causal, window, documents, alibi", MASKS)
def test_torch_chooses_a_fused_kernel_for_every_mask(causal, window, documents, alibi):
    layer = attention("sdpa", n_kv_head=2)
    s = mask_spec(9, None, window, causal, documents_of(1, 9) if documents else None,
                  alibi_slopes_of(4) if alibi else None)
    assert layer.kernel(s, torch.float32) == "flash_attention"  # the CPU's fused one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex_attention has no backward pass on the CPU")
def test_flex_has_the_gradients_of_manual_for_every_mask_on_cuda():
    B, H, G, T = 2, 4, 2, 200
    q, k, v = (draw(B, n, T, 32, seed=i).detach().float().cuda().requires_grad_() for i, n in enumerate((H, G, G)))
    for (causal, window, documents, alibi), cap in itertools.product(MASKS, (None, 0.7)):
        s = mask_spec(T, None, window, causal, documents_of(B, T) if documents else None,
                      alibi_slopes_of(H) if alibi else None)
        s = AttentionMaskSpec(*(x.cuda() if torch.is_tensor(x) else x for x in s))
        a, b = (chosen.attend(q, k, v, chosen.mask(s), 32**-0.5, cap)
                for chosen in (backend_of("flex"), backend_of("manual")))
        equal_with_gradients(a.double(), b.double(), q, k, v, rtol=1e-2, atol=1e-2)  # products may be tf32


# ---------------------------------------------------------------- whole models with each backend


@pytest.mark.grid(4)
@pytest.mark.parametrize("keys", [
    dict(), dict(n_kv_head=2, bias=True), dict(n_kv_head=1, sliding_window=5), dict(causal=False),
    dict(causal=False, sliding_window=3), dict(sliding_window=1), dict(sliding_window=99), dict(mask_documents=True),
    dict(mask_documents=True, position_encoding="alibi", sliding_window=5, window_pattern="SL"),
    dict(position_encoding="alibi", n_kv_head=2), dict(attn_scale=0.9, qk_norm="head", attn_gate="elementwise"),
    dict(n_head=1), dict(n_head=1, sliding_window=5), dict(rope_pattern="RN", sliding_window=5, window_pattern="SL")],
    ids=str)
@pytest.mark.parametrize("B, T", [(2, 24), (1, 1)])
def test_all_backends_give_the_same_model(keys, B, T, untraced):
    idx = torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(1))
    documents = documents_of(B, T) if keys.get("mask_documents") else None
    keys = {"position_encoding": "rope", **keys}
    sdpa, manual, flex = (model(**keys, attention_backend=b) for b in ("sdpa", "manual", "flex"))
    expected = manual(idx, segment_ids=documents)
    a = sdpa(idx, segment_ids=documents)
    equal(a, expected)
    with torch.no_grad():
        equal(flex(idx, segment_ids=documents), expected)
    for out in (a, expected):
        out.square().sum().backward()
    for (name, p), q in zip(sdpa.named_parameters(), manual.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=name)  # float64, sums over thousands


def test_the_backends_that_support_a_softcap_agree():
    keys = dict(attn_softcap=0.3, logit_softcap=1.0, sliding_window=5, window_pattern="SL", n_kv_head=2)
    assert config(**keys).supported_backends() == ["manual", "flex"]
    idx = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        equal(*(model(**keys, attention_backend=backend)(idx) for backend in ("flex", "manual")))


@pytest.mark.grid(4)
@pytest.mark.parametrize("backend", ATTENTION_BACKEND)
@pytest.mark.parametrize("keys", [dict(), dict(position_encoding="alibi"), dict(sliding_window=5),
                                  dict(mask_documents=True)], ids=str)
def test_no_token_sees_a_later_one(backend, keys):
    m = model(**{"position_encoding": "none", **keys}, attention_backend=backend)
    idx = torch.randint(0, 61, (1, 24), generator=torch.Generator().manual_seed(1))
    changed = idx.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 61
    with torch.no_grad():
        a, b = m(idx), m(changed)
    equal(a[:, :12], b[:, :12])
    assert not torch.isclose(a[:, 12:], b[:, 12:]).all(-1).any()


@pytest.mark.parametrize("backend", ATTENTION_BACKEND)
def test_a_masked_document_has_the_logits_that_it_has_alone(backend, untraced):
    """With relative positions, also in the middle of a sequence."""
    for position in ("rope", "alibi", "none"):
        m = model(mask_documents=True, position_encoding=position, attention_backend=backend)
        idx = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(1))
        documents = torch.stack((torch.arange(24) // 8, (torch.arange(24) >= 5).long()))
        with torch.no_grad():
            logits = m(idx, segment_ids=documents)
            # RoPE's angles are float32
            equal(logits[0, 8:16], m(idx[:1, 8:16])[0], rtol=1e-5, atol=1e-5)
            equal(logits[1, 5:], m(idx[1:, 5:])[0], rtol=1e-5, atol=1e-5)
            equal(m(idx, segment_ids=torch.zeros_like(idx)), m(idx))
            plain = model(position_encoding=position, attention_backend=backend)
            equal(plain(idx, segment_ids=documents), m(idx))  # without mask_documents the ids are ignored


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_is_the_token_itself_and_those_just_before(causal):
    for window, T in itertools.product((1, 2, 7, 24, 100), (1, 9, 24)):
        bool_mask = mask_spec(T, window=window, causal=causal).bool_mask()
        for i, j in itertools.product(range(T), range(T)):
            expected = abs(i - j) < window and (j <= i or not causal)
            assert (True if bool_mask is None else bool_mask[i, j].item()) == expected


def test_only_the_windowed_layers_have_a_window():
    m = build_model(config(n_layer=7, sliding_window=5, window_pattern="SSL"))
    assert [b.attn.window for b in m.blocks] == [5, 5, None, 5, 5, None, 5]
    idx = torch.randint(0, 61, (1, 24), generator=torch.Generator().manual_seed(1))
    changed = idx.clone()
    changed[0, 0] += 1
    for layers, visible in ((1, 5), (2, 9), (3, 13)):  # a window of 5 extends 4 tokens further back with every layer
        m = model(n_layer=layers, sliding_window=5, position_encoding="none")
        differs = ~torch.isclose(m(idx), m(changed), rtol=1e-12, atol=1e-14).all(-1)[0]
        assert differs.tolist() == [True] * visible + [False] * (24 - visible)


# ---------------------------------------------------------------- one layer against torch and formulas


def projected(layer, x):
    """q (B, T, H, D), k, v (B, T, G, D) by matrix products."""
    p, (B, T, _) = dict(layer.named_parameters()), x.shape
    return [(x @ p[f"{n}_proj.weight"].T + p.get(f"{n}_proj.bias", 0.0)).view(B, T, -1, layer.head_dim) for n in "qkv"]


def causal_attention(q, k, v, scale):
    """torch's scaled_dot_product_attention of (B, T, H, D) and (B, T, G, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return y.transpose(1, 2)  # (B, T, H, D)


@pytest.mark.parametrize("backend", CPU_TRAINABLE)
@pytest.mark.parametrize("bias, qkv_bias", [(False, None), (True, None), (False, True), (True, False)])
@pytest.mark.parametrize("n_head, n_kv_head, head_dim", [(4, 4, None), (4, 2, 20), (4, 1, 6), (1, 1, None)])
def test_a_layer_projects_attends_and_projects_back(n_head, n_kv_head, head_dim, bias, qkv_bias, backend):
    layer = attention(backend, n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim, bias=bias, qkv_bias=qkv_bias)
    x = draw(2, 7, 48)
    assert (layer.q_proj.bias is not None) == (bias if qkv_bias is None else qkv_bias)
    y = causal_attention(*projected(layer, x), (head_dim or 48 // n_head) ** -0.5).flatten(2)
    expected = y @ layer.o_proj.weight.T + (layer.o_proj.bias if bias else 0.0)
    equal_with_gradients(layer(x, context(layer, 7)), expected, x, *layer.parameters())


def test_torch_s_multi_head_attention_agrees():
    layer, x = attention("manual", bias=True), draw(2, 7, 48)
    reference, p = torch.nn.MultiheadAttention(48, 4, batch_first=True).double(), dict(layer.named_parameters())
    weights = {"in_proj_weight": torch.cat([p[f"{n}_proj.weight"] for n in "qkv"]),
               "in_proj_bias": torch.cat([p[f"{n}_proj.bias"] for n in "qkv"]),
               "out_proj.weight": p["o_proj.weight"], "out_proj.bias": p["o_proj.bias"]}
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    expected = functional_call(reference, weights, (x, x, x), dict(attn_mask=future, need_weights=False))[0]
    equal_with_gradients(layer(x, context(layer, 7)), expected, x, *layer.parameters())


@pytest.mark.parametrize("qk_norm", ["head", "projection"])
@pytest.mark.parametrize("normalization", ["rmsnorm", "rmsnorm_gemma", "layernorm"])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_qk_norm_is_per_head_or_over_the_whole_projection(qk_norm, normalization, n_kv_head):
    layer = attention("manual", qk_norm=qk_norm, normalization=normalization, n_kv_head=n_kv_head, head_dim=20)
    x = draw(2, 7, 48)

    def normed(t, norm):
        flat = t if qk_norm == "head" else t.flatten(2)  # (B, T, G, D) or (B, T, G D)
        shift = flat.mean(-1, keepdim=True) if normalization == "layernorm" else 0.0
        unit = (flat - shift) / ((flat - shift).square().mean(-1, keepdim=True) + norm.eps).sqrt()
        gain = 1 + norm.weight if normalization == "rmsnorm_gemma" else norm.weight
        return (unit * gain + (norm.bias if normalization == "layernorm" else 0.0)).view(t.shape)

    q, k, v = projected(layer, x)
    norms = layer.qk_norm
    assert norms.q_norm.weight.numel() == (20 if qk_norm == "head" else 80)
    assert norms.k_norm.weight.numel() == (20 if qk_norm == "head" else 20 * n_kv_head)
    y = causal_attention(normed(q, norms.q_norm), normed(k, norms.k_norm), v, 20**-0.5)
    expected = y.flatten(2) @ layer.o_proj.weight.T
    equal_with_gradients(layer(x, context(layer, 7)), expected, x, *layer.parameters())
    if normalization == "rmsnorm":  # as the models that have it, in float32 inside
        reference = Qwen3RMSNorm if qk_norm == "head" else Olmo2RMSNorm
        expected = functional_call(reference(norms.q_norm.weight.numel(), eps=1e-5), {"weight": norms.q_norm.weight},
                                   q if qk_norm == "head" else q.flatten(2))
        equal(norms(q, k)[0], expected.view(q.shape).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("attn_gate", ["elementwise", "headwise"])
def test_a_gate_multiplies_the_output_of_attention(attn_gate, bias):
    """Qiu et al. 2025: Y ⊙ sigmoid(X W), X the input of attention, before the output projection."""
    layer, x = attention("manual", attn_gate=attn_gate, n_kv_head=2, bias=bias, head_dim=20), draw(2, 7, 48)
    gate = (x @ layer.gate.gate_proj.weight.T + (layer.gate.gate_proj.bias if bias else 0.0)).sigmoid()
    assert gate.shape == (2, 7, 80 if attn_gate == "elementwise" else 4)
    gate = gate.view(2, 7, 4, 20) if attn_gate == "elementwise" else gate[..., None]
    y = causal_attention(*projected(layer, x), 20**-0.5) * gate
    expected = y.flatten(2) @ layer.o_proj.weight.T + (layer.o_proj.bias if bias else 0.0)
    equal_with_gradients(layer(x, context(layer, 7)), expected, x, *layer.parameters())


def test_value_embeddings_join_the_values_of_the_first_and_last_layers():
    m = model(n_layer=5, value_embeddings=2, n_kv_head=2, position_encoding="none")
    assert [b.attn.value_table for b in m.blocks] == [0, 1, None, 1, 0]
    assert [b.attn.value_mix is not None for b in m.blocks] == [True, True, False, True, True]
    idx = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    x = m.token_embedding.weight[idx]
    for block, table in zip(m.blocks, (0, 1, None, 1, 0), strict=True):
        layer, h = block.attn, block.attn_residual.norm(x)
        q, k, v = projected(layer, h)
        if table is not None:
            v = layer.value_mix.own * v + layer.value_mix.other * m.value_embeddings[table].weight[idx].view(v.shape)
        x = x + causal_attention(q, k, v, 12**-0.5).flatten(2) @ layer.o_proj.weight.T
        x = x + block.ffn(block.ffn_residual.norm(x))
    equal_with_gradients(m(idx), m.final_norm(x) @ m.lm_head.weight.T, *m.parameters())


def test_value_mix_is_initialised_to_half_of_each():
    m = build_model(config(value_embeddings=1))
    mix = m.blocks[0].attn.value_mix
    assert mix.own.item() == mix.other.item() == 0.5 and m.value_embeddings[0].weight.shape == (61, 48)
    v, e = draw(2, 3, 4, 12), draw(2, 3, 4, 12, seed=1)
    mix = randomised(mix)
    equal_with_gradients(mix(v, e), mix.own * v + mix.other * e, v, e, mix.own, mix.other)


@pytest.mark.parametrize("keys, scale", [
    (dict(), 12**-0.5), (dict(head_dim=20), 20**-0.5), (dict(attn_scale=0.3), 0.3),
    (dict(init="mup", mup_base_width=48), 12**-0.5), (dict(init="mup", mup_base_width=12), 0.5 * 12**-0.5),
    (dict(init="mup", attn_scale=0.3), 0.3)], ids=str)
@pytest.mark.parametrize("backend", CPU_TRAINABLE)
def test_the_attention_scale_is_the_configured_one_or_follows_from_head_dim(backend, keys, scale):
    layer, x = attention(backend, **keys), draw(2, 7, 48)
    expected = causal_attention(*projected(layer, x), scale).flatten(2) @ layer.o_proj.weight.T
    equal_with_gradients(layer(x, context(layer, 7)), expected, x, *layer.parameters())


@pytest.mark.parametrize("backend", CPU_TRAINABLE)
def test_dropout_keeps_the_mean_of_attention(backend):
    layer, x = attention(backend, dropout=0.5), draw(1, 5, 48)
    five = context(layer, 5)
    without_dropout = layer(x, five)
    layer.train()
    torch.manual_seed(0)
    mean = torch.stack([layer(x, five) for _ in range(2000)]).mean(0)
    assert not torch.equal(layer(x, five), layer(x, five))
    atol = 0.1 * without_dropout.abs().max().item()  # 1 / sqrt(2000) is 0.02
    torch.testing.assert_close(mean, without_dropout, rtol=0, atol=atol)


# ---------------------------------------------------------------- generation

GENERATING = {
    "learned": dict(position_encoding="learned_absolute"),
    "sinusoidal": dict(position_encoding="sinusoidal"),
    "alibi": dict(position_encoding="alibi", n_kv_head=2),
    "nope": dict(position_encoding="none"),
    **{f"rope, {s}": dict(position_encoding="rope", rope_scaling=s, rope_scaling_factor=4.0) for s in
       ("none", "linear", "llama3", "yarn")},
    "rope in some layers": dict(position_encoding="rope", rope_pattern="RN", n_kv_head=2),
    "partial rope": dict(position_encoding="rope", rope_fraction=0.5, rope_theta=100.0),
    "rope base per window": dict(position_encoding="rope", rope_theta=1e6, rope_theta_local=100.0, window_pattern="SL"),
    "multi-query": dict(position_encoding="rope", n_kv_head=1),
    "wide heads": dict(position_encoding="rope", n_kv_head=2, head_dim=20),
    "qk_norm head": dict(position_encoding="rope", qk_norm="head", n_kv_head=2, normalization="rmsnorm"),
    "qk_norm projection": dict(position_encoding="rope", qk_norm="projection", n_kv_head=2),
    "gate": dict(position_encoding="rope", attn_gate="elementwise"),
    "headwise gate": dict(position_encoding="rope", attn_gate="headwise"),
    "softcaps": dict(position_encoding="rope", attn_softcap=1.0, logit_softcap=5.0),
    "value embeddings": dict(position_encoding="rope", value_embeddings=1, n_kv_head=2),
    "x0": dict(position_encoding="rope", x0_mix=True, embedding_norm=True, embedding_scale="sqrt"),
    "one norm": dict(position_encoding="rope", parallel_block="one_norm"),
    "two norms": dict(position_encoding="rope", parallel_block="two_norms", residual_scale=0.5),
    "post-norm": dict(position_encoding="learned_absolute", norm_position="post", bias=True),
    "documents": dict(position_encoding="rope", mask_documents=True),
    "mup": dict(position_encoding="rope", init="mup", mup_base_width=24, attn_scale=0.5),
    "all at once": dict(position_encoding="rope", rope_scaling="yarn", rope_scaling_factor=4.0, n_kv_head=2,
                        window_pattern="SSL", n_layer=3, qk_norm="head", attn_gate="headwise", value_embeddings=1,
                        x0_mix=True, norm_position="sandwich", ffn_type="swiglu"),
}
UNTIED = dict(weight_tying=False, init_std=0.4)  # so that the likeliest token is rarely the previous one


def generated(m, prompt, n):
    """The prompt and n greedy tokens after it, asserted to be equal with and without a cache."""
    cached = m.generate(prompt, n, temperature=0)
    assert torch.equal(cached, m.generate(prompt, n, temperature=0, use_cache=False))
    assert torch.equal(cached[:, :prompt.shape[1]], prompt) and cached.shape[1] == prompt.shape[1] + n
    return cached


@pytest.mark.grid(6)
@pytest.mark.parametrize("name, window", [
    *itertools.product(GENERATING, (None, 5)), *itertools.product(("learned", "alibi", "all at once"), (1, 24))])
def test_a_cache_changes_no_token(name, window):
    """With prompts shorter and longer than the window, and past block_size."""
    m, tokens = model(**UNTIED, **GENERATING[name], sliding_window=window), set()
    for B, start, n in ((2, 3, 26), (1, 9, 6)):  # block_size is 24
        prompt = torch.randint(0, 61, (B, start), generator=torch.Generator().manual_seed(B))
        tokens |= set(generated(m, prompt, n)[0, start:].tolist())
    assert len(tokens) > 3


@pytest.mark.parametrize("backend, name, window", [
    ("manual", "alibi", 5), ("manual", "all at once", 5), ("flex", "softcaps", None), ("flex", "alibi", 5),
    ("flex", "all at once", 5)])
def test_a_cache_changes_no_token_on_any_backend(backend, name, window, untraced):
    m = model(**UNTIED, **GENERATING[name], sliding_window=window, attention_backend=backend)
    prompt = torch.randint(0, 61, (1, 7), generator=torch.Generator().manual_seed(1))
    assert len(set(generated(m, prompt, 6)[0, 7:].tolist())) > 1


@pytest.mark.grid(6)
@pytest.mark.parametrize("lengths", [(24,), (1,) * 24, (7, 1, 9, 1, 1, 5), (3, 21), (20, 4)])
@pytest.mark.parametrize("name", GENERATING)
def test_a_sequence_in_chunks_has_the_logits_of_the_whole(name, lengths):
    m = model(**{**GENERATING[name], "sliding_window": 6})
    idx = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(1))
    caches = [block.attn.new_cache() for block in m.blocks]
    with torch.no_grad():
        logits = [m(chunk, caches=caches) for chunk in idx.split(lengths, dim=1)]
        equal(torch.cat(logits, dim=1), m(idx))


@pytest.mark.parametrize("window", [1, 2, 5, 24, 100])
def test_a_windowed_cache_stores_only_what_the_next_token_sees(window):
    m = model(sliding_window=window, window_pattern="SL", n_layer=3, n_kv_head=2, position_encoding="rope")
    caches = [block.attn.new_cache() for block in m.blocks]
    idx, length = torch.arange(24)[None], 0
    with torch.no_grad():
        for chunk in idx.split((9, *(1,) * 15), dim=1):
            m(chunk, caches=caches)
            length += chunk.shape[1]
            for cache, windowed in zip(caches, (True, False, True), strict=True):
                assert cache.length == length
                if windowed:
                    assert cache.k.shape == cache.v.shape == (1, 2, min(length, window - 1), 12)
                    stored = cache.k.untyped_storage().nbytes() / (8 * 2 * 12)  # tokens, in the whole storage
                    assert stored <= max(chunk.shape[1], window) + window


def test_a_model_that_is_not_causal_does_not_generate():
    with pytest.raises(UserError, match="causal=False"):
        build_model(config(causal=False)).generate(torch.zeros(1, 1, dtype=torch.long), 1)
