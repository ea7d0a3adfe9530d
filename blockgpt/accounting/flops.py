"""FLOPs per token of a model, forward and training.

FLOPs are those of the matrix products; a multiply-add counts as two. A component reports its own, those of its
submodules included, in a method `flops(seq_len)`, and this module adds them up. A new component needs that method and
nothing here.
Training costs three forward passes: for each product of the forward pass, the backward pass has two.

Two conventions define which attention scores are credited. PaLM (Chowdhery et al. 2022, appendix B) counts every key
in the span of a layer (the sequence, or its sliding window), although the causal mask hides half of them. "causal"
counts the visible keys only. Neither credits products that a backend computes and then masks. Documents that are
masked from each other are counted as one. MFU (model FLOPs utilisation) uses the PaLM convention.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch.nn as nn


@runtime_checkable
class HasFlops(Protocol):
    """A module that reports the forward FLOPs per token of its matrix products, by name; submodules included."""

    def flops(self, seq_len: int) -> dict[str, float]: ...


@runtime_checkable
class HasCreditedFlops(Protocol):
    """A module, such as an attention, whose FLOPs depend on the convention; the names are those of `flops`."""

    def credited_flops(self, seq_len: int, convention: str) -> dict[str, float]: ...


def reporting_modules(module: nn.Module) -> Iterator[HasFlops]:
    """The outermost modules that report FLOPs: an expert's are for the module that routes to it to report."""
    if isinstance(module, HasFlops):
        yield module
    else:
        for child in module.children():
            yield from reporting_modules(child)


def forward_flops(model: nn.Module, seq_len: int) -> dict[str, float]:
    """{name: forward FLOPs per token} of a model at sequences of `seq_len` tokens, as its backends compute them."""
    flops: Counter[str] = Counter()
    for module in reporting_modules(model):
        flops.update(module.flops(seq_len))
    return dict(flops)


def flops_per_token(model: nn.Module, seq_len: int) -> dict[str, Any]:
    """All FLOPs per token, in the form that `run.json` stores.

    Returns:
        forward: {name: FLOPs} as the backends compute them. train, train_causal: training FLOPs by the PaLM convention
        and by the causal one. convention: the one that MFU uses.
    """
    def train(convention: str) -> float:
        return 3 * sum(sum((m.credited_flops(seq_len, convention) if isinstance(m, HasCreditedFlops)
                            else m.flops(seq_len)).values()) for m in reporting_modules(model))

    return {"forward": forward_flops(model, seq_len), "train": train("PaLM"), "train_causal": train("causal"),
            "convention": "PaLM"}
