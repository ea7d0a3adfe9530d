"""How much memory a training step needs, measured by running the model on tensors that have shapes and no data.

The forward and backward pass run under torch's `FakeTensorMode`. What autograd saves and what is alive at each
operation is counted, every storage once. This module knows no component: a new one is counted without any change here.
The size of a storage is linear in the number of sequences, so two runs give it for every micro-batch size.

The tensors are fake CPU tensors, also where a GPU exists: the result is the same on every computer, and no GPU memory
is used. `CudaOperators` imitates CUDA's operators where they save other tensors than the CPU's.

A head that computes its loss by chunks of tokens (`loss_chunk`) has two modes: a small micro-batch is not cut. Bytes
are linear in the number of sequences in each mode. Chunks after the second need no more memory, and do not run.

The forward pass runs all blocks. Blocks with equal parameters and equal saved bytes have the same signature. One block
of each signature runs the backward pass, once for each activation checkpointing mode that is requested. Only torch's
tensors in eager execution are counted: torch.compile saves fewer, and memory inside a kernel is not seen.
"""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

from blockgpt.accounting.memory_trace import (
    CATEGORIES,
    CudaOperators,
    LiveBytes,
    Phase,
    SavedStorage,
    SavedTensorRecorder,
    Stage,
    block_index,
    blocks_of,
    category_of,
    eager_flex_attention,
    run_only_blocks,
)
from blockgpt.kernels.linear_cross_entropy import first_chunks_only
from blockgpt.training.recompute import recompute

PROBES = (2, 3)  # sequences in the two runs; with a single sequence an operator could take another code path

Signature: TypeAlias = tuple[Any, ...]  # equal for blocks that need the same memory


@dataclass(frozen=True)
class LinearBytes:
    """Bytes as a linear function of the number of sequences."""

    fixed: int = 0
    per_sequence: int = 0

    @classmethod
    def fit(cls, first: int, second: int, probes: tuple[int, int] = PROBES) -> "LinearBytes":
        """The function through the bytes at both `probes`."""
        slope = (second - first) // (probes[1] - probes[0])
        return cls(first - slope * probes[0], slope)

    def __call__(self, sequences: int) -> int:
        return self.fixed + self.per_sequence * sequences

    def __add__(self, other: "LinearBytes") -> "LinearBytes":
        return LinearBytes(self.fixed + other.fixed, self.per_sequence + other.per_sequence)

    def __sub__(self, other: "LinearBytes") -> "LinearBytes":
        return LinearBytes(self.fixed - other.fixed, self.per_sequence - other.per_sequence)


def total(terms: Iterable[LinearBytes]) -> LinearBytes:
    return sum(terms, LinearBytes())


@dataclass(frozen=True)
class SavedTensor:
    """A storage that the forward pass saves for the backward pass.

    Attributes:
        module: path of the innermost module that saved it first, '' for the model itself.
        category: one of `CATEGORIES`.
        stage: of the forward pass: 'before', 'in' or 'after' the blocks.
        bytes: size of the storage.
        weight_copy: whether it is a weight in the precision of the matrix products, and not an activation.
    """

    module: str
    category: str
    stage: str
    bytes: LinearBytes
    weight_copy: bool

    @property
    def block(self) -> int | None:
        return block_index(self.module)


@dataclass(frozen=True)
class BlockAccount:
    """The memory of one block, in bytes.

    Attributes:
        signature: equal for blocks that need the same memory.
        saved: for the backward pass, without `weight_copies`.
        weight_copies: low-precision copies of the weights.
        parameters: the weights themselves.
    """

    signature: Signature
    saved: LinearBytes
    weight_copies: int
    parameters: int

    @property
    def saved_with_copies(self) -> LinearBytes:
        return self.saved + LinearBytes(self.weight_copies)


class PhaseBytes(NamedTuple):
    """Bytes at the peak of one phase of a training step.

    Attributes:
        phase: 'forward', 'head', 'block', 'embeddings' or 'optimizer'.
        gradients: the gradients that exist, if none existed before the step.
        activations: saved tensors, and temporary ones of the embeddings and blocks.
        logits: temporary tensors of the head and the loss.
    """

    phase: str
    gradients: int
    activations: int
    logits: int


@dataclass(frozen=True)
class StepTrace:
    """What a forward and backward pass in one activation checkpointing mode holds.

    Attributes:
        outside_blocks: saved outside the blocks, before the head.
        in_block: {signature: saved by such a block}.
        working: {phase: what is alive after each of its operations, in addition to what is saved for this phase and
            the later ones, and to the gradients that existed when it began}. The phases are 'forward', 'head' (from the
            loss back to the last block; what the head saved is counted here), each block signature, and 'embeddings'.
    """

    outside_blocks: LinearBytes
    in_block: dict[Signature, LinearBytes]
    working: dict[str | Signature, set[LinearBytes]]

    def working_peak(self, phase: str | Signature, sequences: int) -> int:
        """The maximum of `working` in a phase, in bytes."""
        return max(bytes(sequences) for bytes in self.working[phase])


class MemoryAccount:
    """The memory of one training step of a model, in bytes.

    Args:
        build_model: builds the model of a config on the device of the context.
        config: the model's configuration.
        dtype: of the matrix products.
        gpu: whether the operators are CUDA's, or this CPU's.
        frozen: the configurations of frozen models that exist beside it, of which only the weights are counted.
        sequences: of the micro-batches that `saved` and what follows from it describe. Any number in `phases` is exact.
    """

    def __init__(self, build_model: Callable[[Any], nn.Module], config: Any, dtype: torch.dtype, gpu: bool,
                 frozen: Iterable[Any] = (), sequences: int = PROBES[0]) -> None:
        self.dtype, self.gpu, self.block_size = dtype, gpu, config.block_size
        self.fake_mode = FakeTensorMode()
        self.model = self._build_fake(build_model, config)
        head: Any = self.model.lm_head
        self.loss_chunk: int = head.loss_chunk
        self.chunked = self._is_chunked(sequences)
        self.parameter_sizes = {p: p.numel() * p.element_size() for p in self.model.parameters()}
        with torch.device("meta"):
            models = [build_model(companion.resolve()) for companion in frozen]
        self.frozen_bytes = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
        self._traces: dict[tuple[str, bool, bool], StepTrace] = {}

    def _build_fake(self, build_model: Callable[[Any], nn.Module], config: Any) -> nn.Module:
        """The model with fake tensors. Tied parameters stay tied."""
        with torch.device("meta"):
            model = build_model(config.resolve("cuda" if self.gpu else "cpu"))
        fakes: dict[torch.Tensor, torch.Tensor] = {}
        with self.fake_mode:
            for module in model.modules():
                tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
                for table in tables:
                    for name, t in table.items():
                        if t is not None and t not in fakes:
                            fake = torch.empty(t.shape, dtype=t.dtype)
                            fakes[t] = nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake
                        table[name] = None if t is None else fakes[t]
            model.place_weights(torch.device("cuda" if self.gpu else "cpu"))  # type: ignore[operator] # of the GPT
        return model.train()

    # ---------------------------------------------------------------- what exists between steps

    @property
    def parameter_bytes(self) -> int:
        return sum(self.parameter_sizes.values())

    @property
    def gradient_bytes(self) -> int:
        return sum(size for p, size in self.parameter_sizes.items() if p.requires_grad)

    @property
    def optimizer_bytes(self) -> int:
        """AdamW's state of all parameters."""
        return sum(adamw_bytes(size) for p, size in self.parameter_sizes.items() if p.requires_grad)

    def parameters_in(self, *modules: nn.Module) -> int:
        """Bytes of the parameters of `modules`, each once."""
        return sum(self.parameter_sizes[p] for p in {p for module in modules for p in module.parameters()})

    def parameters_by_category(self) -> dict[str, int]:
        """{category: parameter count}; a tied head belongs to the embeddings."""
        counts: Counter[str] = Counter(dict.fromkeys(CATEGORIES, 0))
        counted = set()
        for path, module in self.model.named_modules():
            for p in module.parameters(recurse=False):
                if p not in counted:
                    counts[category_of(path, is_embedding=isinstance(module, nn.Embedding))] += p.numel()
                counted.add(p)
        return dict(counts)

    # ---------------------------------------------------------------- what the forward pass saves

    @cached_property
    def _forward(self) -> list[list[SavedStorage]]:
        """What the forward pass saves, for both `_probes`."""
        runs = []
        for sequences in self._probes(self.chunked):
            with self._fake_device(), SavedTensorRecorder(self.model) as recorder:
                loss = self._loss(sequences, self.chunked)
                runs.append(recorder.alive())
            del loss
        return runs

    def _is_chunked(self, sequences: int) -> bool:
        """Whether the loss of so many sequences is computed by chunks."""
        return 0 < self.loss_chunk < sequences * self.block_size

    def _probes(self, chunked: bool) -> tuple[int, int]:
        """Sequences in the two runs: `PROBES`, or with two whole chunks at least."""
        first = max(PROBES[0], -(-2 * self.loss_chunk // self.block_size)) if chunked else PROBES[0]
        return first, first + 1

    @contextlib.contextmanager
    def _fake_device(self) -> Iterator[None]:
        """A context with fake tensors and the operators of the device in question."""
        with self.fake_mode, warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")  # such as those of slow kernels, which a run reports itself
            if self.gpu:
                stack.enter_context(eager_flex_attention())
                stack.enter_context(CudaOperators(autocast=self.dtype != torch.float32))
            yield

    def _loss(self, sequences: int, chunked: bool) -> torch.Tensor:
        """The loss of a batch, computed as in the training loop."""
        idx = torch.zeros(sequences, self.block_size, dtype=torch.long)
        autocast = self.dtype != torch.float32
        with torch.autocast("cpu", dtype=self.dtype) if autocast else contextlib.nullcontext(), first_chunks_only(2):
            head: Any = self.model.lm_head
            head.loss_chunk = self.loss_chunk if chunked else 0
            try:
                return self.model(idx, idx, idx)
            finally:
                head.loss_chunk = self.loss_chunk

    @cached_property
    def saved(self) -> list[SavedTensor]:
        """What the forward pass saves, in the order in which it is saved."""
        tensors = []
        for first, second in zip(*self._forward, strict=True):
            assert first[:-1] == second[:-1], "the forward pass depends on the number of sequences"
            size = LinearBytes.fit(first.bytes, second.bytes, self._probes(self.chunked))
            tensors.append(SavedTensor(first.module, first.category, first.stage, size,
                                       weight_copy=first.requires_grad and not size.per_sequence))
        return tensors

    def saved_in(self, module: str = "") -> LinearBytes:
        """What is saved in the module with this path and in its submodules; '' is the whole model."""
        return total(s.bytes for s in self.saved if not module or f"{s.module}.".startswith(f"{module}."))

    def saved_by_category(self) -> dict[str, LinearBytes]:
        return {category: total(s.bytes for s in self.saved if s.category == category) for category in CATEGORIES}

    @cached_property
    def outside_blocks(self) -> LinearBytes:
        """What is saved outside the blocks, before the head. It is freed at the end of the backward pass."""
        return total(s.bytes for s in self.saved if s.block is None and s.stage != "after")

    @cached_property
    def head_parameters(self) -> int:
        """Bytes of the parameters whose gradients are computed before those of the blocks."""
        return self.parameters_in(self.model.get_submodule("lm_head"), self.model.get_submodule("final_norm"))

    @cached_property
    def blocks(self) -> list[BlockAccount]:
        """The blocks, in the order in which they run."""
        accounts = []
        for i, block in enumerate(blocks_of(self.model)):
            saved = [s for s in self.saved if s.block == i]
            shapes = tuple((name, p.shape) for name, p in block.named_parameters())
            accounts.append(BlockAccount(
                signature=(shapes, tuple((s.module.removeprefix(f"blocks.{i}"), s.bytes) for s in saved)),
                saved=total(s.bytes for s in saved if not s.weight_copy),
                weight_copies=sum(s.bytes.fixed for s in saved if s.weight_copy),
                parameters=self.parameters_in(block)))
        return accounts

    # ---------------------------------------------------------------- what is alive during a step

    def phases(self, sequences: int, checkpointing: str, accumulating: bool,
               weight_copies: bool = True) -> Iterator[PhaseBytes]:
        """The peak of each phase of a step, in the order of the phases.

        Args:
            sequences: of a micro-batch.
            checkpointing: a key of `blockgpt.training.recompute.CHECKPOINTING_MODES`.
            accumulating: whether all gradients exist from an earlier micro-batch.
            weight_copies: whether autocast makes low-precision copies of the blocks' weights.
        """
        trace = self._trace(checkpointing, accumulating, self._is_chunked(sequences))
        recomputes = checkpointing != "none"
        saved = [trace.in_block[b.signature](sequences) if recomputes else
                 b.saved(sequences) + b.weight_copies * weight_copies for b in self.blocks]
        # With checkpointing, autocast's cache alone holds the copies, until its context ends.
        cached = sum(b.weight_copies for b in self.blocks) if recomputes and weight_copies else 0
        gradients, alive = 0, trace.outside_blocks(sequences) + sum(saved)
        yield PhaseBytes("forward", gradients, alive + cached, trace.working_peak("forward", sequences))
        yield PhaseBytes("head", gradients, alive, trace.working_peak("head", sequences))
        gradients += self.head_parameters
        for block, size in zip(reversed(self.blocks), reversed(saved), strict=True):
            not_copied = block.weight_copies if recomputes and not weight_copies else 0
            working = trace.working_peak(block.signature, sequences) - not_copied
            yield PhaseBytes("block", gradients, alive + working, 0)
            gradients, alive = gradients + block.parameters, alive - size
        yield PhaseBytes("embeddings", gradients, alive + trace.working_peak("embeddings", sequences), 0)
        yield PhaseBytes("optimizer", self.gradient_bytes, 0, 0)

    def _trace(self, checkpointing: str, accumulating: bool, chunked: bool) -> StepTrace:
        """The `StepTrace` of such a step, computed at its first use."""
        key = checkpointing, accumulating, chunked
        if key not in self._traces:
            self._traces[key] = self._run_probes(*key)
        return self._traces[key]

    def _run_probes(self, checkpointing: str, accumulating: bool, chunked: bool) -> StepTrace:
        traced = sorted({block.signature: i for i, block in enumerate(self.blocks)}.values())  # the last of each
        probes = self._probes(chunked)
        (events, allocated), (events_2, allocated_2) = (
            self._run(sequences, traced, checkpointing, accumulating, chunked) for sequences in probes)

        if checkpointing == "none":
            outside_blocks, in_block = self.outside_blocks, {i: self.blocks[i].saved_with_copies for i in traced}
            copies = LinearBytes()  # in_block includes them
        else:
            by_stage = {stage: LinearBytes.fit(size, allocated_2[stage], probes) for stage, size in allocated.items()}
            outside_blocks = by_stage.get("before", LinearBytes())
            in_block = {i: by_stage.get(i, LinearBytes()) for i in traced}
            copies = total(LinearBytes(self.blocks[i].weight_copies) for i in traced)
        expected = self._expected(traced, outside_blocks, in_block, copies, accumulating)

        working: dict[str | Signature, set[LinearBytes]] = {}
        for (phase, first), (phase_2, second) in zip(events, events_2, strict=True):
            assert phase == phase_2, "the backward pass depends on the number of sequences"
            name = phase if isinstance(phase, str) else self.blocks[phase].signature
            working.setdefault(name, set()).add(LinearBytes.fit(first, second, probes) - expected[phase])
        return StepTrace(outside_blocks, {self.blocks[i].signature: size for i, size in in_block.items()}, working)

    def _expected(self, traced: Sequence[int], outside_blocks: LinearBytes, in_block: dict[int, LinearBytes],
                  copies: LinearBytes, accumulating: bool) -> dict[Phase, LinearBytes]:
        """{phase of a run: what is saved for it and for the later phases, and the gradients from the earlier ones}."""
        alive, gradients = outside_blocks + total(in_block.values()), LinearBytes(self.head_parameters)
        expected: dict[Phase, LinearBytes] = {"forward": alive + copies, "head": alive}
        for i in reversed(traced):
            expected[i] = alive if accumulating else alive + gradients
            alive, gradients = alive - in_block[i], gradients + LinearBytes(self.blocks[i].parameters)
        expected["embeddings"] = alive if accumulating else alive + gradients
        return expected

    def _run(self, sequences: int, traced: Sequence[int], checkpointing: str, accumulating: bool,
             chunked: bool) -> tuple[list[tuple[Phase, int]], Counter[Stage]]:
        """Run a forward and backward pass through the `traced` blocks.

        Returns:
            ([(phase, bytes alive)] after each operation, {stage of the forward pass: bytes allocated there that are
            alive when the backward pass begins}).
        """
        with self._fake_device():
            for p in self.parameter_sizes:
                p.grad = torch.empty_like(p) if accumulating else None
            existing = [t for p in self.parameter_sizes for t in (p, p.grad) if t is not None]
            recompute(self.model, checkpointing)
            with LiveBytes(existing) as live, run_only_blocks(self.model, traced, live):
                loss = self._loss(sequences, chunked)
                live.phase, allocated = "head", live.by_stage()
                # Function modes such as CudaOperators do not see the blocks run again within loss.backward().
                torch.autograd.Variable._execution_engine.run_backward(
                    (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)
            recompute(self.model, "none")
        self.model.zero_grad(set_to_none=True)
        return live.events, allocated


def adamw_bytes(parameter_bytes: int) -> int:
    """Bytes of AdamW's state of one parameter: two tensors of its shape and dtype, and a float32 step count."""
    return 2 * parameter_bytes + 4
