"""Token files to batches, each a pure function of (seed, step): nothing to save, nothing to replay on a resume.

A dataset is opened against its meta.json and memory-mapped. Training walks it in windows of block_size + 1
tokens, each of an epoch once, in an order that a keyed permutation computes on the spot. What a token means
is not known here.
"""

import collections
import concurrent.futures
import math

import numpy as np
import torch

from blockgpt.data.dataset import (
    check_token_ids,
)
from blockgpt.errors import DataError


class SequenceReader:
    """The windows of block_size + 1 tokens of one split, numbered from 0 to `count` - 1 through its shards.

    They start at multiples of block_size, plus an offset: inputs do not overlap, and the last token of one window
    is the first of the next. None crosses from shard to shard. Each shard keeps `offset_margin` tokens free for the offset
    (or has one window, and gives the offset the room there is); a shard too short has none.
    """

    def __init__(self, dataset, split, block_size, offset_margin=0):
        shards = [tokens for tokens in dataset.shards[split] if len(tokens) > block_size]
        ends = np.cumsum([len(tokens) for tokens in dataset.shards[split]])
        self.before = [end - len(t) for end, t in zip(ends, dataset.shards[split], strict=True) if len(t) > block_size]
        if not shards:
            longest = max(map(len, dataset.shards[split])) - 1
            smaller = f"--block_size={longest} or smaller, or " if longest > 0 else ""
            raise DataError(f"block_size={block_size} is too long for the {split} split of dataset {dataset.name!r}, "
                            f"{dataset.tokens(split)} tokens ({smaller}more data)")
        self.dataset, self.split = dataset, split
        self.block_size = block_size
        self.views = [np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1) for tokens in shards]
        lengths = np.array([len(tokens) for tokens in shards])
        counts = np.maximum(1, (lengths - 1 - offset_margin) // block_size)
        self.room = lengths - counts * block_size  # offsets that keep a shard's last window inside it: 0 … room - 1
        self.ends = np.cumsum(counts)
        self.firsts = self.ends - counts
        self.count = int(self.ends[-1])

    def locate(self, sequence_ids, offset=0):
        """(shard, first token in it) of each of the windows, (B,) int64 each; the arguments are `read`'s."""
        shard = np.searchsorted(self.ends, sequence_ids, side="right")
        return shard, (sequence_ids - self.firsts[shard]) * self.block_size + offset % self.room[shard]

    def read(self, sequence_ids, offset=0):
        """Inputs and targets of the windows `sequence_ids` ((B,) int64): x, y, int64 tensors (B, block_size).

        offset: one for all, or one for each ((B,) int64), taken modulo the room in the window's shard.
        """
        shard, start = self.locate(sequence_ids, offset)
        if len(self.views) == 1:
            ids = self.views[0][start]  # (B, block_size + 1)
        else:
            ids = np.empty((len(sequence_ids), self.block_size + 1), self.views[0].dtype)
            for s in np.unique(shard):
                ids[shard == s] = self.views[s][start[shard == s]]
        check_token_ids(ids, self.dataset.vocab_size, f"{self.dataset.directory}: {self.split}", self.dataset.remedy)
        return torch.from_numpy(ids[:, :-1].astype(np.int64)), torch.from_numpy(ids[:, 1:].astype(np.int64))


class GlobalBatches:
    """The steps of a run out of its sequences, the same however many processes share them.

    A subclass has `sequences(k)`: the k-th sequences of the run, k (B,) int64, as x, y, int64 tensors (B, block_size);
    `n_targets(k)`: how many targets they hold; and `offsets(k)`: [(dataset, token of its train split)] where each
    begins. batch_size: sequences of a micro-batch;
    gradient_accumulation_steps: micro-batches of a step, over all processes.
    """

    def __init__(self, batch_size, gradient_accumulation_steps=1):
        self.batch_size, self.gradient_accumulation_steps = batch_size, gradient_accumulation_steps

    def micro_batch(self, step, micro_step=0, rank=0, world_size=1):
        """Process `rank`'s `micro_step`-th share of a step: x, y, int64 tensors (batch_size, block_size).

        The processes' shares make up the same global batch, micro-batch for micro-batch, however many they are.
        """
        return self.sequences(self.sequence_ids(step, micro_step, rank, world_size))

    def sequence_ids(self, step, micro_step=0, rank=0, world_size=1):
        """The numbers of the sequences of `micro_batch`, which takes the same arguments: (batch_size,) int64."""
        assert self.gradient_accumulation_steps % world_size == 0 and 0 <= rank < world_size and step >= 0
        assert 0 <= micro_step < self.gradient_accumulation_steps // world_size
        micro = step * self.gradient_accumulation_steps + micro_step * world_size + rank
        return np.arange(micro * self.batch_size, (micro + 1) * self.batch_size)

    def step_targets(self, step):
        """The targets of a step, over all processes."""
        sequences = self.batch_size * self.gradient_accumulation_steps
        return self.n_targets(np.arange(step * sequences, (step + 1) * sequences))


class TrainBatches(GlobalBatches):
    """The training sequences of a run: the k-th is a function of (seed, k) alone.

    Epoch e is k // n_windows. A permutation keyed by (seed, e) orders its windows; from the second epoch on they
    lie at an offset, also keyed, so that a token is not always predicted from the same place.
    `DataError` if no window of block_size + 1 tokens fits.
    """

    def __init__(self, dataset, seed, block_size, batch_size, gradient_accumulation_steps=1):
        super().__init__(batch_size, gradient_accumulation_steps)
        # Every epoch has as many windows as the first: the spare tokens are the room for any later offset.
        self.windows = SequenceReader(dataset, "train", block_size, offset_margin=block_size - 1)
        self.n_sequences = self.windows.count
        self.seed_key = splitmix64(np.array([seed], np.uint64))

    def sequences(self, k):
        return self.windows.read(*self._windows(k))

    def _windows(self, k):
        """(window, offset) of each sequence, (B,) int64 each."""
        epoch, place = np.divmod(k, self.n_sequences)
        key = splitmix64(self.seed_key + epoch.astype(np.uint64))
        offset = np.where(epoch == 0, 0, (splitmix64(~key) % self.windows.block_size).astype(np.int64))
        return feistel_permute(place, self.n_sequences, key), offset

    def offsets(self, k):
        shard, start = self.windows.locate(*self._windows(k))
        name = self.windows.dataset.name
        return [(name, int(self.windows.before[s] + first)) for s, first in zip(shard, start, strict=True)]

    def n_targets(self, k):
        return len(k) * self.windows.block_size


def val_sequences(dataset, block_size, eval_tokens=0):
    """The windows an evaluation reads: (`SequenceReader` of the val split, their numbers as int64 array).

    They lie side by side or evenly apart over the whole split, and depend on nothing else: eval_tokens are rounded
    down to whole windows, at least one; 0, or more than there are, means all. The whole split is all but the
    fewer than block_size tokens left over at the end of a shard. `DataError` if no window fits.
    """
    windows = SequenceReader(dataset, "val", block_size)
    n = max(1, eval_tokens // block_size) if eval_tokens else windows.count
    n = min(n, windows.count)
    return windows, (2 * np.arange(n) + 1) * windows.count // (2 * n)  # the middle of each n-th part


def val_batches(dataset, block_size, eval_tokens, batch_size, rank=0, world_size=1):
    """Iterate over process `rank`'s share of `val_sequences`: x, y, int64 tensors (up to batch_size, block_size).

    Each window is read by exactly one process; shares differ by one window at most. All have as many batches, since a
    model that is parted computes on all processes at once: where a share is a window short of one, it is a window
    without targets (-1).
    """
    windows, sequence_ids = val_sequences(dataset, block_size, eval_tokens)
    mine = sequence_ids[rank::world_size]

    def batch(first):
        if first < len(mine):
            return windows.read(mine[first:first + batch_size])
        x, y = windows.read(sequence_ids[:1])
        return x, torch.full_like(y, -1)

    return map(batch, range(0, -(-len(sequence_ids) // world_size), batch_size))


class Prefetch:
    """Batches read ahead by a thread, in the order in which `successor` says they will be asked for.

    read(key): a batch, by whatever names it. What is asked for out of turn is read then, and the order goes on from
    there, so that reading ahead changes nothing but when. Errors of `read` appear where its batch is asked for.
    """

    def __init__(self, read, successor, depth=4):
        self.read, self.successor, self.depth = read, successor, depth
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "prefetch")
        self.pending = collections.deque()  # (key, future), the next first

    def get(self, key):
        if not self.pending or self.pending[0][0] != key:
            while self.pending:
                self.pending.popleft()[1].cancel()
            self._submit(key)
        batch = self.pending.popleft()[1]
        while len(self.pending) < self.depth:
            self._submit(self.successor(self.pending[-1][0] if self.pending else key))
        return batch.result()

    def _submit(self, key):
        self.pending.append((key, self.thread.submit(self.read, key)))


def pinned(batch):
    """The batch in memory from which a GPU copies by itself."""
    return tuple(t.pin_memory() for t in batch)


def to_device(batch, device):
    """The tensors of a batch on `device`; to a GPU through pinned memory, without waiting for the copy."""
    if torch.device(device).type == "cuda":
        return tuple(t.to(device, non_blocking=True) for t in pinned(batch))
    return tuple(t.to(device) for t in batch)


def splitmix64(x):
    """uint64 array -> uint64 array, a bijection that looks random: SplitMix64 (Steele et al. 2014). Wraps by design."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def feistel_permute(index, n, key):
    """Where a permutation of 0 … n - 1 sends each index. index (B,) int64, key (B,) uint64 -> (B,) int64.

    A Feistel network on the rectangle a × b, a = ⌈√n⌉, b = ⌈n / a⌉ (Black & Rogaway 2002): each round adds to one
    coordinate, modulo its side, a hash of the other, so it can be undone. A result that falls on one of the fewer
    than a cells beyond n walks on until it does not, which happens in no memory and nearly no time.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)

    def network(x):
        left, right = x // b, x % b
        for r in range(0, 6, 2):  # `>> 32` keeps the sum from wrapping, which would not be a bijection modulo a
            left = (left + (splitmix64(key + right + (r << 48)) >> 32)) % a
            right = (right + (splitmix64(key + left + (r + 1 << 48)) >> 32)) % b
        return left * b + right

    x = network(index.astype(np.uint64))
    while (beyond := x >= n).any():
        x = np.where(beyond, network(x), x)
    return x.astype(np.int64)
