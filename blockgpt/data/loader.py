"""Batches of token sequences. Each is a pure function of (seed, step), so there is no loader state to save or restore.

A sequence is block_size + 1 consecutive tokens: all but the last are the inputs, all but the first the targets.
`TrainBatches` reads each sequence of the train split once per epoch, in the order of a keyed permutation that is
computed on the fly. `val_batches` reads a fixed set of sequences of the val split. Both read memory-mapped shards.
A batch is a dict of tensors; its keys are listed at `Batch`. To form sequences in another way: a subclass of
`GlobalBatches`, as in packing.py and mixture.py. A new tensor of a batch needs a key and no other change.
"""

import abc
import collections
import concurrent.futures
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from blockgpt.data.dataset import Dataset
from blockgpt.data.token_files import check_token_ids
from blockgpt.errors import DataError

# The tensors of a batch by name, each with B rows. `tokens` and `targets`, int64 (B, block_size): inputs, and what
# follows each of them; IGNORE_INDEX is no target. `segment_ids`, int64 (B, block_size): the index within its sequence
# of each token's document, where documents are to be kept apart. `loss_weights`, float32 (B, block_size): for an
# objective whose targets do not all weigh the same.
Batch = dict[str, torch.Tensor]
IGNORE_INDEX = -1  # the target that the loss ignores


class SequenceReader:
    """The sequences of block_size + 1 tokens of one split, indexed from 0 to `count` - 1 across its shards.

    They begin at multiples of block_size, plus an offset: inputs do not overlap, and the last token of a sequence is
    the first of the next. A sequence lies within one shard; a shard of block_size tokens or fewer has none.

    Args:
        offset_margin: tokens that each shard reserves for the offset, if it can reserve them and still has a sequence.
        split_documents: give batches `segment_ids`, derived from the end-of-text tokens.

    Raises:
        DataError: no shard of the split is long enough for a sequence, or `split_documents` without an end-of-text
            token.
    """

    def __init__(self, dataset: Dataset, split: str, block_size: int, offset_margin: int = 0,
                 split_documents: bool = False) -> None:
        all_shards = dataset.shards[split]
        shards = [tokens for tokens in all_shards if len(tokens) > block_size]
        if not shards:
            longest = max(map(len, all_shards)) - 1
            smaller = f"--block_size={longest} or smaller, or " if longest > 0 else ""
            raise DataError(f"block_size={block_size} is too long for the {split} split of dataset {dataset.name!r}, "
                            f"{dataset.tokens(split)} tokens ({smaller}more data)")
        self.dataset, self.split = dataset, split
        self.block_size = block_size
        self.eot = dataset.meta["eot"] if split_documents else None
        if split_documents and self.eot is None:
            raise DataError(f"dataset {dataset.name!r} has no end-of-text token, so its documents have no boundaries "
                            "(--mask_documents=False)")
        # For each shard, row i is the block_size + 1 tokens from token i on, without a copy.
        self.shard_rows = [np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1) for tokens in shards]
        shard_ends = np.cumsum([len(tokens) for tokens in all_shards])
        self.shard_starts = [end - len(tokens) for end, tokens in zip(shard_ends, all_shards, strict=True)
                             if len(tokens) > block_size]  # tokens of the split in front of the shard
        lengths = np.array([len(tokens) for tokens in shards])
        counts = np.maximum(1, (lengths - 1 - offset_margin) // block_size)
        self.n_offsets = lengths - counts * block_size  # offsets 0 … n - 1 keep the shard's last sequence inside it
        self.index_ends = np.cumsum(counts)
        self.index_starts = self.index_ends - counts
        self.count = int(self.index_ends[-1])

    def locate(self, indices: np.ndarray, offset: int | np.ndarray = 0) -> tuple[np.ndarray, np.ndarray]:
        """(shard, first token within the shard) of each sequence, (B,) int64 each; the arguments are `read`'s."""
        shard = np.searchsorted(self.index_ends, indices, side="right")
        return shard, (indices - self.index_starts[shard]) * self.block_size + offset % self.n_offsets[shard]

    def read(self, indices: np.ndarray, offset: int | np.ndarray = 0) -> Batch:
        """Read sequences by index.

        Args:
            indices: (B,) int64.
            offset: one for all sequences, or one for each ((B,) int64), modulo the offsets that the shard allows.

        Returns:
            `tokens`, `targets`, and with split_documents `segment_ids`.
        """
        shard, first = self.locate(indices, offset)
        if len(self.shard_rows) == 1:
            ids = self.shard_rows[0][first]  # (B, block_size + 1)
        else:
            ids = np.empty((len(indices), self.block_size + 1), self.shard_rows[0].dtype)
            for s in np.unique(shard):
                ids[shard == s] = self.shard_rows[s][first[shard == s]]
        check_token_ids(ids, self.dataset.vocab_size, f"{self.dataset.directory}: {self.split}", self.dataset.hint)
        batch = {"tokens": torch.from_numpy(ids[:, :-1].astype(np.int64)),
                 "targets": torch.from_numpy(ids[:, 1:].astype(np.int64))}
        if self.eot is not None:
            batch["segment_ids"] = segments_by_eot(batch["tokens"], self.eot)
        return batch


def segments_by_eot(tokens: torch.Tensor, eot: int) -> torch.Tensor:
    """The index within its row of each token's document; tokens (B, T) -> int64 (B, T). An eot ends its document."""
    ends = tokens == eot
    return ends.cumsum(dim=1) - ends.long()


class GlobalBatches(abc.ABC):
    """The batches of a run. The global batch of a step is the same for any number of processes.

    The sequences of a run have ids 0, 1, 2, … in the order of the steps. A subclass says what a sequence id means.

    Args:
        batch_size: sequences of a micro-batch.
        gradient_accumulation_steps: micro-batches of a step, over all processes.
    """

    def __init__(self, batch_size: int, gradient_accumulation_steps: int = 1) -> None:
        self.batch_size, self.gradient_accumulation_steps = batch_size, gradient_accumulation_steps

    @abc.abstractmethod
    def read(self, sequence_ids: np.ndarray) -> Batch:
        """The sequences with these ids ((B,) int64): a `Batch` with at least `tokens` and `targets`."""

    @abc.abstractmethod
    def n_targets(self, sequence_ids: np.ndarray) -> int:
        """The targets in these sequences, padding left out."""

    @abc.abstractmethod
    def offsets(self, sequence_ids: np.ndarray) -> list[tuple[str, int]]:
        """Where each sequence begins: [(dataset, token of its train split)]."""

    def micro_batch(self, step: int, micro_step: int = 0, rank: int = 0, world_size: int = 1) -> Batch:
        """Micro-batch `micro_step` of data-parallel rank `rank` in a step: batch_size sequences.

        The micro-batches of a step go to the ranks in turn, so that all together they are the same global batch.
        """
        return self.read(self.sequence_ids(step, micro_step, rank, world_size))

    def sequence_ids(self, step: int, micro_step: int = 0, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """The ids of the sequences of `micro_batch`, which takes the same arguments: (batch_size,) int64."""
        assert self.gradient_accumulation_steps % world_size == 0 and 0 <= rank < world_size and step >= 0
        assert 0 <= micro_step < self.gradient_accumulation_steps // world_size
        micro_batch = step * self.gradient_accumulation_steps + micro_step * world_size + rank
        return np.arange(micro_batch * self.batch_size, (micro_batch + 1) * self.batch_size)

    def step_targets(self, step: int) -> int:
        """The targets of a step, over all processes."""
        sequences = self.batch_size * self.gradient_accumulation_steps
        return self.n_targets(np.arange(step * sequences, (step + 1) * sequences))


class TrainBatches(GlobalBatches):
    """The training batches of a run on one dataset, packing='stream'. A sequence is a function of (seed, sequence id).

    Epoch e has the sequence ids e * n_sequences … (e + 1) * n_sequences - 1. A permutation keyed by (seed, e) orders
    the sequences of the split. From the second epoch on they are shifted by an offset, also keyed, so that a token is
    not always predicted from the same context.

    Args:
        split_documents: see `SequenceReader`.

    Raises:
        DataError: no sequence of block_size + 1 tokens fits into the train split.
    """

    def __init__(self, dataset: Dataset, seed: int, block_size: int, batch_size: int,
                 gradient_accumulation_steps: int = 1, split_documents: bool = False) -> None:
        super().__init__(batch_size, gradient_accumulation_steps)
        # The margin keeps the number of sequences the same in each epoch, whatever the offset.
        self.reader = SequenceReader(dataset, "train", block_size, block_size - 1, split_documents)
        self.n_sequences = self.reader.count
        self.seed_key = splitmix64(np.array([seed], np.uint64))

    def read(self, sequence_ids: np.ndarray) -> Batch:
        return self.reader.read(*self._indices(sequence_ids))

    def _indices(self, sequence_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index in the split, offset) of each sequence, (B,) int64 each."""
        epoch, position = np.divmod(sequence_ids, self.n_sequences)
        key = splitmix64(self.seed_key + epoch.astype(np.uint64))
        offset = np.where(epoch == 0, 0, (splitmix64(~key) % self.reader.block_size).astype(np.int64))
        return feistel_permute(position, self.n_sequences, key), offset

    def offsets(self, sequence_ids: np.ndarray) -> list[tuple[str, int]]:
        shard, first = self.reader.locate(*self._indices(sequence_ids))
        return [(self.reader.dataset.name, int(self.reader.shard_starts[s] + token))
                for s, token in zip(shard, first, strict=True)]

    def n_targets(self, sequence_ids: np.ndarray) -> int:
        return len(sequence_ids) * self.reader.block_size


def val_sequences(dataset: Dataset, block_size: int, eval_tokens: int = 0, split_documents: bool = False
                  ) -> tuple[SequenceReader, np.ndarray]:
    """The sequences that an evaluation reads: (`SequenceReader` of the val split, their indices, int64).

    They are evenly spaced over the split and depend on nothing but the arguments. All sequences together are the whole
    split except the fewer than block_size tokens that remain at the end of each shard.

    Args:
        eval_tokens: rounded down to whole sequences, at least one. 0, or more than the split has: all sequences.
        split_documents: see `SequenceReader`.

    Raises:
        DataError: no sequence fits into the val split.
    """
    reader = SequenceReader(dataset, "val", block_size, split_documents=split_documents)
    n = max(1, eval_tokens // block_size) if eval_tokens else reader.count
    n = min(n, reader.count)
    return reader, (2 * np.arange(n) + 1) * reader.count // (2 * n)  # the centre of each of n equal intervals


def val_digest(dataset: Dataset, block_size: int, eval_tokens: int) -> tuple[int, str]:
    """(targets, hex digest) of what `val_sequences` reads, for any number of processes.

    Digested are the digests of the val split's files and where in them the sequences begin, so the data is not read.
    """
    reader, indices = val_sequences(dataset, block_size, eval_tokens)
    files = [file["sha256"] for _, file in sorted(dataset.meta["splits"]["val"]["files"].items())]
    digest = hashlib.sha256(json.dumps([dataset.meta["dtype"], files, block_size]).encode())
    for positions in reader.locate(indices):
        digest.update(positions.astype("<i8").tobytes())
    return len(indices) * block_size, digest.hexdigest()


def val_batches(dataset: Dataset, block_size: int, eval_tokens: int, batch_size: int, rank: int = 0,
                world_size: int = 1, split_documents: bool = False) -> Iterator[Batch]:
    """The batches of `val_sequences` that one process evaluates, all with the same number of sequences.

    Each sequence is read by exactly one process; the numbers of sequences of two processes differ by one at most. All
    processes get the same number of batches, since a sharded model computes on all of them at once. They have
    batch_size sequences, or fewer if no process has as many: of another shape, torch.compile would compile once more.
    What a process lacks is filled with sequences whose targets are all IGNORE_INDEX.
    """
    reader, indices = val_sequences(dataset, block_size, eval_tokens, split_documents)
    most = -(-len(indices) // world_size)  # sequences of the process that has the most
    rows, own = min(batch_size, most), indices[rank::world_size]

    def batch(first: int) -> Batch:
        sequences = own[first:first + rows]
        padded = reader.read(np.concatenate([sequences, np.repeat(indices[:1], rows - len(sequences))]))
        padded["targets"][len(sequences):] = IGNORE_INDEX
        return padded

    return map(batch, range(0, most, rows))


def read_ahead(batches: Iterator[Batch], depth: int = 4) -> Iterator[Batch]:
    """The same batches; a thread reads the next `depth` of them."""
    with concurrent.futures.ThreadPoolExecutor(1, "read_ahead") as executor:
        pending = collections.deque(executor.submit(next, batches, None) for _ in range(depth))
        while (batch := pending.popleft().result()) is not None:
            pending.append(executor.submit(next, batches, None))
            yield batch


class Prefetch:
    """Reads batches ahead in a thread. Only the time of reading changes, not the batches.

    A batch requested out of order is read at once, and prefetching continues from there. An error of `read` is raised
    where its batch is requested.

    Args:
        read: key -> batch; any hashable or comparable key.
        next_key: the key that will be requested after this key.
        depth: batches read ahead.
    """

    def __init__(self, read: Callable[[Any], Any], next_key: Callable[[Any], Any], depth: int = 4) -> None:
        self.read, self.next_key, self.depth = read, next_key, depth
        self.executor = concurrent.futures.ThreadPoolExecutor(1, "prefetch")
        self.pending: collections.deque[tuple[Any, concurrent.futures.Future]] = collections.deque()

    def get(self, key: Any) -> Any:
        if not self.pending or self.pending[0][0] != key:
            while self.pending:
                self.pending.popleft()[1].cancel()
            self._submit(key)
        batch = self.pending.popleft()[1]
        while len(self.pending) < self.depth:
            self._submit(self.next_key(self.pending[-1][0] if self.pending else key))
        return batch.result()

    def _submit(self, key: Any) -> None:
        self.pending.append((key, self.executor.submit(self.read, key)))


def pin_memory(batch: Batch) -> Batch:
    """The batch in page-locked memory, from which a GPU copies asynchronously."""
    return {name: tensor.pin_memory() for name, tensor in batch.items()}


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch on `device`; to a GPU through pinned memory, without waiting for the copy."""
    if torch.device(device).type == "cuda":
        return {name: tensor.to(device, non_blocking=True) for name, tensor in pin_memory(batch).items()}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def splitmix64(x: np.ndarray) -> np.ndarray:
    """uint64 array -> uint64 array: SplitMix64 (Steele et al. 2014), a bijection that looks random.

    Overflow wraps around, by design.
    """
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def feistel_permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of 0 … n - 1 maps each index.

    A Feistel network on an a × b rectangle, a = ⌈√n⌉, b = ⌈n / a⌉ (Black & Rogaway 2002): each round adds to one
    coordinate, modulo its side, a hash of the other, so it can be inverted. A result in one of the fewer than a cells
    beyond n goes through the network again until it is below n ("cycle walking"). Needs no memory.

    Args:
        index: (B,) int64.
        key: (B,) uint64, or one for all, (1,).

    Returns:
        (B,) int64.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x // b, x % b
        for r in range(0, 6, 2):  # `>> 32` keeps the sum from wrapping, which would not be a bijection modulo a
            left = (left + (splitmix64(key + right + (r << 48)) >> 32)) % a
            right = (right + (splitmix64(key + left + (r + 1 << 48)) >> 32)) % b
        return left * b + right

    x = network(index.astype(np.uint64))
    while (outside := x >= n).any():
        x = np.where(outside, network(x), x)
    return x.astype(np.int64)
