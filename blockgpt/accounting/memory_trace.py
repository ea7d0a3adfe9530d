"""Observes a forward and backward pass: which tensors autograd saves, and how many bytes are alive at each operation.

The passes run under torch's `FakeTensorMode` (see `memory.py`), so tensors have shapes and no data. This module also
replaces the CPU operators whose CUDA counterparts save other tensors (`CudaOperators`). If a new CUDA kernel saves
something different from the CPU's, imitate it there.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HEAD = "output head and loss"
CATEGORIES = ("embeddings", "attention", "ffn", "norms and residual", HEAD)

Phase = str | int  # of a step: 'forward', 'head', the index of a block in the backward pass, 'embeddings'
Stage = str | int  # of the forward pass: 'before' the blocks, the index of a block, 'after' the blocks


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The blocks of a model, typed."""
    return cast(nn.ModuleList, model.blocks)


def block_index(path: str) -> int | None:
    """The index of the block that contains the module with this path; None outside the blocks."""
    top, _, rest = path.partition(".")
    return int(rest.partition(".")[0]) if top == "blocks" and rest else None


def category_of(path: str, is_embedding: bool, stage: str | None = None) -> str:
    """The one of `CATEGORIES` that a module belongs to, by its path and not by its class.

    Args:
        path: of the module in the model, '' for the model itself.
        is_embedding: whether it is an embedding table.
        stage: of the forward pass, as in `SavedStorage`.
    """
    if block_index(path) is not None:
        return {"attn": "attention", "ffn": "ffn"}.get(".".join(path.split(".")[2:3]), "norms and residual")
    if path.split(".")[0] == "lm_head" or (not path and stage == "after"):
        return HEAD
    return "embeddings" if is_embedding or stage == "before" else "norms and residual"


# ---------------------------------------------------------------- what autograd saves


class SavedStorage(NamedTuple):
    """A storage that autograd saved in one forward pass.

    Attributes:
        module: path of the innermost module that was running.
        category: one of `CATEGORIES`.
        stage: of the forward pass: 'before', 'in' or 'after' the blocks.
        requires_grad: whether the saved tensor does.
        bytes: size of the storage.
    """

    module: str
    category: str
    stage: str
    requires_grad: bool
    bytes: int


class SavedTensorRecorder:
    """A context that records what autograd saves in the forward pass of a model, and in which module.

    Every storage is recorded once. Parameters are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # By the address of the storage; None: a parameter, which is not recorded.
        self.entries: dict[int, tuple[Callable[[], torch.UntypedStorage | None], SavedStorage] | None] = {
            p.untyped_storage()._cdata: None for p in model.parameters()}
        self.running, self.stage = [("", False)], "before"  # (path, is_embedding) of the modules that are running

    def __enter__(self) -> "SavedTensorRecorder":
        self.hooks = contextlib.ExitStack()
        blocks = blocks_of(self.model)
        for path, module in self.model.named_modules():
            pre_hook = partial(self._enter, (path, isinstance(module, nn.Embedding)), module in set(blocks))
            post_hook = partial(self._exit, module is blocks[-1])
            self.hooks.callback(module.register_forward_pre_hook(pre_hook).remove)
            self.hooks.callback(module.register_forward_hook(post_hook).remove)
        self.hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(self._save, lambda t: t))
        return self

    def __exit__(self, *_: object) -> None:
        self.hooks.close()

    def _enter(self, entry: tuple[str, bool], is_block: bool, module: nn.Module, args: Any) -> None:
        self.running.append(entry)
        self.stage = "in" if is_block else self.stage

    def _exit(self, is_last_block: bool, module: nn.Module, args: Any, output: Any) -> None:
        self.running.pop()
        self.stage = "after" if is_last_block else self.stage

    def _save(self, t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in self.entries:
            path, is_embedding = self.running[-1]
            entry = SavedStorage(path, category_of(path, is_embedding, self.stage), self.stage, t.requires_grad,
                                 storage.nbytes())
            self.entries[storage._cdata] = weakref.ref(storage), entry
            weakref.finalize(storage, self.entries.pop, storage._cdata, None)  # the address may be reused
        return t.detach()  # an output that is its own node's saved tensor would keep that node alive

    def alive(self) -> list[SavedStorage]:
        """What is still saved, in the order in which it was saved."""
        return [saved[1] for saved in self.entries.values() if saved and saved[0]() is not None]


# ---------------------------------------------------------------- what is alive


class LiveBytes(TorchDispatchMode):
    """A context that counts the bytes of all storages that were allocated in it and are still alive.

    Attributes:
        events: [(phase, bytes alive)] after each operation.
        phase: of the step. The caller sets it.
        stage: of the forward pass.
    """

    def __init__(self, existing: Iterable[torch.Tensor]) -> None:
        """existing: tensors that are not counted."""
        super().__init__()
        # By the address of the storage: (stage of its allocation, bytes); None: not counted.
        self.storages: dict[int, tuple[Stage, int] | None] = {t.untyped_storage()._cdata: None for t in existing}
        self.bytes = 0
        self.events: list[tuple[Phase, int]] = []
        self.phase: Phase = "forward"
        self.stage: Stage = "before"

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and (storage := t.untyped_storage())._cdata not in self.storages:
                self.storages[storage._cdata] = self.stage, storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.events.append((self.phase, self.bytes))
        return result

    def _free(self, address: int, size: int) -> None:
        self.storages.pop(address, None)
        self.bytes -= size

    def enter_stage(self, stage: Stage, x: torch.Tensor) -> None:
        """The forward pass reaches `stage` with input x, which from now on counts as allocated there."""
        self.stage, address = stage, x.untyped_storage()._cdata
        storage = self.storages[address]
        assert storage is not None, "the input of a block is a parameter"
        self.storages[address] = stage, storage[1]

    def by_stage(self) -> Counter[Stage]:
        """{stage: bytes allocated there that are alive}."""
        counts: Counter[Stage] = Counter()
        for stage, size in filter(None, self.storages.values()):
            counts[stage] += size
        return counts


@contextlib.contextmanager
def run_only_blocks(model: nn.Module, traced: Sequence[int], live: LiveBytes) -> Iterator[None]:
    """A context in which only the `traced` blocks compute and the others return their input.

    It sets the phase and the stage of `live` as the passes reach the traced blocks.
    """
    def set_phase_in_backward(phase: Phase, t: torch.Tensor) -> None:
        t.register_hook(lambda grad: setattr(live, "phase", phase))

    def after_block(i: int, module: nn.Module, args: Any, out: torch.Tensor) -> None:
        live.enter_stage("after", out)
        set_phase_in_backward(i, out)

    def before_block(i: int, module: nn.Module, args: Any) -> None:
        live.enter_stage(i, args[0])

    def before_first_block(module: nn.Module, args: Any) -> None:
        set_phase_in_backward("embeddings", args[0])

    blocks = blocks_of(model)
    with contextlib.ExitStack() as stack:
        for i, block in enumerate(blocks):
            if i in traced:
                stack.callback(block.register_forward_pre_hook(partial(before_block, i)).remove)
                stack.callback(block.register_forward_hook(partial(after_block, i)).remove)
            else:
                block.forward = lambda x, *args, **kwargs: x
                stack.callback(delattr, block, "forward")
        stack.callback(blocks[traced[0]].register_forward_pre_hook(before_first_block).remove)
        yield


# ---------------------------------------------------------------- CUDA's operators


class CudaOperators(TorchFunctionMode):
    """A context in which operators on fake CPU tensors save what CUDA's operators save, where the two differ.

    On CUDA, attention with dropout is fused and saves no attention weights; flex_attention does not either. Dropout
    saves one bool per element. RMSNorm is one kernel that saves its input and one value per row. Autocast runs the
    functions of `FLOAT32` in float32 (ATen/autocast_mode.h; the CPU's list is shorter).
    """

    FLOAT32 = frozenset(("softmax", "log_softmax", "layer_norm", "rms_norm", "group_norm", "exp", "log", "pow",
                         "__pow__", "rsqrt", "reciprocal", "softplus", "logsumexp", "cumsum", "sum", "norm",
                         "vector_norm", "cosine_similarity"))

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.autocast = autocast

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if self.autocast and name in self.FLOAT32:
            args = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        if name == "rms_norm":
            return FusedRMSNorm.apply(args[0], args[2] if len(args) > 2 else kwargs.get("weight"))
        is_attention = name in ("flex_attention", "scaled_dot_product_attention")
        if is_attention and args[0].shape[-1] != args[2].shape[-1]:  # the CPU's fused kernel needs equal widths
            out = FusedAttention.apply(*args[:3], kwargs.get("attn_mask"), self.autocast)
            return (out, args[0].new_empty(0), args[0].new_empty(0)) if name == "flex_attention" else out
        if name == "flex_attention":
            return *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3]), args[0].new_empty(0)
        if function is F.dropout:
            return native_dropout(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            kwargs.pop("dropout_p", None)
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        return function(*args, **kwargs)


@contextlib.contextmanager
def eager_flex_attention() -> Iterator[None]:
    """A context in which flex_attention accepts CPU tensors that require gradients, and runs without torch.compile."""
    patches = {"_validate_device": lambda *tensors: None, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG": True}
    originals = {name: getattr(flex_attention, name) for name in patches}
    try:
        for name, value in patches.items():
            setattr(flex_attention, name, value)
        yield
    finally:
        for name, value in originals.items():
            setattr(flex_attention, name, value)


def native_dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """F.dropout with the mask that CUDA saves."""
    return torch.native_dropout(x, p, training)[0] if p and training else x


class FusedAttention(torch.autograd.Function):
    """What a fused attention kernel allocates and saves; it computes nothing. q and k may be wider than v."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                mask: torch.Tensor | None, autocast: bool) -> torch.Tensor:
        if autocast:
            q, k, v = (t.to(torch.get_autocast_dtype("cpu")) for t in (q, k, v))
        out = q.new_empty(*q.shape[:-1], v.shape[-1])  # (B, H, T, d_v)
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(torch.empty_like(t) for t in ctx.saved_tensors[:3]), None, None


class FusedRMSNorm(torch.autograd.Function):
    """What CUDA's RMSNorm allocates and saves; it computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)
