"""Whole documents in every sequence: packing='documents'.

A sequence holds one or more documents, end to end. A document is cut only if it is longer than a sequence: into chunks
of that length, and its last chunk is packed like a document. The free tokens at the end of a sequence are padding,
which is never a target. Each batch says which document a token belongs to (`segment_ids`). The packing is computed
once, at startup, by a scan of the split (20 bytes per document).
"""

from collections.abc import Sequence

import numpy as np
import torch

from blockgpt.data.dataset import Dataset
from blockgpt.data.loader import IGNORE_INDEX, Batch, GlobalBatches, feistel_permute, splitmix64
from blockgpt.data.token_files import check_token_ids, madvise
from blockgpt.errors import DataError

SCAN_TOKENS = 2**24  # scanned at a time


class PackedBatches(GlobalBatches):
    """The training batches of a run on one dataset, packing='documents'.

    A sequence is a function of (seed, sequence id). A permutation keyed by (seed, epoch) orders those of each epoch.

    Attributes:
        chunk_starts, chunk_lengths: of each chunk, in tokens of the split, ordered by sequence and then by position.
        chunk_bounds: (n_sequences + 1,) the chunks of sequence i are chunk_bounds[i] … chunk_bounds[i + 1] - 1.
        used: (n_sequences,) tokens of each sequence that are not padding.
        targets: (n_sequences,) targets of each sequence. A token that follows a document without an end-of-text token,
            and so cannot be predicted, is not one of them.

    Raises:
        DataError: the dataset has no end-of-text token, or no document of two tokens.
    """

    def __init__(self, dataset: Dataset, seed: int, block_size: int, batch_size: int,
                 gradient_accumulation_steps: int = 1) -> None:
        super().__init__(batch_size, gradient_accumulation_steps)
        self.dataset, self.block_size, self.eot = dataset, block_size, dataset.meta["eot"]
        if self.eot is None:
            raise DataError(f"packing='documents' needs an end-of-text token after each document, and dataset "
                            f"{dataset.name!r} has none (use --packing=stream)")
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
        order = np.argsort(bins, kind="stable")  # within a sequence, in the order of the corpus
        self.chunk_starts, self.chunk_lengths = starts[order], lengths[order].astype(np.int32)
        self.chunk_bounds = np.searchsorted(bins[order], np.arange(self.n_sequences + 1))
        self.used = np.bincount(bins, lengths, self.n_sequences).astype(np.int32)
        last_of_sequence = np.zeros(len(bins), bool)
        last_of_sequence[self.chunk_bounds[1:] - 1] = True
        no_eot = [end for end, tokens in zip(self.shard_ends, self.shards, strict=True)
                  if len(tokens) and tokens[-1] != self.eot]
        glued = np.isin(self.chunk_starts + self.chunk_lengths, no_eot) & ~last_of_sequence
        self.targets = self.used - 1 - np.bincount(bins[order], glued, self.n_sequences).astype(np.int32)
        self.glued = frozenset(np.flatnonzero(glued).tolist())  # at most one chunk of a file
        self.seed_key = splitmix64(np.array([seed], np.uint64))

    def _indices(self, sequence_ids: np.ndarray) -> np.ndarray:
        """The index of each sequence among those of the split, (B,) int64."""
        epoch, position = np.divmod(sequence_ids, self.n_sequences)
        return feistel_permute(position, self.n_sequences, splitmix64(self.seed_key + epoch.astype(np.uint64)))

    def read(self, sequence_ids: np.ndarray) -> Batch:
        """As `GlobalBatches.read`, with `segment_ids`.

        The padding is eot in the inputs, IGNORE_INDEX in the targets, and a segment of its own.
        """
        indices = self._indices(sequence_ids)
        ids = np.full((len(sequence_ids), self.block_size + 1), self.eot, np.int64)
        segment_ids = np.empty((len(sequence_ids), self.block_size), np.int64)
        is_target = np.arange(self.block_size) < self.used[indices, None] - 1
        for row, index in enumerate(indices):
            end, first_chunk = 0, self.chunk_bounds[index]
            for chunk in range(first_chunk, self.chunk_bounds[index + 1]):
                first, n = self.chunk_starts[chunk], self.chunk_lengths[chunk]
                shard = int(np.searchsorted(self.shard_ends, first, side="right"))
                first -= self.shard_ends[shard] - len(self.shards[shard])
                ids[row, end:end + n] = self.shards[shard][first:first + n]
                segment_ids[row, end:] = chunk - first_chunk
                end += n
                if chunk in self.glued:
                    is_target[row, end - 1] = False
            segment_ids[row, end:] = self.chunk_bounds[index + 1] - first_chunk
        check_token_ids(ids, self.dataset.vocab_size, f"{self.dataset.directory}: train", self.dataset.hint)
        return {"tokens": torch.from_numpy(ids[:, :-1].copy()),
                "targets": torch.from_numpy(np.where(is_target, ids[:, 1:], IGNORE_INDEX)),
                "segment_ids": torch.from_numpy(segment_ids)}

    def offsets(self, sequence_ids: np.ndarray) -> list[tuple[str, int]]:
        return [(self.dataset.name, int(self.chunk_starts[self.chunk_bounds[i]])) for i in self._indices(sequence_ids)]

    def n_targets(self, sequence_ids: np.ndarray) -> int:
        return int(self.targets[self._indices(sequence_ids)].sum())


def document_chunks(shards: Sequence[np.ndarray], eot: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the documents of the shards and cut those longer than block_size + 1 tokens into chunks.

    The chunks of a document overlap by one token, so that each of its tokens but the first is a target once. A chunk
    of fewer than two tokens has no target and is left out.

    Returns:
        First token in the split and length of each chunk, int64 each.
    """
    starts, lengths, shard_start = [], [], 0
    for tokens in shards:
        scans = [np.flatnonzero(tokens[i:i + SCAN_TOKENS] == eot) + i + 1 for i in range(0, len(tokens), SCAN_TOKENS)]
        ends = np.concatenate([*scans, [len(tokens)]])  # the last document of a file may lack its eot
        first = np.concatenate([[0], ends[:-1]])
        n = ends - first
        n_chunks = np.maximum(1, -(-(n - 1) // block_size))  # of each document
        # The index of each chunk within its document.
        chunk = np.arange(n_chunks.sum()) - np.repeat(np.cumsum(n_chunks) - n_chunks, n_chunks)
        starts.append(shard_start + np.repeat(first, n_chunks) + chunk * block_size)
        lengths.append(np.minimum(np.repeat(n, n_chunks) - chunk * block_size, block_size + 1))
        shard_start += len(tokens)
    all_starts, all_lengths = np.concatenate(starts), np.concatenate(lengths)
    has_target = all_lengths >= 2
    return all_starts[has_target], all_lengths[has_target]


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Pack chunks into bins by best-fit decreasing (Ding et al. 2024).

    The longest chunk comes first; each goes to the bin with the least free space that holds it. All chunks of one
    length are packed at once, so the time depends on the number of distinct lengths, not on the number of chunks.

    Args:
        lengths: of the chunks, each at least 2 and at most capacity.
        capacity: tokens of a bin.

    Returns:
        The bin of each chunk, and the number of bins.
    """
    order = np.argsort(-lengths, kind="stable")
    bins = np.empty(len(lengths), np.int64)
    bins_by_free: dict[int, list[np.ndarray]] = {}  # free tokens -> arrays of bins with so many
    free_mask = 0  # bit n is set if a bin has n free tokens
    n_bins = packed = 0
    distinct, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            larger = free_mask >> length
            if larger:
                free = length + (larger & -larger).bit_length() - 1  # the lowest bit: the tightest fit
                candidates = bins_by_free[free].pop()
                if not bins_by_free[free]:
                    free_mask &= ~(1 << free)
            else:
                free = capacity
                candidates = np.arange(n_bins, n_bins - (-count // (capacity // length)))
                n_bins += len(candidates)
            per_bin = free // length  # the best fit for the next chunk of this length is the same bin, until it is full
            n_used = min(len(candidates), -(-count // per_bin))
            n = min(count, n_used * per_bin)
            bins[order[packed:packed + n]] = np.repeat(candidates[:n_used], per_bin)[:n]
            in_last = n - (n_used - 1) * per_bin  # chunks in the last bin used
            remaining = [(free, candidates[n_used:]), (free - per_bin * length, candidates[:n_used - 1]),
                         (free - in_last * length, candidates[n_used - 1:n_used])]
            for new_free, open_bins in remaining:
                if new_free >= 2 and len(open_bins):
                    bins_by_free.setdefault(new_free, []).append(open_bins)
                    free_mask |= 1 << new_free
            packed, count = packed + n, count - n
    return bins, n_bins
