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
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

from blockgpt.accounting.memory_trace import (
    PARTS,
    AsOnGPU,
    LiveBytes,
    SavedTensors,
    account_of,
    block_of,
    flex_attention_anywhere,
    only_blocks,
)
from blockgpt.training.recompute import recompute

PROBES = (2, 3)  # sequences in the two runs; a single one could take another path through an operator


@dataclass(frozen=True)
class LinearBytes:
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
        return LinearBytes(self.fixed + other.fixed, self.per_sequence + other.per_sequence)

    def __sub__(self, other):
        return LinearBytes(self.fixed - other.fixed, self.per_sequence - other.per_sequence)


def total(lines):
    return sum(lines, LinearBytes())


@dataclass(frozen=True)
class SavedTensor:
    """A storage that the forward pass leaves to the backward pass, and the innermost module that saved it first.

    module: its path in the model, '' for the model itself. part: one of `PARTS`. stage: where the forward pass was,
    'before', 'among' or 'after' the blocks. copy: whether it is a weight in the precision of the matrix products, and
    not an activation.
    """

    module: str
    part: str
    stage: str
    bytes: LinearBytes
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
    saved: LinearBytes
    copies: int
    parameters: int

    @property
    def held(self):
        return self.saved + LinearBytes(self.copies)


class MemoryAccount:
    """The memory of one training step of the model that a `ModelConfig` describes, in bytes.

    build_model: makes the model of a config, on the device of the context. dtype: torch.dtype of the matrix products; gpu: whether the kernels are a GPU's, or this CPU's.
    """

    def __init__(self, build_model, config, dtype, gpu):
        self.dtype, self.gpu, self.block_size = dtype, gpu, config.block_size
        self.mode = FakeTensorMode()
        self.model = self._fake(build_model, config)
        self.sizes = {p: p.numel() * p.element_size() for p in self.model.parameters()}
        self._passes = {}

    def _fake(self, build_model, config):
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
                    counts[account_of(path, embeds=isinstance(module, nn.Embedding))] += p.numel()
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
        """[`SavedTensor`], in the order in which they are saved."""
        accounts = []
        for one, other in zip(*self._forward, strict=True):
            assert one[:-1] == other[:-1], "the forward pass depends on the number of sequences"
            *place, needs_grad, size = one
            line = LinearBytes.through(size, other[-1])
            accounts.append(SavedTensor(*place, line, copy=needs_grad and not line.per_sequence))
        return accounts

    def saved_in(self, module=""):
        """`LinearBytes` of what is saved in the module with this path and in those inside it; '' is the whole model."""
        return total(s.bytes for s in self.saved if not module or f"{s.module}.".startswith(f"{module}."))

    def saved_by_part(self):
        """{part: `LinearBytes`}."""
        return {part: total(s.bytes for s in self.saved if s.part == part) for part in PARTS}

    @cached_property
    def shell(self):
        """`LinearBytes` of what is saved outside the blocks, before the head: it stays until the backward pass is through."""
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

        checkpointing: a kind of `blockgpt.training.recompute.CHECKPOINTING_MODES`. accumulating: whether every gradient is there already, from an
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
        """The `StepTrace` of such a step, run when it is first asked for."""
        key = checkpointing, accumulating
        if key not in self._passes:
            self._passes[key] = self._run_both(*key)
        return self._passes[key]

    def _run_both(self, checkpointing, accumulating):
        shown = sorted({account.kind: i for i, account in enumerate(self.blocks)}.values())  # the last of each kind
        runs = [self._run(sequences, shown, checkpointing, accumulating) for sequences in PROBES]

        copies = total(LinearBytes(self.blocks[i].copies) for i in shown)
        if checkpointing == "none":
            shell, kept = self.shell, {i: self.blocks[i].held for i in shown}
            copies = LinearBytes()  # they are among what is kept
        else:
            there = {place: LinearBytes.through(*(kept[place] for _, kept in runs)) for place in runs[0][1]}
            shell, kept = there.get("before", LinearBytes()), {i: there.get(i, LinearBytes()) for i in shown}
        alive, made = shell + total(kept.values()), LinearBytes()
        known = {"forward": alive + copies, "head": alive}
        made = LinearBytes(self.head_parameters)
        for i in reversed(shown):
            known[i] = alive if accumulating else alive + made
            alive, made = alive - kept[i], made + LinearBytes(self.blocks[i].parameters)
        known["embeddings"] = alive if accumulating else alive + made

        lines = {}
        for (phase, one), (other_phase, other) in zip(*(events for events, _ in runs), strict=True):
            assert phase == other_phase, "the backward pass depends on the number of sequences"
            name = phase if isinstance(phase, str) else self.blocks[phase].kind
            lines.setdefault(name, set()).add(LinearBytes.through(one, other) - known[phase])
        return StepTrace(shell, {self.blocks[i].kind: line for i, line in kept.items()}, lines)

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
class StepTrace:
    """A forward and backward pass in one kind of activation checkpointing.

    shell: what is kept outside the blocks, before the head; kept: {`BlockAccount.kind`: what is kept of such a block};
    lines: {phase: what was alive after each operation beyond what is kept for it and for the phases still to come, and
    beyond the gradients that were there when it began}. The phases: 'forward', 'head' (from the loss back to the last
    block; what the head saved is counted here), each kind of block, 'embeddings'.
    """

    shell: LinearBytes
    kept: dict
    lines: dict

    def working(self, phase, sequences):
        """The most that lives during a phase, in bytes."""
        return max(line(sequences) for line in self.lines[phase])


# -------------------------------------------------------------------- where a module belongs


# -------------------------------------------------------------------- watching a pass


# -------------------------------------------------------------------- a GPU's kernels


