"""Batches are a function of (seed, step): each sequence once per epoch, the same on any number of processes."""

import itertools
import os
import re
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_helpers import concatenate, counting_dataset, equal, pair, refusal, set_meta, write_shards
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blockgpt.data import loader
from blockgpt.data.dataset import open_dataset
from blockgpt.data.loader import (
    Prefetch,
    SequenceReader,
    TrainBatches,
    feistel_permute,
    read_ahead,
    splitmix64,
    to_device,
    val_batches,
    val_sequences,
)
from blockgpt.errors import DataError

SEEDS = st.integers(0, 2**63 - 1)
SHARD_LENGTHS = st.lists(st.integers(0, 90), min_size=1, max_size=5)
BLOCK_SIZES = st.integers(1, 20)


def key(seed, n=1):
    return splitmix64(np.full(n, seed, np.uint64))


# The order of training


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_the_permutation_is_a_bijection(seed):
    for n in [*range(1, 300), *range(300, 3000, 37)]:
        assert np.array_equal(np.sort(feistel_permute(np.arange(n), n, key(seed, n))), np.arange(n))


@given(st.integers(2**33, 2**62), SEEDS)
def test_the_permutation_of_a_huge_range_is_injective_and_in_range(n, seed):
    index = np.concatenate([np.arange(500), np.arange(n - 500, n)])
    out = feistel_permute(index, n, key(seed, 1000))
    assert out.min() >= 0 and out.max() < n and len(set(out.tolist())) == 1000


def test_the_permutation_shuffles():
    n = 10_000
    out = feistel_permute(np.arange(n), n, key(1, n))
    assert abs(np.corrcoef(out, np.arange(n))[0, 1]) < 0.05 and abs(np.corrcoef(out[1:], out[:-1])[0, 1]) < 0.05
    keys = splitmix64(np.arange(n, dtype=np.uint64))
    first = np.bincount(feistel_permute(np.zeros(n, np.int64), 10, keys), minlength=10)
    assert first.min() > 850 and first.max() < 1150  # 1000 expected, standard deviation 30


def test_the_order_is_the_same_in_every_release():
    """Otherwise a run resumed with newer code would read some sequences twice and some never."""
    b = TrainBatches(counting_dataset([1000]), seed=1337, block_size=10, batch_size=8)
    assert b.read(np.arange(8))["tokens"][:, 0].tolist() == [310, 110, 810, 670, 590, 910, 400, 710]
    assert b.read(np.arange(99, 107))["tokens"][:, 0].tolist() == [844, 674, 114, 44, 24, 524, 374, 154]  # epoch 1


@given(SHARD_LENGTHS, BLOCK_SIZES, SEEDS, st.integers(0, 2**40))
def test_each_epoch_reads_every_sequence_once(lengths, block_size, seed, epoch):
    assume(max(lengths) > block_size)
    b = TrainBatches(counting_dataset(lengths), seed, block_size, batch_size=4)
    usable = [n for n in lengths if n > block_size]
    assert b.n_sequences == sum(max(1, (n - block_size) // block_size) for n in usable)
    x, y = pair(b.read(epoch * b.n_sequences + np.arange(b.n_sequences)))
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (b.n_sequences, block_size)
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(block_size))  # consecutive tokens

    firsts, offsets = sorted(x[:, 0].tolist()), set()
    for n, end in zip(lengths, np.cumsum(lengths), strict=True):
        in_shard = [f - (end - n) for f in firsts if end - n <= f < end]
        if n <= block_size:
            assert in_shard == []
            continue
        assert len(in_shard) == max(1, (n - block_size) // block_size)
        assert np.all(np.diff(in_shard) == block_size)  # adjacent; inputs do not overlap
        assert in_shard[0] >= 0 and in_shard[-1] + block_size < n  # none crosses the end of its shard
        if n >= 2 * block_size:
            offsets.add(in_shard[0])
    assert len(offsets) <= 1 and all(o < block_size for o in offsets)
    if epoch == 0:
        assert offsets <= {0}


def test_later_epochs_have_another_offset_and_another_order():
    b = TrainBatches(counting_dataset([1000]), seed=3, block_size=16, batch_size=1)
    epochs = [b.read(e * b.n_sequences + np.arange(b.n_sequences))["tokens"][:, 0] for e in range(40)]
    offsets = [int(e.min()) for e in epochs]
    assert offsets[0] == 0 and len(set(offsets)) > 10
    orders = {tuple(((e - o) // 16).tolist()) for e, o in zip(epochs, offsets, strict=True)}
    assert len(orders) == 40


@given(SEEDS, SEEDS, st.integers(0, 10**12))
def test_a_sequence_depends_on_the_seed_and_its_id_alone(seed, other_seed, first_id):
    lengths, n = [5000, 300], 16
    ids = first_id + np.arange(n)
    batch = TrainBatches(counting_dataset(lengths), seed, 8, 4).read(ids)
    again = TrainBatches(counting_dataset(lengths), seed, 8, 1, 16)
    for i in range(n - 1, -1, -1):  # one at a time, from another object, in another order
        assert torch.equal(again.read(ids[i:i + 1])["tokens"][0], batch["tokens"][i])
    if seed != other_seed:
        assert not equal(TrainBatches(counting_dataset(lengths), other_seed, 8, 4).read(ids), batch)


@given(SEEDS, st.integers(0, 10**6))
def test_the_offset_of_a_sequence_is_its_first_token(seed, first_id):
    b = TrainBatches(counting_dataset([700, 5, 90]), seed, 6, 4)
    ids = first_id + np.arange(8)
    assert b.offsets(ids) == [("x", token) for token in b.read(ids)["tokens"][:, 0].tolist()]


@given(st.data(), st.sampled_from([1, 2, 3, 8]), st.integers(1, 4), st.integers(1, 3),
       st.sampled_from([0, 1, 77, 10**9]))
def test_any_number_of_processes_reads_the_same_global_batch(data, world_size, batch_size, per_rank, step):
    accumulation = world_size * per_rank
    sequences = batch_size * accumulation
    d = counting_dataset([700, 20, 90])
    whole = TrainBatches(d, 5, 6, sequences).micro_batch(step)
    sharded = TrainBatches(d, 5, 6, batch_size, accumulation)
    micro_batches = [sharded.micro_batch(step, m, rank, world_size)
                     for m in range(per_rank) for rank in range(world_size)]
    assert equal(concatenate(micro_batches), whole)
    divisor = data.draw(st.sampled_from([i for i in range(1, sequences + 1) if sequences % i == 0]))
    other = TrainBatches(d, 5, 6, divisor, sequences // divisor)
    micro_batches = [other.micro_batch(step, m) for m in range(sequences // divisor)]
    assert equal(concatenate(micro_batches), whole)
    assert sharded.step_targets(step) == sequences * 6


def test_consecutive_steps_read_consecutive_sequences():
    b = TrainBatches(counting_dataset([500]), 0, 10, batch_size=3, gradient_accumulation_steps=2)
    x = torch.cat([b.micro_batch(s, m)["tokens"] for s in range(8) for m in range(2)])
    assert torch.equal(x, b.read(np.arange(48))["tokens"]) and len(set(x[:, 0].tolist())) == 48 < b.n_sequences + 1


def test_two_terabytes_are_opened_and_read_in_a_few_megabytes(tmp_path):
    """A sparse file: what it costs to open it and to read any step of it does not depend on its size."""
    size = 2 * 10**12
    write_shards(tmp_path / "x", {"train.bin": range(40), "val.bin": range(40)})
    try:
        os.truncate(tmp_path / "x/train.bin", size)
    except OSError as error:
        pytest.skip(f"this file system has no sparse files of two terabytes: {error.strerror}")
    set_meta(tmp_path / "x", "splits", "train", "files", "train.bin", "size", value=size)
    set_meta(tmp_path / "x", "splits", "train", "tokens", value=size // 2)
    tracemalloc.start()
    b = TrainBatches(open_dataset("x", tmp_path), 7, 1024, 8)
    for step in (0, 1, 10**9):
        assert b.micro_batch(step)["tokens"].shape == (8, 1024)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert b.n_sequences == (size // 2 - 1024) // 1024 and peak < 2 * 2**20
    if sys.platform == "linux":  # the kernel does not read ahead
        maps = Path("/proc/self/smaps").read_text()
        flags = re.search(rf"{tmp_path}/x/train\.bin\n.*?VmFlags: (.*?)\n", maps, re.DOTALL)[1]
        assert "rr" in flags.split()


def test_a_split_too_short_for_the_block_names_a_size_that_fits():
    message = refusal(TrainBatches, counting_dataset([20, 40, 3]), 0, 40, 1)
    assert "block_size=40" in message and "63 tokens" in message and "--block_size=39" in message
    assert "val" in refusal(val_sequences, counting_dataset([99], [10]), 10)
    assert "val" in refusal(val_batches, counting_dataset([99], [10]), 10, 0, 1)  # at once, not at the first batch
    assert "--block_size" not in refusal(val_sequences, counting_dataset([99], [1]), 10)
    one_sequence = TrainBatches(counting_dataset([41]), 0, 40, 1)
    assert one_sequence.micro_batch(7)["targets"][0, -1] == 40


@settings(max_examples=20)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=50))
def test_wide_token_ids_survive_the_file(tmp_path_factory, ids):
    root = tmp_path_factory.mktemp("wide")
    write_shards(root / "x", {"train.bin": ids, "val.bin": ids}, "uint32", vocab_size=2**32)
    x, y = pair(next(val_batches(open_dataset("x", root), len(ids) - 1, 0, 1)))
    assert x[0].tolist() == ids[:-1] and y[0].tolist() == ids[1:]


# Documents


@pytest.mark.parametrize("split", ["train", "val"])
def test_segment_ids_are_derived_from_end_of_text_tokens_on_request(split):
    """An end-of-text token belongs to the document that it ends; a document may be nothing but its end."""
    d, eot = counting_dataset([1], [1]), 9
    d.meta["eot"] = eot
    d.shards[split] = [np.array([1, 2, eot, eot, 5, 6, 7, 8, eot], "<u4")]
    for requested in (True, False):
        if split == "train":
            batch = TrainBatches(d, 0, 8, 1, split_documents=requested).micro_batch(0)
        else:
            batch = next(val_batches(d, 8, 0, 1, split_documents=requested))
        assert batch["tokens"].tolist() == [[1, 2, eot, eot, 5, 6, 7, 8]]
        assert ("segment_ids" in batch) is requested
        if requested:
            assert batch["segment_ids"].tolist() == [[0, 0, 0, 1, 2, 2, 2, 2]]
    d.meta["eot"] = None
    assert "no end-of-text token" in refusal(SequenceReader, d, split, 8, split_documents=True)


# Prefetching


def test_prefetching_gives_what_is_requested_in_any_order():
    reads = []

    def read(key):
        reads.append(key)
        return key * 10

    prefetch = Prefetch(read, lambda key: key + 1, depth=3)
    assert [prefetch.get(k) for k in (5, 6, 7)] == [50, 60, 70]
    assert prefetch.get(100) == 1000 and prefetch.get(101) == 1010  # out of order
    assert prefetch.get(6) == 60
    assert len(prefetch.pending) == 3
    assert reads[:3] == [5, 6, 7] and {100, 101} <= set(reads)


def test_an_error_is_raised_where_its_batch_is_requested():
    def read(key):
        if key == 3:
            raise DataError("damaged")
        return key

    prefetch = Prefetch(read, lambda key: key + 1)
    assert [prefetch.get(k) for k in range(3)] == [0, 1, 2]
    assert "damaged" in refusal(prefetch.get, 3)
    assert prefetch.get(4) == 4


def test_to_device_does_not_change_the_batch():
    batch = TrainBatches(counting_dataset([99]), 0, 8, 2).micro_batch(0)
    assert equal(to_device(batch, "cpu"), batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_are_copied_to_a_gpu_from_pinned_memory():
    batch = loader.pin_memory(TrainBatches(counting_dataset([99]), 0, 8, 2).micro_batch(0))
    assert all(t.is_pinned() for t in batch.values())
    assert equal(to_device(to_device(batch, "cuda"), "cpu"), batch)


# Validation


@given(SHARD_LENGTHS, BLOCK_SIZES, st.integers(0, 500), st.integers(1, 7), st.sampled_from([1, 2, 3, 8]))
def test_val_sequences_are_fixed_disjoint_and_evenly_spaced(lengths, block_size, eval_tokens, batch_size, world_size):
    assume(max(lengths) > block_size)
    d = counting_dataset([99], lengths)
    total = sum(max(0, n - 1) // block_size for n in lengths)
    expected = min(total, max(1, eval_tokens // block_size)) if eval_tokens else total
    reader, indices = val_sequences(d, block_size, eval_tokens)
    assert reader.count == total and len(indices) == expected
    assert indices[0] >= 0 and indices[-1] < total and np.all(np.diff(indices) >= 1)
    gaps = np.diff([-1 - indices[0], *indices, 2 * total - 1 - indices[-1]])  # mirrored at both ends
    assert gaps.max() - gaps.min() <= 2

    x, y = pair(concatenate(val_batches(d, block_size, eval_tokens, 1)))
    assert x.dtype == torch.int64 and x.shape == (expected, block_size) and torch.equal(y, x + 1)
    ranks = [list(map(pair, val_batches(d, block_size, eval_tokens, batch_size, r, world_size)))
             for r in range(world_size)]
    most = -(-expected // world_size)
    assert {b[0].shape for rank in ranks for b in rank} == {(min(batch_size, most), block_size)}
    assert len({len(rank) for rank in ranks}) == 1  # a sharded model computes on all processes at once
    assert all(((y == -1).all(1) | (y >= 0).all(1)).all() for rank in ranks for _, y in rank)
    assert all((y[:, 0] >= 0).any() for _, y in ranks[0])  # no batch is padding on all processes
    ranks = [[(x[y[:, 0] >= 0], y[y[:, 0] >= 0]) for x, y in rank] for rank in ranks]  # without padding
    counts = [sum(len(b[0]) for b in rank) for rank in ranks]
    assert max(counts) - min(counts) <= 1
    on_all_ranks = torch.cat([b[0] for rank in ranks for b in rank])
    assert sorted(on_all_ranks.tolist()) == x.tolist()  # each sequence on one process


def test_batches_read_ahead_are_the_same_and_an_error_is_raised_in_its_place():
    def broken():
        yield from range(1, 8)
        raise OSError("the disk")

    assert list(read_ahead(iter(range(1, 20)))) == list(range(1, 20)) and list(read_ahead(iter(()))) == []
    batches = read_ahead(broken())
    assert list(itertools.islice(batches, 7)) == list(range(1, 8))
    with pytest.raises(OSError, match="the disk"):
        next(batches)


def test_the_whole_val_split_is_read_once():
    d = counting_dataset([99], [101, 5, 57])
    y = concatenate(val_batches(d, 10, 0, 4))["targets"]
    targets = sorted(y[y >= 0].tolist())
    assert targets == [*range(1, 101), *range(107, 157)]  # without each shard's first token and its remainder
    (more_than_all,), (all_sequences,) = val_batches(d, 10, 10**9, 100), val_batches(d, 10, 0, 100)
    assert equal(more_than_all, all_sequences)
