"""The Triton kernels in Triton's interpreter: outputs and every gradient against float64; poisoned memory, odd shapes.

The interpreter runs a kernel's operations in numpy. It says nothing of the compiled kernels' speed or registers; on a
machine with CUDA the same tests compile them (BLOCKGPT_TEST_DEVICE=cuda).
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = os.environ.get("BLOCKGPT_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton", reason="Triton is not installed here")

from torch.utils.flop_counter import FlopCounterMode

from blockgpt.kernels import choose
from blockgpt.kernels import layer_norm as layer
from blockgpt.kernels import rms_norm as rms
from blockgpt.kernels import swiglu as gated
from blockgpt.kernels.rope import rope_op, rotary, rotary_torch
from blockgpt.kernels.rows import DTYPES, as_rows, block_size
from model_builder import build_model
from model_config import get_preset

WIDTHS = st.sampled_from([1, 2, 3, 17, 64, 100, 768])
SHAPES = st.sampled_from([(0,), (1,), (2, 3), (7,), (2, 0, 2)])


def layouts(shape, dtype, layout, generator, device=DEVICE):
    """Random values with this layout in memory; what lies between them is NaN."""
    rows, width = shape[:-1], shape[-1]
    if layout == "columns":  # the last dimension is not the adjacent one
        store = torch.full((width, *rows), float("nan"), dtype=dtype, device=device)
        x = store.movedim(0, -1)
    else:
        gap = 5 if layout == "gaps" else 0  # a half of a wider tensor
        x = torch.full((*rows, width + gap), float("nan"), dtype=dtype, device=device)[..., :width]
    x.copy_(torch.randn(shape, generator=generator).to(dtype))
    return x.requires_grad_()


def close(found, exact, dtype, terms=1, magnitude=4.0):
    """Within the rounding of the result, and of sums in float32 of `terms` numbers of up to this magnitude."""
    found, exact = found.detach().double().cpu(), exact.detach().cpu()
    assert found.isfinite().all()
    largest = max(magnitude, exact.abs().max().item() if exact.numel() else 0.0)
    rounding = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal
    assert ((found - exact).abs() <= rounding + 4 * terms**0.5 * torch.finfo(torch.float32).eps * largest).all()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel should fill has NaN before."""
    empty = torch.empty

    def filled(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() and t.device.type == DEVICE else t
    monkeypatch.setattr(torch, "empty", filled)


def rms_reference(x, weight, eps, offset):
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + offset)


def largest_term(x, weight, eps, offset, grad):
    """Of ∂x, a difference in which much may cancel."""
    r = (x.detach().double().square().mean(-1, keepdim=True) + eps).rsqrt()
    return float((grad * r * (weight.detach().double() + offset)).abs().max()) if x.numel() else 1.0


cases = dict(rows=SHAPES, width=WIDTHS, dtype=st.sampled_from(DTYPES), weight_dtype=st.sampled_from(DTYPES),
             layout=st.sampled_from(["plain", "gaps", "columns"]), seed=st.integers(0, 9))


@settings(max_examples=12)
@given(**cases, offset=st.sampled_from([0.0, 1.0]))
def test_rms_norm_and_its_gradients(rows, width, dtype, weight_dtype, layout, seed, offset):
    generator = torch.Generator().manual_seed(seed)
    x = layouts((*rows, width), dtype, layout, generator)
    weight = layouts((width,), weight_dtype, "plain", generator)
    grad = layouts((*rows, width), dtype, layout, generator).detach()
    y = rms.rms_norm(x, weight, 1e-5, offset)
    assert y.dtype == dtype and y.shape == x.shape
    exact = rms_reference(x, weight, 1e-5, offset)
    close(y, exact, dtype, width)
    inputs = (x, weight)
    found, expected = (torch.autograd.grad(out, inputs, grad.to(out.dtype)) for out in (y, exact))
    close(found[0], expected[0], dtype, width, largest_term(x, weight, 1e-5, offset, grad))
    close(found[1], expected[1], weight_dtype, max(x.numel() // width, 1), 4 * width**0.5)
    assert [g.dtype for g in found] == [dtype, weight_dtype]


@settings(max_examples=12)
@given(**cases, other=st.sampled_from(DTYPES))
def test_the_fused_addition_and_its_gradients(rows, width, dtype, weight_dtype, layout, seed, other):
    generator = torch.Generator().manual_seed(seed)
    x, residual = layouts((*rows, width), dtype, layout, generator), layouts((*rows, width), other, "gaps", generator)
    weight = layouts((width,), weight_dtype, "plain", generator)
    total, y = rms.add_rms_norm(x, residual, weight, 1e-5)
    result = torch.promote_types(dtype, other)
    assert total.dtype == y.dtype == result
    # The interpreter cuts off where a conversion to bfloat16 should round; compiled code is exact.
    rtol = torch.finfo(result).eps if DEVICE == "cpu" and result == torch.bfloat16 else 0.0
    torch.testing.assert_close(total, (x.float() + residual.float()).to(result), rtol=rtol, atol=0.0, equal_nan=True)
    rounded = total.detach().double().requires_grad_()  # the norm is of the sum as it is returned
    exact = rms_reference(rounded, weight, 1e-5, 0.0)
    close(y, exact, result, width)
    grads = [layouts((*rows, width), result, layout, generator).detach() for _ in range(2)]
    found = torch.autograd.grad((total, y), (x, residual, weight), grads)
    into_sum, into_weight = torch.autograd.grad(exact, (rounded, weight), grads[1].double())
    into_sum = into_sum + grads[0].double()
    for gradient, t in zip(found, (x, residual), strict=False):
        assert gradient.dtype == t.dtype
        close(gradient, into_sum, t.dtype, width, largest_term(rounded, weight, 1e-5, 0.0, grads[1]))
    close(found[2], into_weight, weight_dtype, max(x.numel() // width, 1), 4 * width**0.5)


@settings(max_examples=12)
@given(**cases, biased=st.booleans())
def test_layer_norm_and_its_gradients(rows, width, dtype, weight_dtype, layout, seed, biased):
    generator = torch.Generator().manual_seed(seed)
    x = layouts((*rows, width), dtype, layout, generator)
    weight, bias = (layouts((width,), weight_dtype, "plain", generator) for _ in range(2))
    bias = bias if biased else None
    grad = layouts((*rows, width), dtype, layout, generator).detach()
    y = layer.layer_norm(x, weight, bias, 1e-3)
    assert y.dtype == dtype and y.shape == x.shape
    exact = layer.layer_norm_torch(x.double(), weight.double(), None if bias is None else bias.double(), 1e-3)
    # A mean that is off by a rounding is divided by the deviation, at most 1/sqrt(eps).
    close(y, exact, dtype, width, 128.0)
    inputs = (x, weight) if bias is None else (x, weight, bias)
    found, expected = (torch.autograd.grad(out, inputs, grad.to(out.dtype)) for out in (y, exact))
    deviation = x.detach().double().var(-1, correction=0, keepdim=True) if x.numel() else torch.ones(1)
    largest = float((grad * weight.detach().double() * (deviation + 1e-3).rsqrt()).abs().max()) if x.numel() else 1.0
    close(found[0], expected[0], dtype, width, 4 * largest)
    terms = max(x.numel() // width, 1)
    for gradient, precise in zip(found[1:], expected[1:], strict=True):
        close(gradient, precise, weight_dtype, terms, 16 * width**0.5)
    assert [g.dtype for g in found] == [t.dtype for t in inputs]


def gated_reference(gate, up, activation):
    return gated.gated_torch(gate.double(), up.double(), activation)


@settings(max_examples=12)
@given(**{name: cases[name] for name in ("rows", "width", "dtype", "layout", "seed")},
       activation=st.sampled_from(sorted(gated.ACTIVATIONS)))
def test_the_gates_and_their_gradients(rows, width, dtype, layout, seed, activation):
    generator = torch.Generator().manual_seed(seed)
    gate, up, grad = (layouts((*rows, width), dtype, layout, generator) for _ in range(3))
    y, exact = gated.gated(gate, up, activation), gated_reference(gate, up, activation)
    assert y.dtype == dtype and y.shape == gate.shape
    close(y, exact, dtype, 4)
    found, expected = (torch.autograd.grad(out, (gate, up), grad.detach().to(out.dtype)) for out in (y, exact))
    for a, b in zip(found, expected, strict=True):
        close(a, b, dtype, 4)
        assert a.dtype == dtype


@pytest.mark.parametrize("activation", gated.ACTIVATIONS)
def test_the_gates_of_extreme_values_are_torchs(activation):
    gate = torch.tensor([[-1e30, -100.0, -0.0, 0.0, 100.0, 1e30, float("nan")]], device=DEVICE, requires_grad=True)
    up = torch.ones_like(gate)
    y = gated.gated(gate, up, activation)
    exact = gated.gated_torch(gate, up, activation)
    torch.testing.assert_close(y[:, :-1], exact[:, :-1])
    assert y[0, -1].isnan() and exact[0, -1].isnan()
    found, expected = (torch.autograd.grad(out[:, 1:5].sum(), gate)[0][:, 1:5] for out in (y, exact))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32),
                                    (torch.float32, torch.float16)], ids=str)
def test_the_gates_of_rows_wider_than_a_block_and_of_two_dtypes_and_layouts(dtypes):
    generator = torch.Generator().manual_seed(0)
    shape, result = (2, gated.MAX_BLOCK + 76), torch.promote_types(*dtypes)
    gate, up = (layouts(shape, dtype, layout, generator) for dtype, layout in zip(dtypes, ("gaps", "plain"),
                                                                                  strict=True))
    grad = layouts(shape, result, "columns", generator).detach()
    y, exact = gated.gated(gate, up, "silu"), gated_reference(gate, up, "silu")
    assert y.dtype == result
    close(y, exact, result, 4)
    found, expected = (torch.autograd.grad(out, (gate, up), grad.to(out.dtype)) for out in (y, exact))
    for a, b, dtype in zip(found, expected, dtypes, strict=True):
        assert a.dtype == dtype
        close(a, b, dtype, 4)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_plain_twins_of_the_norms_are_the_formula(offset):
    generator = torch.Generator().manual_seed(0)
    x, residual, weight = (torch.randn(*shape, dtype=torch.float64, generator=generator)
                           for shape in ((3, 5), (3, 5), (5,)))
    exact = rms_reference(x, weight, 0.5, offset)
    torch.testing.assert_close(rms.rms_norm_torch(x, weight, 0.5, offset), exact)
    total, y = rms.add_rms_norm_torch(x, residual, weight, 0.5, offset)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, rms_reference(total, weight, 0.5, offset))


def test_rows_up_to_64k():
    generator = torch.Generator().manual_seed(0)
    x = layouts((2, 65536), torch.float32, "plain", generator)
    weight = layouts((65536,), torch.float32, "plain", generator)
    y, exact = rms.rms_norm(x, weight, 1e-5), rms_reference(x, weight, 1e-5, 0.0)
    close(y, exact, torch.float32, 65536)
    for a, b in zip(torch.autograd.grad(y.sum(), (x, weight)), torch.autograd.grad(exact.sum(), (x, weight)),
                    strict=True):
        close(a, b, torch.float32, 65536)
    with pytest.raises(ValueError, match="65,536"):
        rms.rms_norm(x.new_ones(1, 65537), x.new_ones(65537), 1e-5)
    with pytest.raises(ValueError, match="float64"):
        rms.rms_norm(x.double(), weight, 1e-5)


def test_the_operators_are_registered_as_torch_asks():
    """Schema, fake kernels, autograd, and what the compiler traces."""
    x, residual, weight = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((3, 8), (3, 8), (8,)))
    torch.library.opcheck(rms.rms_norm_op, (x, weight, 1e-5, 0.0))
    torch.library.opcheck(rms.add_rms_norm_op, (x, residual, weight, 1e-5, 1.0))
    torch.library.opcheck(gated.gated_op, (x, residual, 2))
    torch.library.opcheck(layer.layer_norm_op, (x, weight, None, 1e-5))
    torch.library.opcheck(layer.layer_norm_op, (x, weight, weight.detach(), 1e-5))


def test_only_the_input_and_a_number_per_row_are_saved():
    x, weight = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((6, 8), (8,)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms.rms_norm(x, weight, 1e-5)
    assert sorted(t.numel() for t in saved) == [6, 8, 48]
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gated.gated(x, x * 1, "silu")
    assert [t.numel() for t in saved] == [48, 48]


def test_a_kernel_counts_no_flops():
    x, weight = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((6, 8), (8,)))
    with FlopCounterMode(display=False) as counter:
        gated.gated(rms.rms_norm(x, weight, 1e-5), x, "silu").sum().backward()
    assert counter.get_total_flops() == 0


@given(rows=SHAPES, width=WIDTHS, layout=st.sampled_from(["plain", "gaps", "columns"]))
def test_rows_of_a_tensor(rows, width, layout):
    x = layouts((*rows, width), torch.float32, layout, torch.Generator().manual_seed(0), "cpu")
    flat = as_rows(x)
    assert torch.equal(flat, x.reshape(-1, width) if x.numel() else flat.new_empty(0, width))
    assert width <= block_size(width) < 2 * width and block_size(width).bit_count() == 1
    if layout != "columns" and len(rows) == 1 and x.numel():
        assert flat.data_ptr() == x.data_ptr()  # no copy


def test_every_case_of_a_model_is_timed_at_its_own_shape_and_chosen_for_itself():
    config = get_preset("qwen3", n_layer=1, n_head=2, n_kv_head=1, head_dim=16, n_embd=48, vocab_size=64, block_size=8)
    model = build_model(config.resolve())
    cases = ["rms_norm 16", "rms_norm 48", "rope", "swiglu"]
    assert choose.cases_of(model) == cases
    shapes = {}
    for case in cases:
        timed = choose.candidates(case, 24, model.config, torch.device(DEVICE), torch.bfloat16, False)
        for function, inputs in timed.values():
            function(*inputs)
        shapes[case] = [(tuple(t.shape), t.dtype) for t in timed["triton"][1]]
    assert shapes["rms_norm 16"] == [((48, 16), torch.bfloat16), ((16,), torch.float32)]
    assert shapes["rms_norm 48"] == [((24, 48), torch.float32), ((48,), torch.float32)]
    assert [shape for shape, _ in shapes["rope"]] == [(3, 2, 8, 16), (3, 1, 8, 16)]
    choose.set_kernels(model, {"rms_norm 16": "triton", "rms_norm 48": "torch", "rope": "torch", "swiglu": "torch"})
    assert choose.used_kernels(model)["rms_norm 16"] == "triton"
    choose.set_kernels(model, {"rms_norm": "triton"})  # as older runs recorded it
    assert choose.used_kernels(model) == {case: "triton" if "rms" in case else "torch" for case in cases}


@pytest.mark.parametrize("name, keys", [("gpt2", {}), ("qwen3", {"n_kv_head": 1, "head_dim": 16})])
def test_a_model_has_the_same_loss_and_gradients_with_kernels_and_says_so(name, keys):
    sizes = dict(n_layer=1, n_head=2, n_embd=32, vocab_size=64, block_size=8, init_std=0.2, **keys)
    x = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for kernels in ("torch", "triton"):
        model = build_model(get_preset(name, **sizes, kernels=kernels).resolve(), seed=1).to(DEVICE)
        assert model.infer_config().kernels == kernels
        assert set(choose.used_kernels(model).values()) == {kernels}
        loss = model(x, x.roll(-1, 1))
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 64 * torch.finfo(torch.float32).eps * a.norm() + 1e-9


# ---------------------------------------------------------------- RoPE


def rope_example(batch, heads, groups, tokens, width, half, dtype, layout, seed=0):
    """(q, k), (cos, sin) and the weights of the norms. "projected": heads and tokens swapped in memory, with gaps."""
    generator = torch.Generator().manual_seed(seed)

    def one(n):
        if layout == "projected":
            x = layouts((batch, tokens, n, width), dtype, "gaps", generator)
            return x.detach().transpose(1, 2).requires_grad_()
        return layouts((batch, n, tokens, width), dtype, layout, generator)

    angles = torch.randn(tokens, half, generator=generator).to(DEVICE)
    weights = tuple(layouts((width,), torch.float32, "plain", generator) for _ in range(2))
    return (one(heads), one(groups)), (angles.cos(), angles.sin()), weights


@settings(max_examples=12)
@given(batch=st.integers(0, 2), heads=st.integers(1, 3), groups=st.integers(1, 2), tokens=st.sampled_from([1, 2, 5]),
       width=st.sampled_from([2, 6, 16, 24]), fraction=st.sampled_from([0.0, 0.5, 1.0]), dtype=st.sampled_from(DTYPES),
       layout=st.sampled_from(["plain", "gaps", "columns", "projected"]), normed=st.booleans(),
       offset=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 9))
def test_rope_and_its_gradients(batch, heads, groups, tokens, width, fraction, dtype, layout, normed, offset, seed):
    half = int(width * fraction) // 2
    inputs, angles, weights = rope_example(batch, heads, groups, tokens, width, half, dtype, layout, seed)
    norm = (weights, 1e-2, offset) if normed else (None,)
    found = rotary(*inputs, *angles, *norm)
    precise = tuple(w.double() for w in weights)
    exact = rotary_torch(*(x.double() for x in inputs), *(a.double() for a in angles),
                       *((precise, 1e-2, offset) if normed else (None,)))
    for y, z, x in zip(found, exact, inputs, strict=True):
        assert y.dtype == dtype and y.shape == x.shape
        close(y, z, dtype, width)
    grads = [layouts(x.shape, dtype, "gaps", torch.Generator().manual_seed(seed + 10)).detach() for x in inputs]
    wanted = (*inputs, *weights) if normed else inputs
    a = torch.autograd.grad(found, wanted, grads)
    b = torch.autograd.grad(exact, wanted, [g.double() for g in grads])
    for gradient, z, t in zip(a, b, wanted, strict=True):
        assert gradient.dtype == t.dtype
        close(gradient, z, t.dtype, max(batch * heads * tokens, width), 64.0 if normed else 4.0)


def test_it_is_registered_as_torch_asks_and_saves_no_queries_without_a_norm():
    inputs, angles, weights = rope_example(1, 2, 1, 3, 6, 2, torch.float32, "plain")
    torch.library.opcheck(rope_op, (*inputs, *angles, None, None, 0.0, 0.0))
    torch.library.opcheck(rope_op, (*inputs, *angles, *weights, 1e-5, 1.0))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotary(*inputs, *angles)
    assert [t.shape for t in saved] == [(3, 2), (3, 2)]
    with pytest.raises(ValueError, match="float64"):
        rotary(*(x.double() for x in inputs), *angles)
