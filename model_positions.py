"""Position encodings, one class for each option of `position_encoding` and of `rope_scaling`.

A position encoding acts at one of three points and overrides that method of `NoPositions`: on the embeddings
(`embed`), on queries and keys (`cos_sin`), on the scores (`alibi_slopes`). To add one: see
model_components.py.
"""

import math
from typing import Any

import torch
import torch.nn as nn

from blockgpt.kernels.choose import load_kernels
from model_components import component
from model_config import ModelConfig

CosSin = tuple[torch.Tensor, torch.Tensor]  # (T, R/2) each


class NoPositions(nn.Module):
    """No position encoding: only the causal mask orders the tokens. Haviv et al. 2022."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def embed(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x (B, T, C), the token embeddings, with what this encoding adds; positions (T,) int64."""
        return x

    def cos_sin(self, positions: torch.Tensor, window: int | None = None) -> CosSin | None:
        """The rotation of positions (T,) int64 as (T, R/2) float32 cosines and sines; None: no rotation.

        It is computed once per forward pass for all layers with the same `window` (see `ModelConfig.window`).
        """
        return None

    def alibi_slopes(self, device: torch.device | None = None) -> torch.Tensor | None:
        """(H,) float32, how fast each head's scores fall with distance; None: they do not."""
        return None


class LearnedAbsolutePositions(NoPositions):
    """A trained vector per position, added to the token embedding. Radford et al. 2019."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.block_size, config.n_embd)

    def embed(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return x + self.embedding(positions)  # (B, T, C) + (T, C)


class SinusoidalPositions(NoPositions):
    """sin(p / 10000^(2i/C)) on even channels, cos on odd ones, added to the embedding. Vaswani et al. 2017."""

    def embed(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        C = x.shape[-1]
        pair = torch.arange(0, C, 2, device=x.device, dtype=torch.float32)  # (⌈C/2⌉,)
        angles = torch.outer(positions.float(), 10000.0 ** (-pair / C))  # (T, ⌈C/2⌉)
        waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :C]  # (T, C)
        return x + waves.to(x.dtype)


class AlibiPositions(NoPositions):
    """Each head's scores fall linearly with distance, with a different slope for each head. Press et al. 2022.

    For a power of two of n heads the slopes are 2^(-8h/n), h = 1 … n. Otherwise they are those of the next lower power
    of two, then every second slope of twice that number of heads, as in the paper's code.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.n_head = config.n_head

    def alibi_slopes(self, device: torch.device | None = None) -> torch.Tensor | None:
        n = 2 ** int(math.log2(self.n_head))
        h = torch.arange(1, n + 1, device=device, dtype=torch.float32)
        between = 2 * torch.arange(self.n_head - n, device=device, dtype=torch.float32) + 1
        return torch.cat((torch.exp2(-8 * h / n), torch.exp2(-4 * between / n)))  # (H,)


class RotaryPositions(NoPositions):
    """RoPE: each pair (x_i, x_{i + R/2}) of a query or key rotated by position * theta^(-2i/R). Su et al. 2021.

    R is the number of channels of a head that are rotated (rope_fraction, from the left, as in GPT-NeoX). The halves
    are paired as in LLaMA's released Hugging Face weights. Layers with a window may have another base, never scaled
    (Gemma 3). Angles are float32 in every precision.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.theta, self.theta_local = config.rope_theta, config.rope_theta_local
        self.fraction, self.rotary_dim = config.rope_fraction, config.rotary_dim()
        self.scaling: NoScaling = component("rope_scaling", config)(config)

    def cos_sin(self, positions: torch.Tensor, window: int | None = None) -> CosSin:
        pair = torch.arange(0, self.rotary_dim, 2, device=positions.device, dtype=torch.float32)  # (R/2,)
        if window is not None and self.theta_local is not None:
            frequencies, attention_factor = self.theta_local ** (-pair / self.rotary_dim), 1.0
        else:
            frequencies = self.scaling(self.theta ** (-pair / self.rotary_dim))
            attention_factor = self.scaling.attention_factor
        angles = torch.outer(positions.float(), frequencies)  # (T, R/2)
        return angles.cos() * attention_factor, angles.sin() * attention_factor

    def config_values(self) -> dict[str, Any]:
        return {"rope_theta": self.theta, "rope_theta_local": self.theta_local, "rope_fraction": self.fraction}


def apply_rotary_emb(q: torch.Tensor, k: torch.Tensor, cos_sin: CosSin | None) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, T, D) and k (B, G, T, D) with their first R channels rotated by `cos_sin`; unchanged if it is None."""
    if cos_sin is None:
        return q, k
    cos, sin = (t.to(q.dtype) for t in cos_sin)
    return rotate(q, cos, sin), rotate(k, cos, sin)


class RotaryEmbedding(nn.Module):
    """`apply_rotary_emb`, by a kernel where one is chosen."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kernel: Any = None
        if config.position_encoding == "rope":  # else there is nothing to choose
            self.kernel_family = "rope"
            self.kernel = load_kernels("rope") if config.kernels == "triton" else None

    def forward(self, q: torch.Tensor, k: torch.Tensor, cos_sin: CosSin | None) -> tuple[torch.Tensor, torch.Tensor]:
        if self.kernel is None or cos_sin is None:
            return apply_rotary_emb(q, k, cos_sin)
        rotated: tuple[torch.Tensor, torch.Tensor] = self.kernel.rotary(q, k, *cos_sin)
        return rotated


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, D), its pairs (x_i, x_{i + R/2}) rotated by cos and sin (T, R/2)."""
    rotary_dim = 2 * cos.shape[-1]
    a, b = x[..., :rotary_dim].chunk(2, dim=-1)  # (B, H, T, R/2) each
    rotated = (a * cos - b * sin, b * cos + a * sin)
    rest = () if rotary_dim == x.shape[-1] else (x[..., rotary_dim:],)
    return torch.cat((*rotated, *rest), dim=-1)


# ---------------------------------------------------------------- RoPE for a longer context


class NoScaling(nn.Module):
    """Frequencies (R/2,), in radians per token, unchanged.

    attention_factor multiplies cos and sin, and so q·k by its square; the name is the one in transformers.
    """

    attention_factor = 1.0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.factor, self.original_context = config.rope_scaling_factor, config.rope_original_context
        self.theta, self.rotary_dim = config.rope_theta, config.rotary_dim()

    def forward(self, frequencies: torch.Tensor) -> torch.Tensor:
        return frequencies

    def config_values(self) -> dict[str, Any]:
        return {"rope_scaling_factor": self.factor, "rope_original_context": self.original_context}


class LinearScaling(NoScaling):
    """All frequencies divided by the factor: positions interpolated. Chen et al. 2023."""

    def forward(self, frequencies: torch.Tensor) -> torch.Tensor:
        return frequencies / self.factor


class Llama3Scaling(NoScaling):
    """Frequencies that turn more than 4 times in the original context are unchanged, those that turn less than once are
    divided by the factor, with a linear ramp in the number of turns between. Llama 3.1's configuration."""

    def forward(self, frequencies: torch.Tensor) -> torch.Tensor:
        assert self.original_context is not None  # resolved
        turns = self.original_context * frequencies / (2 * math.pi)
        unscaled = ((turns - 1.0) / (4.0 - 1.0)).clamp(0.0, 1.0)  # 1: unchanged, 0: divided by the factor
        return frequencies * (unscaled + (1.0 - unscaled) / self.factor)


class YarnScaling(NoScaling):
    """As Llama 3's, between 32 turns and one, but the ramp is linear in the index of the pair; scores are scaled up.

    Peng et al. 2023: cos and sin times 0.1 ln(factor) + 1.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.attention_factor = 0.1 * math.log(self.factor) + 1.0

    def forward(self, frequencies: torch.Tensor) -> torch.Tensor:
        assert self.original_context is not None  # resolved
        n, original_context = len(frequencies), self.original_context

        def pair(turns: float) -> float:
            """The index, not rounded, of the pair that turns this many times in the original context."""
            return n * math.log(original_context / (turns * 2 * math.pi)) / math.log(self.theta)

        first, last = max(math.floor(pair(32.0)), 0), min(math.ceil(pair(1.0)), self.rotary_dim - 1)
        index = torch.arange(n, device=frequencies.device, dtype=torch.float32)
        scaled = ((index - first) / max(last - first, 1e-3)).clamp(0.0, 1.0)  # 0: unchanged, 1: divided by the factor
        return frequencies * (1.0 - scaled + scaled / self.factor)
