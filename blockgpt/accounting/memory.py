"""What a training step holds in memory, found by running the model on tensors that have shapes and no content.

Nothing here knows a component: forward and backward pass run under torch's `FakeTensorMode`, and what they save and
what lives meanwhile is counted as it is made, each storage once. So a new component is in the account without
stating anything. A storage's bytes are affine in the number of sequences, so two runs tell them for every number.

The tensors pretend to be on the CPU, also where a GPU is: the account is the same on every machine, and no GPU's memory
is touched. What a GPU's operators save otherwise is imitated (`AsOnGPU`).

All blocks run in the forward pass. Blocks with equal parameters and equal saved bytes are alike, and one of those that
are goes through the backward pass, once for each kind of activation checkpointing that is asked for. What is counted
are torch's tensors, executed eagerly: torch.compile keeps fewer, and what a kernel allocates inside itself is not seen.
"""

import contextlib
import warnings
import weakref
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blockgpt.training.recompute import recompute
from model_builder import build_model

HEAD = "output head and loss"
PARTS = ("embeddings", "attention", "ffn", "norms and residual", HEAD)
PROBES = (2, 3)  # sequences in the two runs; a single one could take another path through an operator


@dataclass(frozen=True)
class Line:
    """Bytes as a function of the number of sequences."""

    fixed: int = 0
    per_sequence: int = 0

    @classmethod
    def through(cls, *bytes):
        """The line through the bytes at both `PROBES`."""
        slope = (bytes[1] - bytes[0]) // (PROBES[1] - PROBES[0])
        return cls(bytes[0] - slope * PROBES[0], slope)

    def __call__(self, sequences):
        return self.fixed + self.per_sequence * sequences

    def __add__(self, other):
        return Line(self.fixed + other.fixed, self.per_sequence + other.per_sequence)

    def __sub__(self, other):
        return Line(self.fixed - other.fixed, self.per_sequence - other.per_sequence)


def total(lines):
    return sum(lines, Line())


@dataclass(frozen=True)
class Saved:
    """A storage that the forward pass leaves to the backward pass, and the innermost module that saved it first.

    module: its path in the model, '' for the model itself. part: one of `PARTS`. stage: where the forward pass was,
    'before', 'among' or 'after' the blocks. copy: whether it is a weight in the precision of the matrix products, and
    not an activation.
    """

    module: str
    part: str
    stage: str
    bytes: Line
    copy: bool

    @property
    def block(self):
        return block_of(self.module)


@dataclass(frozen=True)
class BlockAccount:
    """One block of the model, in bytes.

    kind: equal for blocks that cost the same. saved: for the backward pass, without the low-precision `copies` of
    weights.
    """

    kind: tuple
    saved: Line
    copies: int
    parameters: int

    @property
    def held(self):
        return self.saved + Line(self.copies)


class MemoryAccount:
    """The memory of one training step of the model that a `ModelConfig` describes, in bytes.

    dtype: torch.dtype of the matrix products; gpu: whether the kernels are a GPU's, or this CPU's.
    """

    def __init__(self, config, dtype, gpu):
        self.dtype, self.gpu, self.block_size = dtype, gpu, config.block_size
        self.mode = FakeTensorMode()
        self.model = self._fake(config)
        self.sizes = {p: p.numel() * p.element_size() for p in self.model.parameters()}
        self._passes = {}

    def _fake(self, config):
        """The model with tensors that only have shapes; what is tied stays tied."""
        with torch.device("meta"):
            model = build_model(config)
        made = {}
        with self.mode:
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, t in tensors.items():
                        if t is not None and t not in made:
                            fake = torch.empty(t.shape, dtype=t.dtype)
                            made[t] = nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake
                        tensors[name] = made.get(t)
        return model.train()

    # ---------------------------------------------------------------- what stays from step to step

    @property
    def parameter_bytes(self):
        return sum(self.sizes.values())

    @property
    def gradient_bytes(self):
        return sum(size for p, size in self.sizes.items() if p.requires_grad)

    @property
    def optimizer_bytes(self):
        """AdamW's: two moments of the parameter's shape and type, and a float32 count of steps, for each tensor."""
        return sum(2 * size + 4 for p, size in self.sizes.items() if p.requires_grad)

    def parameters_in(self, *modules):
        """Bytes of the parameters of `modules`, each once."""
        return sum(self.sizes[p] for p in {p for module in modules for p in module.parameters()})

    def parameters_by_part(self):
        """{part: number of parameters}; a tied head is among the embeddings."""
        counts, seen = Counter(dict.fromkeys(PARTS, 0)), set()
        for path, module in self.model.named_modules():
            for p in module.parameters(recurse=False):
                if p not in seen:
                    counts[part_of(path, embeds=isinstance(module, nn.Embedding))] += p.numel()
                seen.add(p)
        return dict(counts)

    # ---------------------------------------------------------------- what the forward pass saves

    @cached_property
    def _forward(self):
        """[an entry of `SavedTensors.alive`] for both `PROBES`."""
        runs = []
        for sequences in PROBES:
            with self._machine(), SavedTensors(self.model) as record:
                loss = self._loss(sequences)
                runs.append(record.alive())
            del loss
        return runs

    @contextlib.contextmanager
    def _machine(self):
        """Where tensors have no content, and operators are those of the machine that is asked about."""
        with self.mode, warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")  # of slow kernels, say: that is for the run to tell
            if self.gpu:
                stack.enter_context(flex_attention_anywhere())
                stack.enter_context(AsOnGPU(autocast=self.dtype != torch.float32))
            yield

    def _loss(self, sequences):
        """The loss of a batch, as the training loop computes it."""
        idx = torch.zeros(sequences, self.block_size, dtype=torch.long)
        low = self.dtype != torch.float32
        with torch.autocast("cpu", dtype=self.dtype) if low else contextlib.nullcontext():
            return self.model(idx, idx, documents=idx)[1]

    @cached_property
    def saved(self):
        """[`Saved`], in the order in which they are saved."""
        accounts = []
        for one, other in zip(*self._forward, strict=True):
            assert one[:-1] == other[:-1], "the forward pass depends on the number of sequences"
            *place, needs_grad, size = one
            line = Line.through(size, other[-1])
            accounts.append(Saved(*place, line, copy=needs_grad and not line.per_sequence))
        return accounts

    def saved_in(self, module=""):
        """`Line` of what is saved in the module with this path and in those inside it; '' is the whole model."""
        return total(s.bytes for s in self.saved if not module or f"{s.module}.".startswith(f"{module}."))

    def saved_by_part(self):
        """{part: `Line`}."""
        return {part: total(s.bytes for s in self.saved if s.part == part) for part in PARTS}

    @cached_property
    def shell(self):
        """`Line` of what is saved outside the blocks, before the head: it stays until the backward pass is through."""
        return total(s.bytes for s in self.saved if s.block is None and s.stage != "after")

    @cached_property
    def head_parameters(self):
        """Bytes of the parameters whose gradients are made before those of the blocks."""
        return self.parameters_in(self.model.lm_head, self.model.final_norm)

    @cached_property
    def blocks(self):
        """[`BlockAccount`], in the order in which they run."""
        accounts = []
        for i, block in enumerate(self.model.blocks):
            saved = [s for s in self.saved if s.block == i]
            shapes = tuple((name, p.shape) for name, p in block.named_parameters())
            accounts.append(BlockAccount(
                kind=(shapes, tuple((s.module.removeprefix(f"blocks.{i}"), s.bytes) for s in saved)),
                saved=total(s.bytes for s in saved if not s.copy), copies=sum(s.bytes.fixed for s in saved if s.copy),
                parameters=self.parameters_in(block)))
        return accounts

    # ---------------------------------------------------------------- what lives while it runs

    def moments(self, sequences, checkpointing, accumulating, copies=True):
        """(gradients made, activations, logits and loss), in bytes, at the fullest moment of each phase of a step.

        checkpointing: a kind of `blockgpt.training.recompute.KINDS`. accumulating: whether every gradient is there already, from an
        earlier micro-batch. copies: whether autocast makes low-precision copies of the blocks' weights.
        """
        of = self._pass(checkpointing, accumulating)
        again = checkpointing != "none"
        kept = [of.kept[b.kind](sequences) if again else b.saved(sequences) + b.copies * copies for b in self.blocks]
        cached = sum(b.copies for b in self.blocks) if again and copies else 0  # until autocast's context ends
        made, alive = 0, of.shell(sequences) + sum(kept)
        yield made, alive + cached, of.working("forward", sequences)
        yield made, alive, of.working("head", sequences)
        made += self.head_parameters
        for block, part in zip(reversed(self.blocks), reversed(kept), strict=True):
            uncast = block.copies if again and not copies else 0
            yield made, alive + of.working(block.kind, sequences) - uncast, 0
            made, alive = made + block.parameters, alive - part
        yield made, alive + of.working("embeddings", sequences), 0
        yield self.gradient_bytes, 0, 0  # the optimizer's step

    def _pass(self, checkpointing, accumulating):
        """The `Pass` of such a step, run when it is first asked for."""
        key = checkpointing, accumulating
        if key not in self._passes:
            self._passes[key] = self._run_both(*key)
        return self._passes[key]

    def _run_both(self, checkpointing, accumulating):
        shown = sorted({account.kind: i for i, account in enumerate(self.blocks)}.values())  # the last of each kind
        runs = [self._run(sequences, shown, checkpointing, accumulating) for sequences in PROBES]

        copies = total(Line(self.blocks[i].copies) for i in shown)
        if checkpointing == "none":
            shell, kept = self.shell, {i: self.blocks[i].held for i in shown}
            copies = Line()  # they are among what is kept
        else:
            there = {place: Line.through(*(kept[place] for _, kept in runs)) for place in runs[0][1]}
            shell, kept = there.get("before", Line()), {i: there.get(i, Line()) for i in shown}
        alive, made = shell + total(kept.values()), Line()
        known = {"forward": alive + copies, "head": alive}
        made = Line(self.head_parameters)
        for i in reversed(shown):
            known[i] = alive if accumulating else alive + made
            alive, made = alive - kept[i], made + Line(self.blocks[i].parameters)
        known["embeddings"] = alive if accumulating else alive + made

        lines = {}
        for (phase, one), (other_phase, other) in zip(*(events for events, _ in runs), strict=True):
            assert phase == other_phase, "the backward pass depends on the number of sequences"
            name = phase if isinstance(phase, str) else self.blocks[phase].kind
            lines.setdefault(name, set()).add(Line.through(one, other) - known[phase])
        return Pass(shell, {self.blocks[i].kind: line for i, line in kept.items()}, lines)

    def _run(self, sequences, shown, checkpointing, accumulating):
        """([(phase, bytes alive)] after each operation of a forward and backward pass through the `shown` blocks,
        {place in the forward pass: bytes made there that the backward pass finds})."""
        with self._machine():
            for p in self.sizes:
                p.grad = torch.empty_like(p) if accumulating else None
            there = [t for p in self.sizes for t in (p, p.grad) if t is not None]
            recompute(self.model, checkpointing)
            with LiveBytes(there) as live, only_blocks(self.model, shown, live):
                loss = self._loss(sequences)
                live.phase, kept = "head", live.by_place()
                # Not loss.backward(), within which no function mode, such as AsOnGPU, sees the blocks run again.
                torch.autograd.Variable._execution_engine.run_backward(
                    (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)
            recompute(self.model, "none")
        self.model.zero_grad(set_to_none=True)
        return live.events, kept


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass in one kind of activation checkpointing.

    shell: what is kept outside the blocks, before the head; kept: {`BlockAccount.kind`: what is kept of such a block};
    lines: {phase: what was alive after each operation beyond what is kept for it and for the phases still to come, and
    beyond the gradients that were there when it began}. The phases: 'forward', 'head' (from the loss back to the last
    block; what the head saved is counted here), each kind of block, 'embeddings'.
    """

    shell: Line
    kept: dict
    lines: dict

    def working(self, phase, sequences):
        """The most that lives during a phase, in bytes."""
        return max(line(sequences) for line in self.lines[phase])


# -------------------------------------------------------------------- where a module belongs


def block_of(path):
    """The index of the block that the module with this path lies in, or None."""
    top, _, rest = path.partition(".")
    return int(rest.partition(".")[0]) if top == "blocks" and rest else None


def part_of(path, embeds, stage=None):
    """The part (of `PARTS`) that a module belongs to, by its place in the tree and not by its class.

    embeds: whether it is an embedding table. stage: where the forward pass is, as in `Saved`.
    """
    if block_of(path) is not None:
        return {"attn": "attention", "ffn": "ffn"}.get(".".join(path.split(".")[2:3]), "norms and residual")
    if path.split(".")[0] == "lm_head" or (not path and stage == "after"):
        return HEAD
    return "embeddings" if embeds or stage == "before" else "norms and residual"


# -------------------------------------------------------------------- watching a pass


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
            entry = (path, part_of(path, embeds, self.stage), self.stage, t.requires_grad, storage.nbytes())
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


# -------------------------------------------------------------------- a GPU's kernels


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
