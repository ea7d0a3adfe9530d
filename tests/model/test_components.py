"""model_components: each component against an independent implementation, outputs and gradients, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from parity import config, draw, equal, equal_with_gradients, model, randomised
from torch.func import functional_call
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import model_components as components
from model_attention import ForwardContext
from model_builder import Block, ParallelBlock, ParallelBlockOneNorm, build_model
from model_config import NORMALIZATION

# ---------------------------------------------------------------- norms


def layer_norm(x, p, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * p["weight"] + p.get("bias", 0.0)


def rms_norm(x, p, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * p["weight"]


NORMS = {  # the formula of its paper
    "layernorm": layer_norm,
    "layernorm_nobias": layer_norm,
    "rmsnorm": rms_norm,
    "rmsnorm_gemma": lambda x, p, eps: rms_norm(x, {"weight": 1.0 + p["weight"]}, eps),
    "dyt": lambda x, p, eps: torch.tanh(p["alpha"] * x) * p["weight"] + p["bias"],
}


@pytest.mark.parametrize("eps", [1e-6, 0.3])
@pytest.mark.parametrize("name", NORMALIZATION)
def test_a_norm_is_its_formula(name, eps):
    norm = randomised(components.build_norm(config(normalization=name, norm_eps=eps)))
    x, p = draw(5, 7, 48), dict(norm.named_parameters())
    assert all(w.std() > 0.01 for n, w in p.items() if n != "alpha")
    equal_with_gradients(norm(3 * x + 1), NORMS[name](3 * x + 1, p, eps), x, *p.values())


def test_norms_have_the_parameters_of_their_papers():
    for name, expected in {"layernorm": {"weight", "bias"}, "layernorm_nobias": {"weight"}, "rmsnorm": {"weight"},
                           "rmsnorm_gemma": {"weight"}, "dyt": {"alpha", "weight", "bias"}}.items():
        norm = components.build_norm(config(normalization=name), 10)
        assert {n for n, _ in norm.named_parameters()} == expected
        assert norm(torch.ones(3, 10)).shape == (3, 10)


@pytest.mark.parametrize("name, reference", [("rmsnorm", LlamaRMSNorm), ("rmsnorm_gemma", Gemma2RMSNorm)])
def test_rms_norms_are_transformers(name, reference):
    norm = randomised(components.build_norm(config(normalization=name, norm_eps=1e-6)))
    x = draw(5, 7, 48)
    expected = functional_call(reference(48, eps=1e-6).double(), {"weight": norm.weight}, x)
    equal_with_gradients(norm(x), expected, x, norm.weight, rtol=1e-5, atol=1e-5)  # transformers' is float32 inside


@pytest.mark.parametrize("name", NORMALIZATION)
def test_an_initial_norm_leaves_normalised_input_unchanged(name):
    """Every gain is initialised to one and every shift to zero; DyT's alpha to the paper's 0.5."""
    norm = build_model(config(normalization=name)).final_norm
    x = F.layer_norm(torch.randn(4, 48), (48,))
    expected = torch.tanh(0.5 * x) if name == "dyt" else x
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-4)  # float32, and norm_eps


# ---------------------------------------------------------------- norm positions

POSITIONS = {  # the residual branch f, the norms n and (sandwich) m, the scale of what is added
    "pre": lambda x, f, n, m, s: x + s * f(n(x)),
    "post": lambda x, f, n, m, s: n(x + s * f(x)),
    "sandwich": lambda x, f, n, m, s: x + s * m(f(n(x))),
    "reordered": lambda x, f, n, m, s: x + s * n(f(x)),
}


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("name", POSITIONS)
def test_a_norm_position_is_its_formula(name, scale):
    c = config(norm_position=name, residual_scale=scale, normalization="layernorm")
    residual, x = randomised(components.component("norm_position", c)(c)), draw(2, 3, 48)
    after = getattr(residual, "norm_after", None)
    assert (after is not None) == (name == "sandwich")
    stream, pending = residual(x, torch.tanh)
    equal_with_gradients(stream if pending is None else stream + pending,
                         POSITIONS[name](x, torch.tanh, residual.norm, after, scale), x, *residual.parameters())
    left = draw(2, 3, 48, seed=1)  # a sum that the sublayer before has left to this norm
    stream, pending = residual(x, torch.tanh, left)
    equal_with_gradients(stream if pending is None else stream + pending,
                         POSITIONS[name](x + left, torch.tanh, residual.norm, after, scale), x, left)


@pytest.mark.parametrize("name, cls, norms", [
    *((name, cls, norms) for name in POSITIONS for cls, norms in ((Block, 2), (ParallelBlockOneNorm, 1))),
    *((name, ParallelBlock, 2) for name in POSITIONS if name != "post")])  # one sum has one norm
def test_a_block_joins_attention_and_ffn_as_its_name_says(name, cls, norms):
    block = randomised(cls(config(norm_position=name, residual_scale=0.3), 0))
    x, attn, ffn = draw(2, 3, 48), torch.tanh, torch.sin
    a, f = block.attn_residual, block.ffn_residual
    assert sum(isinstance(r, components.PreNorm) for r in (a, f)) == norms

    def joined(x, residual, sublayer):
        return POSITIONS[name](x, sublayer, residual.norm, getattr(residual, "norm_after", None), 0.3)

    if cls is Block:
        expected = joined(joined(x, a, attn), f, ffn)
    elif cls is ParallelBlock:
        expected = joined(x, a, attn) + joined(x, f, ffn) - x
    else:
        expected = joined(x, a, lambda h: attn(h) + ffn(h))
    leaves = [p for r in (a, f) if r is not None for p in r.parameters()]
    equal_with_gradients(block.combine(x, attn, ffn), expected, x, *leaves)


# ---------------------------------------------------------------- activations and FFNs

ACTIVATIONS = {  # transformers' or torch's, and the formula
    "gelu": (ACT2FN["gelu"], lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
    "gelu_tanh": (ACT2FN["gelu_pytorch_tanh"],
                  lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))),
    "silu": (ACT2FN["silu"], lambda x: x / (1 + torch.exp(-x))),
    "relu": (ACT2FN["relu"], lambda x: x.clamp(min=0)),
    "relu2": (ACT2FN["relu2"], lambda x: torch.where(x > 0, x * x, 0 * x)),
    "leaky_relu": (ACT2FN["leaky_relu"], lambda x: torch.where(x > 0, x, 0.01 * x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_its_formula(name):
    activation = components.component("activation", config(activation=name))()
    x = torch.linspace(-5, 5, 102, dtype=torch.float64, requires_grad=True)  # not zero itself, where some have a kink
    for reference in ACTIVATIONS[name]:
        equal_with_gradients(activation(x), reference(x), x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ffn_type, activation", [
    *(("standard", name) for name in ACTIVATIONS), ("swiglu", "silu"), ("geglu", "gelu"), ("geglu", "gelu_tanh"),
    ("reglu", "relu")])
def test_an_ffn_is_its_formula(ffn_type, activation, bias):
    c = config(ffn_type=ffn_type, activation=activation, bias=bias, d_ff=40)
    ffn, x = randomised(components.component("ffn_type", c)(c)), draw(2, 5, 48)
    p, act = dict(ffn.named_parameters()), ACTIVATIONS[activation][1]

    def linear(name, x):
        return x @ p[f"{name}_proj.weight"].T + (p[f"{name}_proj.bias"] if bias else 0.0)

    hidden = act(linear("up", x)) if ffn_type == "standard" else act(linear("gate", x)) * linear("up", x)
    assert hidden.shape == (2, 5, 40) and len(p) == (2 if ffn_type == "standard" else 3) * (1 + bias)
    equal_with_gradients(ffn(x), linear("down", hidden), x, *p.values())


def test_swiglu_is_transformers():
    ffn, x = randomised(components.SwiGLU(config(ffn_type="swiglu", bias=True))), draw(2, 5, 48)
    llama = LlamaConfig(hidden_size=48, intermediate_size=128, num_attention_heads=4, mlp_bias=True)
    reference = LlamaMLP(llama).double()
    equal_with_gradients(ffn(x), functional_call(reference, dict(ffn.named_parameters()), x), x, *ffn.parameters())


# ---------------------------------------------------------------- the residual stream


def test_x0_mix_is_two_trained_scalars_a_block():
    mix, x, x0 = randomised(components.X0Mix()), draw(2, 3, 48), draw(2, 3, 48, seed=1)
    equal_with_gradients(mix(x, x0), mix.stream * x + mix.first * x0, x, x0, mix.stream, mix.first)
    plain, mixed = (build_model(config(x0_mix=on)).double() for on in (False, True))
    idx = torch.arange(24)[None]
    equal(plain(idx), mixed(idx))  # the initial mix is the stream alone


def stream(m, idx, embedded):
    """Logits of model `m` from its blocks, for the stream that begins with `embedded`."""
    x = embedded
    positions = torch.arange(idx.shape[1])
    context = ForwardContext(positions, {None: None}, m.masks(positions), x0=torch.zeros_like(x))
    for block in m.blocks:
        x = block(x if block.x0_mix is None else block.x0_mix.stream * x + block.x0_mix.first * embedded, context)
    return m.final_norm(x) @ m.lm_head.weight.T


@pytest.mark.parametrize("scale, factor", [(1.0, 1.0), (2.5, 2.5), ("sqrt", 48**0.5)])
@pytest.mark.parametrize("position", ["learned_absolute", "sinusoidal", "none"])
def test_embeddings_are_scaled_then_get_positions_then_are_normalised(scale, factor, position):
    idx = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    for norm in (False, True):
        m = model(embedding_scale=scale, embedding_norm=norm, position_encoding=position, normalization="layernorm",
                  qk_norm="head")
        x = m.position.embed(m.token_embedding.weight[idx] * factor, torch.arange(9))
        expected = stream(m, idx, layer_norm(x, dict(m.embedding_norm.named_parameters()), 1e-5) if norm else x)
        equal_with_gradients(m(idx), expected, *m.parameters())


def test_the_blocks_mix_in_the_normalised_embeddings():
    m = model(x0_mix=True, embedding_norm=True, embedding_scale=2.0, position_encoding="none")
    idx = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    x = x0 = m.embedding_norm(2.0 * m.token_embedding.weight[idx])
    context = ForwardContext(torch.arange(9), {None: None}, m.masks(torch.arange(9)))
    for block in m.blocks:
        mixed = block.x0_mix.stream * x + block.x0_mix.first * x0
        x = block.combine(mixed, lambda h, b=block: b.attn(h, context), block.ffn)
    equal_with_gradients(m(idx), m.final_norm(x) @ m.lm_head.weight.T, *m.parameters())


# ---------------------------------------------------------------- the output head


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_head_scales_then_caps(cap, scale):
    head, x = randomised(components.OutputHead(config(logit_softcap=cap), scale), std=1.0), draw(2, 5, 48)
    logits = scale * (x @ head.weight.T)
    assert logits.abs().max() > 2
    equal_with_gradients(head(x), logits if cap is None else cap * torch.tanh(logits / cap), x, head.weight)


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("backend", ["sdpa", "manual"])
def test_dropout_acts_only_in_training(backend):
    m = build_model(config(attention_backend=backend, dropout=0.5))
    idx = torch.randint(0, 61, (2, 24))
    m.train()
    assert not torch.equal(m(idx), m(idx))
    m.eval()
    assert torch.equal(m(idx), m(idx))


# ---------------------------------------------------------------- linear layers that read the same input


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_linear_layers_joined_in_one_product_are_the_layers(bias, frozen, dtype):
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    layers = [torch.nn.Linear(6, width, bias=bias, dtype=weight_dtype) for width in (8, 4, 4)]
    x = torch.randn(2, 5, 6, dtype=weight_dtype, requires_grad=True)
    if frozen is not None:
        layers[frozen].weight.requires_grad = False

    def results():
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            outputs = components.joint_linear(x, *layers)
        parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
        loss = sum((i + 1) * y.double().sin().sum() for i, y in enumerate(outputs))
        return *outputs, *torch.autograd.grad(loss, [x, *parameters])

    expected = results()
    values = [layer.weight.clone() for layer in layers]
    components.place_adjacent(*layers)
    assert all(torch.equal(layer.weight, value) for layer, value in zip(layers, values, strict=True))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2  # bfloat16 has 8 bits
    for actual, wanted in zip(results(), expected, strict=True):
        assert actual.dtype == wanted.dtype
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


def joined(attn):
    return components.are_adjacent([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight])


def test_queries_keys_and_values_are_one_product_on_cuda_alone():
    net = build_model(config(n_layer=2))
    assert not any(joined(block.attn) for block in net.blocks)  # on a CPU one product is no faster than three
    net.place_weights(torch.device("cuda"))
    assert all(joined(block.attn) for block in net.blocks)
    assert not joined(copy.deepcopy(net.blocks[0].attn))


def test_weights_are_placed_again_whenever_they_move(monkeypatch):
    net, devices = build_model(config()), []
    monkeypatch.setattr(type(net.blocks[0].attn), "place_weights", lambda attn, device: devices.append(device))
    net.to(torch.bfloat16)
    assert devices == [torch.device("cpu")] * len(net.blocks)


def test_weights_that_are_joined_learn_as_those_that_are_not():
    separate, joint = build_model(config()), build_model(config())
    joint.place_weights(torch.device("cuda"))
    assert joined(joint.blocks[0].attn) and not joined(separate.blocks[0].attn)
    for net in (joint, separate):
        tokens = torch.arange(16).view(2, 8)
        net(tokens, tokens).backward()
        torch.optim.SGD(net.parameters(), lr=0.1).step()
    for (name, p), q in zip(joint.named_parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=name)
