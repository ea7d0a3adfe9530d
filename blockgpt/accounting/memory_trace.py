"""Watching a forward and backward pass on tensors without content: what autograd saves, what lives meanwhile."""

import contextlib
import weakref
from collections import Counter
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HEAD = "output head and loss"
PARTS = ("embeddings", "attention", "ffn", "norms and residual", HEAD)


def block_of(path):
    """The index of the block that the module with this path lies in, or None."""
    top, _, rest = path.partition(".")
    return int(rest.partition(".")[0]) if top == "blocks" and rest else None


def account_of(path, embeds, stage=None):
    """The part (of `PARTS`) that a module belongs to, by its place in the tree and not by its class.

    embeds: whether it is an embedding table. stage: where the forward pass is, as in `Saved`.
    """
    if block_of(path) is not None:
        return {"attn": "attention", "ffn": "ffn"}.get(".".join(path.split(".")[2:3]), "norms and residual")
    if path.split(".")[0] == "lm_head" or (not path and stage == "after"):
        return HEAD
    return "embeddings" if embeds or stage == "before" else "norms and residual"


class SavedTensors:
    """A context that notes what autograd saves in the model's forward pass, and in which module: not the parameters."""

    def __init__(self, model):
        self.model = model
        self.noted = {p.untyped_storage()._cdata: None for p in model.parameters()}
        self.running, self.stage = [("", False)], "before"

    def __enter__(self):
        self.hooks = contextlib.ExitStack()
        last = self.model.blocks[-1]
        for path, module in self.model.named_modules():
            enter = partial(self._enter, (path, isinstance(module, nn.Embedding)), module in set(self.model.blocks))
            leave = partial(self._leave, module is last)
            self.hooks.callback(module.register_forward_pre_hook(enter).remove)
            self.hooks.callback(module.register_forward_hook(leave).remove)
        self.hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(self._save, lambda t: t))
        return self

    def __exit__(self, *_):
        self.hooks.close()

    def _enter(self, place, is_block, module, args):
        self.running.append(place)
        self.stage = "among" if is_block else self.stage

    def _leave(self, is_last, module, args, output):
        self.running.pop()
        self.stage = "after" if is_last else self.stage

    def _save(self, t):
        storage = t.untyped_storage()
        if storage._cdata not in self.noted:
            path, embeds = self.running[-1]
            entry = (path, account_of(path, embeds, self.stage), self.stage, t.requires_grad, storage.nbytes())
            self.noted[storage._cdata] = (weakref.ref(storage), entry)
            weakref.finalize(storage, self.noted.pop, storage._cdata, None)  # the address may be given again
        return t

    def alive(self):
        """[(module, part, stage, whether it needs a gradient, bytes)] of what is still saved."""
        return [noted[1] for noted in self.noted.values() if noted and noted[0]() is not None]


class LiveBytes(TorchDispatchMode):
    """A context that counts the bytes of all storages made in it that still live. events: [(phase, bytes)].

    place: where the forward pass is: 'before' the blocks, the index of a block, or 'after' them.
    """

    def __init__(self, there):
        """there: tensors that are not to be counted."""
        super().__init__()
        self.known = {t.untyped_storage()._cdata: None for t in there}  # or (place, bytes)
        self.bytes, self.events, self.phase, self.place = 0, [], "forward", "before"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and (storage := t.untyped_storage())._cdata not in self.known:
                self.known[storage._cdata] = self.place, storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.events.append((self.phase, self.bytes))
        return result

    def _freed(self, address, size):
        self.known.pop(address, None)
        self.bytes -= size

    def go(self, place, x):
        """The forward pass comes to this place, and brings it x, which counts as made there: who needs it keeps it."""
        self.place, address = place, x.untyped_storage()._cdata
        self.known[address] = place, self.known[address][1]

    def by_place(self):
        """{place: bytes made there that live}."""
        counts = Counter()
        for place, size in filter(None, self.known.values()):
            counts[place] += size
        return counts


@contextlib.contextmanager
def only_blocks(model, shown, live):
    """Every block that is not `shown` hands its input through; `live` is told of the places and phases of the pass."""
    def follow(phase, t):
        t.register_hook(lambda grad: setattr(live, "phase", phase))

    def leave(i, module, args, out):
        live.go("after", out)
        follow(i, out)

    with contextlib.ExitStack() as stack:
        for i, block in enumerate(model.blocks):
            if i in shown:
                stack.callback(block.register_forward_pre_hook(lambda m, args, i=i: live.go(i, args[0])).remove)
                stack.callback(block.register_forward_hook(partial(leave, i)).remove)
            else:
                block.forward = lambda x, *args, **kwargs: x
                stack.callback(delattr, block, "forward")
        first = model.blocks[shown[0]]
        stack.callback(first.register_forward_pre_hook(lambda m, args: follow("embeddings", args[0])).remove)
        yield


class AsOnGPU(TorchFunctionMode):
    """A context in which operators on fake CPU tensors save what CUDA's do, where the two differ.

    On CUDA, attention with dropout is fused and keeps no weights, nor does flex_attention; dropout keeps a bool for
    each number; RMSNorm is one kernel and keeps x and one number a row; autocast runs the functions of `FLOAT32` in
    float32 (ATen/autocast_mode.h; the CPU's list is shorter).
    """

    FLOAT32 = frozenset(("softmax", "log_softmax", "layer_norm", "rms_norm", "group_norm", "exp", "log", "pow",
                         "__pow__", "rsqrt", "reciprocal", "softplus", "logsumexp", "cumsum", "sum", "norm",
                         "vector_norm", "cosine_similarity"))

    def __init__(self, autocast):
        super().__init__()
        self.autocast = autocast

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if self.autocast and name in self.FLOAT32:
            args = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        if name == "rms_norm":
            return FusedRMSNorm.apply(args[0], args[2] if len(args) > 2 else kwargs.get("weight"))
        if name == "flex_attention":
            return *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3]), args[0].new_empty(0)
        if function is F.dropout:
            return native_dropout(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            kwargs.pop("dropout_p", None)
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        return function(*args, **kwargs)


@contextlib.contextmanager
def flex_attention_anywhere():
    """A context in which flex_attention, which trains on CUDA alone and compiles itself, comes to `AsOnGPU`."""
    plain = {"_validate_device": lambda *tensors: None, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG": True}
    before = {name: getattr(flex_attention, name) for name in plain}
    try:
        for name, value in plain.items():
            setattr(flex_attention, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(flex_attention, name, value)


def native_dropout(x, p=0.5, training=True, inplace=False):
    return torch.native_dropout(x, p, training)[0] if p and training else x


class FusedRMSNorm(torch.autograd.Function):
    """The shapes of CUDA's RMSNorm."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)
