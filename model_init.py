"""Initialisation of the weights, one class for each option of `init`: a standard deviation for each role of a matrix.

Roles: "embedding", "hidden" (matrices inside blocks), "residual" (those of them that write to the residual stream),
"head". Vectors are initialised to one, biases to zero, or to the `init_constants` of their module. To add an
initialisation: a class here, a line in its table.
"""

from typing import Literal

import torch.nn as nn

from model_components import OutputHead, ResidualProjection
from model_config import ModelConfig

Role = Literal["embedding", "hidden", "residual", "head"]


class NormalInit:
    """N(0, init_std) for every matrix."""

    logit_scale = 1.0

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def init_std(self, role: Role) -> float:
        """Standard deviation of the initial weights of a matrix with this role."""
        return 0.0 if role == "residual" and self.config.zero_init_residual else self.config.init_std

    def lr_multiplier(self, role: Role) -> float:
        """Factor on the learning rate of a matrix with this role."""
        return 1.0

    def attention_scale(self) -> float:
        """Factor on q k^T if the config sets none."""
        assert self.config.head_dim is not None  # resolved
        scale: float = self.config.head_dim**-0.5
        return scale


class GPT2Init(NormalInit):
    """N(0, init_std); divided by sqrt(2 n_layer) for what writes to the residual stream. Radford et al. 2019."""

    def init_std(self, role: Role) -> float:
        std = super().init_std(role)
        return std * (2 * self.config.n_layer) ** -0.5 if role == "residual" else std


class MuPInit(GPT2Init):
    """GPT2Init at n_embd = mup_base_width. For a width_mult times wider model: hidden weights / sqrt(width_mult), their
    Adam learning rates / width_mult, logits / width_mult, scores / head_dim. The best learning rate then does not
    depend on the width. Yang et al. 2022 (Tensor Programs V), table 8."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.width_mult = config.n_embd / config.mup_base_width
        self.logit_scale = 1.0 / self.width_mult

    def init_std(self, role: Role) -> float:
        factor: float = self.width_mult**-0.5 if role in ("hidden", "residual") else 1.0
        return super().init_std(role) * factor

    def lr_multiplier(self, role: Role) -> float:
        return 1.0 / self.width_mult if role in ("hidden", "residual") else 1.0

    def attention_scale(self) -> float:
        assert self.config.head_dim is not None  # resolved
        return 1.0 / self.config.head_dim


def init_role(module: nn.Module) -> Role:
    """The role of the matrices of `module`."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, OutputHead):
        return "head"
    return "residual" if isinstance(module, ResidualProjection) else "hidden"
