"""Initialisation of the weights: one class for each option of `init`, and the generator of the normal values.

A class gives a standard deviation and a factor on the learning rate for each role of a matrix: "embedding", "hidden"
(matrices inside blocks), "residual" (those of them that write to the residual stream), "head". Vectors are initialised
to one, biases to zero, or to the `init_constants` of their module. To add an initialisation: a class here, a line in
its table.
"""

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn

from blockgpt.checkpoints.files import LocalChunk, local_chunk
from model_components import OutputHead, ResidualProjection
from model_config import ModelConfig

Role = Literal["embedding", "hidden", "residual", "head"]


class NormalInit:
    """N(0, init_std) for every matrix."""

    logit_scale = 1.0

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def init_std(self, role: Role, fan_in: int) -> float:
        """Standard deviation of the initial weights of a matrix with this role and this number of inputs."""
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

    def init_std(self, role: Role, fan_in: int) -> float:
        std = super().init_std(role, fan_in)
        return std * (2 * self.config.n_layer) ** -0.5 if role == "residual" else std


class MuPInit(GPT2Init):
    """GPT2Init at n_embd = mup_base_width; the best learning rate of that base model is then the best at every width.

    A matrix inside a block whose fan-in is m times that of the same matrix in the base model has weights / sqrt(m) and
    an Adam learning rate / m. Logits are divided by n_embd / mup_base_width. Scores are multiplied by
    sqrt(base head_dim) / head_dim. Yang et al. 2022 (Tensor Programs V), table 8.

    The base model has as many layers and heads. Its widths are those of this model times mup_base_width / n_embd:
    head_dim, n_head * head_dim (the fan-in of o_proj), d_ff (of down_proj). A d_ff that has its default value has it in
    the base model too, with the same rounding. If you widen the model by more heads of one head_dim instead, set
    attn_scale to 1 / sqrt(head_dim).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.d_ff is not None  # resolved
        self.width_mult = config.n_embd / config.mup_base_width
        self.logit_scale = 1.0 / self.width_mult
        default_d_ff = config.d_ff == config.default_d_ff(config.n_embd)
        base_d_ff = config.default_d_ff(config.mup_base_width) if default_d_ff else config.d_ff / self.width_mult
        self.ffn_mult = config.d_ff / base_d_ff

    def fan_in_mult(self, role: Role, fan_in: int) -> float:
        """The fan-in of a matrix over that of the same matrix in the base model; 1 for embeddings and the head."""
        if role in ("embedding", "head"):
            return 1.0
        return self.ffn_mult if role == "residual" and fan_in == self.config.d_ff else self.width_mult

    def init_std(self, role: Role, fan_in: int) -> float:
        return super().init_std(role, fan_in) * self.fan_in_mult(role, fan_in) ** -0.5

    def lr_multiplier(self, role: Role, fan_in: int) -> float:
        return 1.0 / self.fan_in_mult(role, fan_in)

    def attention_scale(self) -> float:
        assert self.config.head_dim is not None  # resolved
        scale: float = (self.config.head_dim * self.width_mult) ** -0.5  # sqrt(head_dim / width_mult) / head_dim
        return scale


def init_role(module: nn.Module) -> Role:
    """The role of the matrices of `module`."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, OutputHead):
        return "head"
    return "residual" if isinstance(module, ResidualProjection) else "hidden"


# ---------------------------------------------------------------- the generator


def float32s(*values: float) -> list[np.float32]:
    """The coefficients of a polynomial."""
    return [np.float32(value) for value in values]


BLOCK = 32768  # elements that a thread generates at a time: its buffers, 1.5 MiB, stay in the cache
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
SQRT_HALF_BITS = np.float32(math.sqrt(0.5)).view(np.int32)
# -2 log((1 + s) / (1 - s)) = s P(s²) for |s| <= 0.172 to 1e-9, and sin(pi/2 t) = t Q(t²) for |t| <= 1 to 6e-8.
LOG_COEFFICIENTS = float32s(*(-4 / (2 * k + 1) for k in range(5)))
SIN_COEFFICIENTS = float32s(*((-1) ** k * (math.pi / 2) ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(6)))


class NormalBlock:
    """Generates up to `BLOCK` standard normal values, each a function of (key, index). One object serves one thread.

    The 64 random bits of an index are the output of that index of SplitMix64 (Steele et al. 2014) with the seed `key`.
    31 of them give the radius of the Box-Muller transform (1958), sqrt(-2 log u), 32 its angle. Only IEEE 754 float32
    operations + - * / sqrt are used, one at a time, so the values are the same on every CPU and with every numpy. The
    largest possible value is 6.66.
    """

    def __init__(self) -> None:
        self.steps = np.arange(BLOCK, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA)
        self.uint64s = np.empty((2, BLOCK), np.uint64)
        self.int32s = np.empty(BLOCK, np.int32)
        self.float32s = np.empty((5, BLOCK), np.float32)

    def generate(self, key: int, starts: np.ndarray, width: int) -> np.ndarray:
        """The values of the indices start … start + width - 1 for each of `starts`, (R,) uint64.

        Returns:
            (R, width) float32, in a buffer that the next call overwrites; R * width is at most `BLOCK`.
        """
        n = len(starts) * width
        x, t, k = *self.uint64s[:, :n], self.int32s[:n]
        u, angle, exponent, square, y = self.float32s[:, :n]

        first = starts * np.uint64(GOLDEN_GAMMA) + np.uint64((key + GOLDEN_GAMMA) % 2**64)
        np.add(first[:, None], self.steps[:width], out=x.reshape(len(starts), width))
        for shift, factor in MIX:
            np.right_shift(x, shift, out=t)
            x ^= t
            x *= factor
        np.right_shift(x, np.uint64(31), out=t)
        x ^= t

        np.copyto(k, np.right_shift(x, np.uint64(33), out=t), casting="unsafe")
        np.copyto(u, k, casting="unsafe")
        u += np.float32(0.5)  # 2^31 times a uniform number in (0, 1]
        np.copyto(k, x.view(np.int64), casting="unsafe")  # the low 32 bits
        np.copyto(angle, k, casting="unsafe")
        angle *= np.float32(2.0**-31)  # in [-1, 1], times pi/2: the sine is distributed as over the whole circle

        bits = u.view(np.int32)
        np.subtract(bits, SQRT_HALF_BITS, out=k)
        k >>= np.int32(23)  # u = 2^k m with m in [sqrt(1/2), sqrt(2))
        np.copyto(exponent, k, casting="unsafe")
        k <<= np.int32(23)
        bits -= k
        np.add(u, np.float32(1), out=square)
        u -= np.float32(1)
        u /= square  # s = (m - 1) / (m + 1)
        polynomial(np.multiply(u, u, out=square), LOG_COEFFICIENTS, out=y)
        y *= u
        exponent -= np.float32(31)
        exponent *= np.float32(-2 * math.log(2))
        y += exponent  # -2 log u
        np.sqrt(y, out=y)

        polynomial(np.multiply(angle, angle, out=square), SIN_COEFFICIENTS, out=u)
        u *= angle
        u *= y
        return u.reshape(len(starts), width)


def polynomial(x: np.ndarray, coefficients: list[np.float32], out: np.ndarray) -> None:
    """out = sum of coefficients[k] x^k, by Horner's rule."""
    np.multiply(x, coefficients[-1], out=out)
    for coefficient in coefficients[-2:0:-1]:
        out += coefficient
        out *= x
    out += coefficients[0]


def fill_normal(chunk: LocalChunk, key: int, std: float) -> None:
    """Fill a chunk of a tensor with N(0, std); an element is a function of (key, its flat index in the whole tensor).

    The work is divided among as many threads as torch uses, and needs 1.5 MiB for each of them.
    """
    shape, sizes, data = chunk.shape, tuple(chunk.data.shape), chunk.data
    if not data.numel():
        return
    sharded = [dim for dim in range(len(shape)) if sizes[dim] != shape[dim]]
    dim = sharded[-1] if sharded else 0  # from this dimension on, the chunk's elements are contiguous in the tensor
    starts = np.zeros(1, np.int64)
    for i, (offset, size) in enumerate(zip(chunk.offsets, sizes, strict=True)):
        indices = offset + np.arange(size if i < dim else 1)
        starts = (starts[:, None] + indices * math.prod(shape[i + 1:])).ravel()
    rows, run = starts.astype(np.uint64), math.prod(sizes[dim:])
    target = data.view(len(rows), run)
    blocks = []
    for column in range(0, run, BLOCK):
        width = min(BLOCK, run - column)
        height = BLOCK // width
        blocks += [(row, min(row + height, len(rows)), column, width) for row in range(0, len(rows), height)]

    def fill_blocks(own_blocks: list[tuple[int, int, int, int]]) -> None:
        generator = NormalBlock()
        for row, end, column, width in own_blocks:
            values = generator.generate(key, rows[row:end] + np.uint64(column), width)
            values *= np.float32(std)
            target[row:end, column:column + width].copy_(torch.from_numpy(values))

    threads = min(torch.get_num_threads(), len(blocks))
    if threads == 1:
        fill_blocks(blocks)
    else:  # numpy releases the GIL
        with ThreadPoolExecutor(threads) as executor:
            list(executor.map(fill_blocks, (blocks[i::threads] for i in range(threads))))


@torch.no_grad()
def init_weights(model: Any, seed: int) -> None:
    """Initialise every parameter as `model.init` and the modules' `init_constants` say.

    Each element of a matrix is a function of (seed, name of the parameter, its index in the whole matrix). So two
    architectures give the same initial values to the parameters they have in common, the values are the same on every
    device and in every mode, and each rank generates only its own shards. Generated on the CPU.
    """
    for name, p, module in named_parameters_with_module(model):
        attribute = name.rpartition(".")[2]
        constants: dict[str, float] = getattr(module, "init_constants", {})
        if attribute in constants or p.dim() < 2:
            p.fill_(constants.get(attribute, 0.0 if attribute == "bias" else 1.0))
        elif std := model.init.init_std(init_role(module), p.shape[-1]):
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            fill_normal(local_chunk(p), int.from_bytes(digest[:8], "little"), std)
        else:
            p.zero_()


def named_parameters_with_module(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """(name, parameter, the module that owns it) of each parameter; tied weights once, as the embedding's."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for attribute, p in module.named_parameters(recurse=False):
            if id(p) not in seen:
                seen.add(id(p))
                yield f"{prefix}.{attribute}" if prefix else attribute, p, module
