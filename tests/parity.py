"""Helpers of the parity tests: tiny sizes, random weights, comparison up to the rounding of float64."""

import torch

from model_builder import build_model
from model_config import ModelConfig

TINY = dict(n_layer=2, n_head=4, n_embd=48, vocab_size=61, block_size=24)


def config(**overrides):
    """The default architecture in tiny sizes, every derived key filled in."""
    return ModelConfig(**{**TINY, **overrides}).resolve()


def draw(*shape, seed=0):
    """A float64 leaf of standard normals."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def randomised(module, std=0.1):
    """The module in float64 with all its parameters random: norms and biases at one or zero would hide bugs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std + (0.5 if p.dim() < 2 else 0.0))
    return module.double().eval()


def model(**overrides):
    """A tiny model in float64: its initial weights plus random ones."""
    m = build_model(config(**overrides)).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in m.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return m


def equal(a, b, rtol=1e-10, atol=1e-10):  # float64: rounding of a few hundred operations
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def equal_with_gradients(a, b, *leaves, rtol=1e-10, atol=1e-10):
    """Assert that two outputs, and their gradients with respect to `leaves` for one random cotangent, are equal."""
    equal(a, b, rtol, atol)
    cotangent = draw(*a.shape, seed=9).detach()
    gradients = (torch.autograd.grad(y, leaves, cotangent, retain_graph=True) for y in (a, b))
    for grad_a, grad_b in zip(*gradients, strict=True):
        equal(grad_a, grad_b, rtol, atol)
