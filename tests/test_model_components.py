"""model_components: each part against an independent implementation, in float64."""

import re

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import model_components as parts
from model_builder import build_model
from model_config import ModelConfig, get_preset

TINY = dict(n_layer=2, n_head=4, n_embd=48, vocab_size=61, block_size=24)


def randomised(model, seed=0):
    """The model in float64 with random norms and biases too: weights left at one hide bugs."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.double().eval()


def config(**overrides):
    return ModelConfig(**{**TINY, **overrides}).resolve()


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # float64: rounding of a few hundred operations


@pytest.mark.parametrize("kv_heads, tied", [(4, False), (2, True)])
def test_llama_preset_is_transformers_llama(kv_heads, tied):
    theirs = randomised(LlamaForCausalLM(LlamaConfig(
        hidden_size=48, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads,
        vocab_size=61, max_position_embeddings=24, rms_norm_eps=1e-5, tie_word_embeddings=tied, rope_theta=10000.0,
        attn_implementation="eager")))
    ours = build_model(get_preset("llama", **TINY, n_kv_head=kv_heads, d_ff=128, weight_tying=tied)).double().eval()
    renamed = {"attn_residual.norm": "input_layernorm", "ffn_residual.norm": "post_attention_layernorm",
               "attn.": "self_attn.", "ffn.": "mlp.", "blocks.": "model.layers.", "final_norm": "model.norm",
               "token_embedding": "model.embed_tokens"}

    def there(name, state):
        for mine, other in renamed.items():
            name = name.replace(mine, other)
        return state[name]

    # transformers computes RMSNorm and the angles in float32 whatever the model's dtype
    assert_same_outputs_and_gradients(ours, theirs, there, rtol=1e-5, atol=1e-5)


def test_gpt2_openai_preset_is_transformers_gpt2():
    theirs = randomised(GPT2LMHeadModel(GPT2Config(
        n_layer=2, n_head=4, n_embd=48, vocab_size=61, n_positions=24, attn_implementation="eager",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)))
    ours = build_model(get_preset("gpt2_openai", **TINY)).double().eval()
    renamed = {"blocks.": "transformer.h.", "token_embedding": "transformer.wte",
               "position.embedding": "transformer.wpe", "final_norm": "transformer.ln_f",
               "attn_residual.norm": "ln_1", "ffn_residual.norm": "ln_2",
               "ffn.up_proj": "mlp.c_fc", "ffn.down_proj": "mlp.c_proj", "attn.o_proj": "attn.c_proj"}

    def there(name, state):
        for mine, other in renamed.items():
            name = name.replace(mine, other)
        if match := re.search("[qkv]_proj", name):  # GPT-2 keeps the three in one
            value = state[name.replace(match[0], "c_attn")].chunk(3, dim=-1)["qkv".index(match[0][0])]
        else:
            value = state[name]
        return value.T if re.search(r"(_proj|\.c_\w+)\.weight", name) else value  # and its matrices transposed

    assert_same_outputs_and_gradients(ours, theirs, there)


def assert_same_outputs_and_gradients(ours, theirs, there, rtol=1e-10, atol=1e-10):
    """With their weights in our model. there(our name, {their name: tensor}) -> the tensor that answers ours."""
    with torch.no_grad():
        for name, p in ours.named_parameters():
            value = there(name, dict(theirs.named_parameters()))
            assert p.shape == value.shape, name
            p.copy_(value)
    idx = torch.randint(0, 61, (3, 24), generator=torch.Generator().manual_seed(1))
    logits, loss = ours(idx, idx.roll(-1, 1))
    expected = theirs(idx).logits
    torch.testing.assert_close(logits, expected, rtol=rtol, atol=atol)
    reference = F.cross_entropy(expected.flatten(0, 1), idx.roll(-1, 1).flatten())
    # The loss is computed in float32, as under mixed precision.
    torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=0.0)
    logits.square().sum().backward()
    expected.square().sum().backward()
    gradients = {n: q.grad for n, q in theirs.named_parameters()}
    largest = max(g.abs().max().item() for g in gradients.values())  # a key's bias has none but rounding
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, there(name, gradients), rtol=rtol, atol=atol * largest,
                                   msg=lambda m, name=name: f"{name}: {m}")


def test_norms():
    c, x = config(), torch.randn(5, 7, 48, dtype=torch.float64) * 3 + 1
    for cls in (parts.LayerNorm, parts.LayerNormNoBias):
        norm = randomised(cls(c))
        bias = norm.bias if norm.bias is not None else 0.0
        centred = x - x.mean(-1, keepdim=True)
        equal(norm(x), centred / (centred.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * norm.weight + bias)
    assert parts.LayerNormNoBias(c).bias is None
    norm, reference = randomised(parts.RMSNorm(c)), LlamaRMSNorm(48, eps=c.norm_eps).double()
    reference.weight.data = norm.weight.data
    # transformers normalises in float32 whatever it is given
    torch.testing.assert_close(norm(x), reference(x), rtol=1e-6, atol=1e-6)


def test_activations_are_their_formulas():
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    for cls, formula in {
        parts.GELU: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        parts.GELUTanh: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        parts.SiLU: x / (1 + torch.exp(-x)),
        parts.ReLU: x.clamp(min=0),
        parts.LeakyReLU: torch.where(x > 0, x, 0.01 * x),
    }.items():
        equal(cls()(x), formula)


def test_rope_turns_by_position_and_keeps_relative_distance():
    c = config(position_encoding="rope", head_dim=8)
    rope = parts.RotaryPositions(c)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        tables = rope.tables(torch.tensor([i, j]))
        turned, _ = rope.rotate(torch.cat((q, k), dim=2), q, tables)
        return (turned[0, 0, 0] * turned[0, 0, 1]).sum()

    # angles are float32, so agreement is to float32's rounding
    torch.testing.assert_close(score(3, 10), score(103, 110), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(score(3, 10), score(3, 11))
    untouched, _ = rope.rotate(q, k, rope.tables(torch.tensor([0])))
    equal(untouched, q)


def test_post_norm_normalises_the_sum():
    c = config(norm_position="post")
    residual, x = randomised(parts.PostNorm(c)), torch.randn(2, 3, 48, dtype=torch.float64)
    equal(residual(x, torch.tanh), residual.norm(x + torch.tanh(x)))
    pre = randomised(parts.PreNorm(c))
    equal(pre(x, torch.tanh), x + torch.tanh(pre.norm(x)))


@pytest.mark.parametrize("n_head, n_kv_head, T", [(4, 4, 24), (4, 2, 17), (4, 1, 5), (1, 1, 24), (4, 4, 1)])
def test_attention_backends_agree(n_head, n_kv_head, T):
    options = dict(n_head=n_head, n_kv_head=n_kv_head, bias=True, position_encoding="rope")
    sdpa, manual = (build_model(config(**options, attention_backend=b)).double().eval() for b in ("sdpa", "manual"))
    idx = torch.randint(0, 61, (2, T))
    a, b = sdpa(idx)[0], manual(idx)[0]
    equal(a, b)
    for model, out in ((sdpa, a), (manual, b)):
        out.square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    for p, q in zip(sdpa.parameters(), manual.parameters(), strict=True):
        equal(p.grad, q.grad)


@pytest.mark.parametrize("backend", ["sdpa", "manual"])
def test_the_future_is_not_seen(backend):
    model = build_model(config(attention_backend=backend, position_encoding="none")).double().eval()
    idx = torch.randint(0, 61, (1, 24))
    changed = idx.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 61
    equal(model(idx)[0][:, :12], model(changed)[0][:, :12])
    assert not torch.allclose(model(idx)[0][:, 12:], model(changed)[0][:, 12:])


@pytest.mark.parametrize("backend", ["sdpa", "manual"])
def test_dropout_acts_in_training_alone(backend):
    model = build_model(config(attention_backend=backend, dropout=0.5))
    idx = torch.randint(0, 61, (2, 24))
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])
