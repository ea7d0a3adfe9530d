"""Whole documents in every window: packing='documents'.

A window holds documents, end to end, and none is cut unless it is longer than the window: a cut one goes on in
windows of its own, and its end is packed as a document is. What stays free at the end of a window is padding, which
is never a target. The plan is made once, at start, which reads the split, and holds 20 bytes a document.
"""

import numpy as np
import torch

from blockgpt.data.dataset import check_token_ids, madvise
from blockgpt.data.loader import GlobalBatches, feistel_permute, splitmix64
from blockgpt.errors import DataError

IGNORED = -1  # the target that the loss leaves out
SCANNED = 2**24  # tokens looked at at a time


class PackedBatches(GlobalBatches):
    """The training sequences of a run, each whole documents. The k-th is a function of (seed, k) alone.

    A keyed permutation orders the windows of each epoch. `DataError` if the documents of the dataset cannot be told
    apart, or if none has two tokens.
    """

    def __init__(self, dataset, seed, block_size, batch_size, gradient_accumulation_steps=1):
        super().__init__(batch_size, gradient_accumulation_steps)
        self.dataset, self.block_size, self.eot = dataset, block_size, dataset.meta["eot"]
        if self.eot is None:
            raise DataError(f"packing='documents' needs a token behind each document, and dataset {dataset.name!r} has "
                            "none (packing='stream')")
        self.shards = dataset.shards["train"]
        self.shard_ends = np.cumsum([len(tokens) for tokens in self.shards])
        for tokens in self.shards:
            madvise(tokens, "MADV_SEQUENTIAL")
        starts, lengths = document_chunks(self.shards, self.eot, block_size)
        for tokens in self.shards:
            madvise(tokens, "MADV_RANDOM")
        if not len(lengths):
            raise DataError(f"the train split of dataset {dataset.name!r} has no document of two tokens")
        bins, self.n_sequences = best_fit(lengths, block_size + 1)
        order = np.argsort(bins, kind="stable")  # within a window, in the order of the corpus
        self.starts, self.lengths = starts[order], lengths[order].astype(np.int32)
        self.bounds = np.searchsorted(bins[order], np.arange(self.n_sequences + 1))
        self.used = np.bincount(bins, lengths, self.n_sequences).astype(np.int32)  # tokens of each window
        self.seed_key = splitmix64(np.array([seed], np.uint64))

    def windows_of(self, k):
        epoch, place = np.divmod(k, self.n_sequences)
        return feistel_permute(place, self.n_sequences, splitmix64(self.seed_key + epoch.astype(np.uint64)))

    def sequences(self, k):
        """The k-th sequences of the run, k (B,) int64: x, y, int64 tensors (B, block_size); padding is eot, IGNORED."""
        windows = self.windows_of(k)
        ids = np.full((len(k), self.block_size + 1), self.eot, np.int64)
        for row, window in zip(ids, windows, strict=True):
            at = 0
            for piece in range(self.bounds[window], self.bounds[window + 1]):
                start, n = self.starts[piece], self.lengths[piece]
                shard = int(np.searchsorted(self.shard_ends, start, side="right"))
                start -= self.shard_ends[shard] - len(self.shards[shard])
                row[at:at + n] = self.shards[shard][start:start + n]
                at += n
        check_token_ids(ids, self.dataset.vocab_size, f"{self.dataset.directory}: train", self.dataset.remedy)
        targets = ids[:, 1:].copy()
        targets[np.arange(self.block_size) >= self.used[windows, None] - 1] = IGNORED
        return torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets)

    def offsets(self, k):
        """[(dataset, token of its train split)] where the first document of each sequence begins."""
        return [(self.dataset.name, int(self.starts[self.bounds[window]])) for window in self.windows_of(k)]

    def n_targets(self, k):
        return int(self.used[self.windows_of(k)].sum() - len(k))


def document_chunks(shards, eot, block_size):
    """The documents of the shards as (starts, lengths), int64: whole, or cut where longer than block_size + 1 tokens.

    The pieces of a cut document overlap by one token, so that each of its tokens but the first is a target once.
    What has fewer than two tokens, and so no target, is left out.
    """
    starts, lengths, base = [], [], 0
    for tokens in shards:
        ends = [np.flatnonzero(tokens[i:i + SCANNED] == eot) + i + 1 for i in range(0, len(tokens), SCANNED)]
        ends = np.concatenate([*ends, [len(tokens)]])  # the last document of a file need not end in eot
        first = np.concatenate([[0], ends[:-1]])
        n = ends - first
        cuts = np.maximum(1, -(-(n - 1) // block_size))  # pieces of each document
        number = np.arange(cuts.sum()) - np.repeat(np.cumsum(cuts) - cuts, cuts)  # of each piece within it
        starts.append(base + np.repeat(first, cuts) + number * block_size)
        lengths.append(np.minimum(np.repeat(n, cuts) - number * block_size, block_size + 1))
        base += len(tokens)
    starts, lengths = np.concatenate(starts), np.concatenate(lengths)
    kept = lengths >= 2
    return starts[kept], lengths[kept]


def best_fit(lengths, capacity):
    """Pack pieces into windows of `capacity`, the longest first, each where the least room stays: (bin of each piece,
    number of bins). Best-fit decreasing (Ding et al. 2024), for all pieces of a length at once: the cost is that of
    the different lengths, not of the pieces.
    """
    order = np.argsort(-lengths, kind="stable")
    bins = np.empty(len(lengths), np.int64)
    rooms = {}  # free tokens -> [arrays of bins]
    occupied = 0  # bit r: some bin has r tokens free
    n_bins = at = 0
    distinct, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            larger = occupied >> length
            if larger:
                room = length + (larger & -larger).bit_length() - 1
                free = rooms[room].pop()
                if not rooms[room]:
                    occupied &= ~(1 << room)
            else:
                room = capacity
                free = np.arange(n_bins, n_bins - (-count // (capacity // length)))
                n_bins += len(free)
            each = room // length  # the best fit for the next of the same length is the same bin, until it is full
            used = min(len(free), -(-count // each))
            placed = min(count, used * each)
            bins[order[at:at + placed]] = np.repeat(free[:used], each)[:placed]
            last = placed - (used - 1) * each  # pieces in the last bin
            left = [(room, free[used:]), (room - each * length, free[:used - 1]),
                    (room - last * length, free[used - 1:used])]
            for rest, those in left:
                if rest >= 2 and len(those):
                    rooms.setdefault(rest, []).append(those)
                    occupied |= 1 << rest
            at, count = at + placed, count - placed
    return bins, n_bins
