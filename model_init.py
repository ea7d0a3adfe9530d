"""How weights start, one class for each option of `init`: a standard deviation by the part that a weight plays.

Parts: "embedding", "hidden" (matrices inside blocks), "residual" (those of them that write to the residual stream),
"head". Vectors start at one, biases at zero, or where their module's `start` says. To add one: a class here, a line in
its table.
"""

import torch.nn as nn

from model_components import OutputHead, ResidualProjection


class NormalInit:
    """N(0, init_std) for every matrix."""

    logit_scale = 1.0

    def __init__(self, config):
        self.config = config

    def init_std(self, role):
        """Standard deviation of a matrix that plays `role`."""
        return 0.0 if role == "residual" and self.config.zero_init_residual else self.config.init_std

    def lr_multiplier(self, role):
        """What the learning rate of such a matrix is multiplied by."""
        return 1.0

    def attention_scale(self):
        """Factor on q k^T where the config sets none."""
        return self.config.head_dim**-0.5


class GPT2Init(NormalInit):
    """N(0, init_std); over sqrt(2 n_layer) for what writes to the residual stream. Radford et al. 2019."""

    def init_std(self, role):
        init_std = super().init_std(role)
        return init_std * (2 * self.config.n_layer) ** -0.5 if role == "residual" else init_std


class MuPInit(GPT2Init):
    """GPT2Init at n_embd = mup_base_width; m times wider: hidden weights / sqrt(m), their Adam rates / m, logits / m,
    scores / head_dim. So the best learning rate stays where it was. Yang et al. 2022 (Tensor Programs V), table 8."""

    def __init__(self, config):
        super().__init__(config)
        self.width_mult = config.n_embd / config.mup_base_width
        self.logit_scale = 1.0 / self.width_mult

    def init_std(self, role):
        return super().init_std(role) * (self.width_mult**-0.5 if role in ("hidden", "residual") else 1.0)

    def lr_multiplier(self, role):
        return 1.0 / self.width_mult if role in ("hidden", "residual") else 1.0

    def attention_scale(self):
        return 1.0 / self.config.head_dim


def init_role(module):
    """The part that the matrices of `module` play."""
    kinds = (("embedding", nn.Embedding), ("head", OutputHead), ("residual", ResidualProjection))
    return next((role for role, cls in kinds if isinstance(module, cls)), "hidden")
