"""How tokens know their place, one class for each option of `position_encoding` and of `rope_scaling`.

A position encoding acts at one of three places, and overrides that step of `NoPositions`: on the embeddings
(`embed`), on queries and keys (`cos_sin`, `apply_rotary_emb`), on the scores (`alibi_slopes`). To add one: see model_components.py.
"""

import math

import torch
import torch.nn as nn

from model_components import component


class NoPositions(nn.Module):
    """Nothing is added and nothing rotated: the causal mask alone tells order. Haviv et al. 2022.

    `positions` is (T,) int64. `cos_sin` is computed once a forward pass for each kind of layer (`window` as in
    `ModelConfig.window`) and handed to every such layer's `apply_rotary_emb`.
    """

    def __init__(self, config):
        super().__init__()

    def embed(self, x, positions):
        return x

    def cos_sin(self, positions, window=None):
        return None

    def apply_rotary_emb(self, q, k, cos_sin):
        return q, k

    def alibi_slopes(self, device=None):
        """(H,) float32: how fast each head's scores fall with distance; None: they do not."""
        return None


class LearnedAbsolutePositions(NoPositions):
    """A trained vector per position, added to the token embedding. Radford et al. 2019."""

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.block_size, config.n_embd)

    def embed(self, x, positions):
        return x + self.embedding(positions)  # (B, T, C) + (T, C)


class SinusoidalPositions(NoPositions):
    """sin(p / 10000^(2i/C)) on even channels, cos on odd ones, added to the embedding. Vaswani et al. 2017."""

    def embed(self, x, positions):
        C = x.shape[-1]
        pair = torch.arange(0, C, 2, device=x.device, dtype=torch.float32)  # (⌈C/2⌉,)
        angles = torch.outer(positions.float(), 10000.0 ** (-pair / C))  # (T, ⌈C/2⌉)
        waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :C]  # (T, C)
        return x + waves.to(x.dtype)


class AlibiPositions(NoPositions):
    """Each head's scores fall by a slope of its own for every token of distance. Press et al. 2022.

    The slopes are 2^(-8h/n) for h = 1 … n where n heads are a power of two; else those of the power below, and
    for the rest every other one of twice that power, as the paper's code has it.
    """

    def __init__(self, config):
        super().__init__(config)
        self.n_head = config.n_head

    def alibi_slopes(self, device=None):
        n = 2 ** int(math.log2(self.n_head))
        h = torch.arange(1, n + 1, device=device, dtype=torch.float32)
        between = 2 * torch.arange(self.n_head - n, device=device, dtype=torch.float32) + 1
        return torch.cat((torch.exp2(-8 * h / n), torch.exp2(-4 * between / n)))  # (H,)


class RotaryPositions(NoPositions):
    """Each pair (x_i, x_{i + R/2}) of a query or key turned by position * theta^(-2i/R). Su et al. 2021.

    R is the part of head_dim that turns (rope_fraction, from the left, as in GPT-NeoX). The halves are paired as in
    LLaMA's released Hugging Face weights. Layers with a window may have a base of their own, never scaled (Gemma 3).
    Angles are float32 in every precision.
    """

    def __init__(self, config):
        super().__init__(config)
        self.theta, self.theta_local, self.rotary_dim = config.rope_theta, config.rope_theta_local, config.rotary_dim()
        self.scaling = component("rope_scaling", config)(config)

    def cos_sin(self, positions, window=None):
        local = window is not None and self.theta_local is not None
        pair = torch.arange(0, self.rotary_dim, 2, device=positions.device, dtype=torch.float32)  # (R/2,)
        frequencies = (self.theta_local if local else self.theta) ** (-pair / self.rotary_dim)
        sharper = 1.0
        if not local:
            frequencies, sharper = self.scaling(frequencies), self.scaling.sharper
        angles = torch.outer(positions.float(), frequencies)  # (T, R/2)
        return angles.cos() * sharper, angles.sin() * sharper

    def apply_rotary_emb(self, q, k, cos_sin):
        cos, sin = (t.to(q.dtype) for t in cos_sin)
        return self._turn(q, cos, sin), self._turn(k, cos, sin)

    def _turn(self, x, cos, sin):
        a, b = x[..., : self.rotary_dim].chunk(2, dim=-1)  # (B, H, T, R/2) each
        turned = (a * cos - b * sin, b * cos + a * sin)
        rest = () if self.rotary_dim == x.shape[-1] else (x[..., self.rotary_dim:],)
        return torch.cat((*turned, *rest), dim=-1)


# ---------------------------------------------------------------- RoPE for a longer context


class NoScaling(nn.Module):
    """Frequencies (R/2,), in radians a token, as they are. `sharper` multiplies the tables, so q·k by its square."""

    sharper = 1.0

    def __init__(self, config):
        super().__init__()
        self.factor, self.original = config.rope_scaling_factor, config.rope_original_context
        self.theta, self.rotary_dim = config.rope_theta, config.rotary_dim()

    def forward(self, frequencies):
        return frequencies


class LinearScaling(NoScaling):
    """All frequencies divided by the factor: positions interpolated. Chen et al. 2023."""

    def forward(self, frequencies):
        return frequencies / self.factor


class Llama3Scaling(NoScaling):
    """Waves that turn over 4 times in the original context stay, those of less than one turn slow down by the
    factor, a ramp in the number of turns between. Llama 3.1's configuration."""

    def forward(self, frequencies):
        turns = self.original * frequencies / (2 * math.pi)
        keep = ((turns - 1.0) / (4.0 - 1.0)).clamp(0.0, 1.0)  # 1: as it is, 0: slowed
        return frequencies * (keep + (1.0 - keep) / self.factor)


class YarnScaling(NoScaling):
    """As Llama 3's between 32 turns and one, but the ramp is in the pair's number; scores sharpened.

    Peng et al. 2023: tables times 0.1 ln(factor) + 1.
    """

    def __init__(self, config):
        super().__init__(config)
        self.sharper = 0.1 * math.log(self.factor) + 1.0

    def forward(self, frequencies):
        n = len(frequencies)

        def pair(turns):  # the number, from 0 and not whole, of the pair that turns so often in the original context
            return n * math.log(self.original / (turns * 2 * math.pi)) / math.log(self.theta)

        first, last = max(math.floor(pair(32.0)), 0), min(math.ceil(pair(1.0)), self.rotary_dim - 1)
        numbers = torch.arange(n, device=frequencies.device, dtype=torch.float32)
        slow = ((numbers - first) / max(last - first, 1e-3)).clamp(0.0, 1.0)
        return frequencies * (1.0 - slow + slow / self.factor)
