"""The loss by chunks is the plain loss: value, gradients, what is held; for every reduction, head and precision."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from blockgpt.accounting.memory_trace import LiveBytes
from blockgpt.kernels.linear_cross_entropy import chunk_slices, linear_cross_entropy
from model_builder import build_model
from model_config import auto_loss_chunk, get_preset

EPS = torch.finfo(torch.float32).eps
TINY = dict(n_layer=1, n_head=2, n_embd=32, vocab_size=96, block_size=24, init_std=0.2)


def plain(h, weight, targets, cap=None, reduction="mean"):
    """Written out, in the precision of the inputs."""
    z = h @ weight.T
    z = z if cap is None else torch.tanh(z / cap) * cap
    return F.cross_entropy(z, targets, ignore_index=-1, reduction=reduction)


def example(tokens, width, vocabulary, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h, weight = (torch.randn(n, width, dtype=dtype, generator=generator, requires_grad=True)
                 for n in (tokens, vocabulary))
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.3] = -1
    targets[0] = 0  # at least one
    return h, weight, targets


@settings(max_examples=60)
@given(tokens=st.integers(1, 40), width=st.integers(1, 9), vocabulary=st.integers(1, 30), chunk=st.integers(1, 45),
       cap=st.sampled_from([None, 0.7, 30.0]), reduction=st.sampled_from(["mean", "sum"]))
def test_loss_and_gradients_are_the_plain_ones_in_float64(tokens, width, vocabulary, chunk, cap, reduction):
    h, weight, targets = example(tokens, width, vocabulary, torch.float64)
    expected, found = (loss(h, weight, targets, *more) for loss, more in (
        (plain, (cap, reduction)), (linear_cross_entropy, (chunk, cap, reduction))))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    for a, b in zip(torch.autograd.grad(found * 3, (h, weight)), torch.autograd.grad(expected * 3, (h, weight)),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_the_gradients_are_those_of_finite_differences():
    h, weight, targets = example(7, 3, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, 3, 2.0), (h, weight))
    assert torch.autograd.gradcheck(lambda h: linear_cross_entropy(h, weight.detach(), targets, 3), (h,))
    assert torch.autograd.gradcheck(lambda w: linear_cross_entropy(h.detach(), w, targets, 3), (weight,))


def test_without_targets_the_mean_is_nan_and_its_gradients_zero_as_torchs():
    h, weight, targets = example(7, 3, 5, torch.float32)
    targets.fill_(-1)
    for loss in (plain(h, weight, targets), linear_cross_entropy(h, weight, targets, 3)):
        assert loss.isnan()
        assert all(g.eq(0).all() for g in torch.autograd.grad(loss, (h, weight)))


def losses_and_gradients(model, idx, targets, dtype=torch.float32):
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = model(idx, targets)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


# A tied head, an untied one, softcaps, scaled logits.
@pytest.mark.parametrize("name, keys", [("gpt2", {}), ("llama", {}), ("gemma2", {}), ("llama", {"init": "mup",
                                        "mup_base_width": 16})], ids=["tied", "untied", "softcap", "scaled"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 16 * EPS), (torch.bfloat16, 2**-6)], ids=str)
def test_a_model_has_the_same_loss_and_gradients(name, keys, dtype, tolerance):
    idx = torch.randint(0, 96, (3, 25), generator=torch.Generator().manual_seed(1))
    x, y = idx[:, :-1], idx[:, 1:].clone()
    y[:, ::4] = -1
    model = build_model(get_preset(name, **TINY, **keys, loss_chunk=0))
    expected, gradients = losses_and_gradients(model, x, y, dtype)
    model.lm_head.loss_chunk = 20  # of 72 tokens
    found, chunked = losses_and_gradients(model, x, y, dtype)
    torch.testing.assert_close(found, expected, rtol=tolerance / 4, atol=0)
    for parameter, gradient in gradients.items():
        assert chunked[parameter].dtype == gradient.dtype
        assert (chunked[parameter] - gradient).norm() <= tolerance * gradient.norm(), parameter


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "parameters in bfloat16"])
def test_losses_and_sums_over_chunks_are_in_float32(autocast):
    """Equal terms: a sum in bfloat16 would no longer grow after 256 of them."""
    h, weight, targets = example(1, 8, 12, torch.float32)
    low_h, low_weight = h.detach().bfloat16(), weight.detach().bfloat16().requires_grad_()
    inputs = (h, weight) if autocast else (low_h, low_weight)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = linear_cross_entropy(inputs[0].expand(512, -1), inputs[1], targets.expand(512), 1, reduction="sum")
    z = (low_h @ low_weight.T).float()
    torch.testing.assert_close(loss / 512, F.cross_entropy(z, targets), rtol=16 * EPS, atol=0)
    grad = (z.softmax(-1) - F.one_hot(targets, 12)).bfloat16()
    expected = 512 * (grad.T @ low_h).to(inputs[1].dtype)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs[1])[0], expected, rtol=512 * EPS, atol=0)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_every_reduction_also_without_gradients(reduction):
    model = build_model(get_preset("gemma2", **TINY, loss_chunk=0))
    x = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    y = x.roll(1, 1).masked_fill(x % 5 == 0, -1)
    weights = torch.rand(x.shape) if reduction == "none" else torch.tensor(1.0)
    results = []
    for chunk in (0, 20):
        model.lm_head.loss_chunk = chunk
        model.zero_grad(set_to_none=True)
        loss = model(x, y, reduction=reduction)
        (loss * weights).sum().backward()
        with torch.no_grad():
            evaluated = model(x, y, reduction=reduction)
        torch.testing.assert_close(evaluated, loss, rtol=4 * EPS, atol=0)
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert results[0][0].shape == results[1][0].shape
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 16 * EPS * a.norm()


# ---- memory

TOKENS, WIDTH, VOCABULARY, CHUNK = 1024, 32, 4096, 64


def test_it_holds_less_than_a_tenth_of_the_logits():
    """Held for the backward pass, and alive at any moment of forward and backward pass. Gradients are counted."""
    h, weight, targets = example(TOKENS, WIDTH, VOCABULARY, torch.float32)
    saved = {}

    def save(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def measure(loss, *arguments):
        saved.clear()
        with LiveBytes([h, weight, targets]) as live, torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            loss(h, weight, targets, *arguments).backward()
            h.grad = weight.grad = None
        own = {h.data_ptr(), weight.data_ptr(), targets.data_ptr()}
        return sum(size for address, size in saved.items() if address not in own), max(b for _, b in live.events)

    logits = 4 * TOKENS * VOCABULARY
    saved_plain, peak_plain = measure(plain)
    saved_chunked, peak_chunked = measure(linear_cross_entropy, CHUNK)
    assert saved_plain >= logits and peak_plain >= 2 * logits
    assert saved_chunked < saved_plain / 10
    assert peak_chunked < peak_plain / 5  # two tensors of a chunk, the gradients twice


def test_auto_cuts_no_small_micro_batch():
    assert [auto_loss_chunk(v) for v in (1, 320, 50304, 128256, 2**28, 2**32)] == [2**28, 2**19, 4096, 2048, 1, 1]
    config = get_preset("llama", **TINY)
    assert config.loss_chunk == "auto" and config.resolve().loss_chunk == 2**21
    model, x = build_model(config), torch.zeros(2, 24, dtype=torch.long)
    model.lm_head.chunked_loss = None  # is not called
    model(x, x)


@given(tokens=st.integers(1, 100), chunk=st.integers(1, 120))
def test_chunks_cover_every_token_once(tokens, chunk):
    slices = chunk_slices(tokens, chunk)
    assert [i for s in slices for i in range(tokens)[s]] == list(range(tokens))
    assert all(s.stop - s.start == chunk for s in slices[:-1])


# ---- with torch's machinery


def test_the_head_computes_as_many_products_as_without_chunks():
    h, weight, targets = example(50, 8, 20, torch.float32)
    counts = []
    for loss, more in ((plain, ()), (linear_cross_entropy, (8,))):
        # The counter does not know the product that adds in place.
        in_place = {torch.ops.aten.addmm_: lambda *shapes, out_shape: addmm_flop(*shapes)}
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            loss(h, weight, targets, *more).backward()
        counts.append(counter.get_total_flops())
    assert counts == [3 * 2 * 50 * 8 * 20] * 2
