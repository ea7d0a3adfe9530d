"""Initialisation of the weights, one class for each option of `init`: a standard deviation for each role of a matrix.

Roles: "embedding", "hidden" (matrices inside blocks), "residual" (those of them that write to the residual stream),
"head". Vectors are initialised to one, biases to zero, or to the `init_constants` of their module. To add an
initialisation: a class here, a line in its table.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
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

    def lr_multiplier(self, role: Role, fan_in: int) -> float:
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

    def lr_multiplier(self, role: Role, fan_in: int) -> float:
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


@torch.no_grad()
def init_weights(model: Any, seed: int) -> None:
    """Initialise every parameter as `model.init` and the modules' `init_constants` say.

    Each matrix is drawn on the CPU from a generator seeded by (seed, its name). So two architectures give the same
    initial values to the parameters they have in common, on every device and however the model is sharded. If it is
    sharded, every rank draws each matrix whole, one at a time, and copies its shard.
    """
    for name, p, module in named_parameters_with_module(model):
        attribute = name.rpartition(".")[2]
        constants: dict[str, float] = getattr(module, "init_constants", {})
        if attribute not in constants and p.dim() >= 2:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            full = torch.empty(p.shape).normal_(0.0, model.init.init_std(init_role(module)), generator=generator)
            p.copy_(full if type(p) is nn.Parameter else shard_like(p, full))
        else:
            p.fill_(constants.get(attribute, 0.0 if attribute == "bias" else 1.0))


def shard_like(p: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """`full`, which every rank has, as a DTensor placed like the DTensor `p`; without communication."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(p, DTensor)
    return distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)


def named_parameters_with_module(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """(name, parameter, the module that owns it) of each parameter; tied weights once, as the embedding's."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for attribute, p in module.named_parameters(recurse=False):
            if id(p) not in seen:
                seen.add(id(p))
                yield f"{prefix}.{attribute}" if prefix else attribute, p, module
