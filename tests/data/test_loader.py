"""What batches promise: a function of (seed, k), each window once an epoch, the same on any number of processes."""

import collections
import hashlib
import json
import os
import re
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blockgpt.data import dataset as dataset_module
from blockgpt.data import loader
from blockgpt.data.dataset import Dataset, open_dataset
from blockgpt.data.loader import (
    Prefetch,
    TrainBatches,
    feistel_permute,
    splitmix64,
    to_device,
    val_batches,
    val_sequences,
)
from blockgpt.data.tokenizer import from_meta
from blockgpt.errors import DataError

SEEDS = st.integers(0, 2**63 - 1)
SHARDS = st.lists(st.integers(0, 90), min_size=1, max_size=5)
BLOCKS = st.integers(1, 20)


def dataset(train, val=(50,)):
    """A dataset in memory whose tokens number themselves through the shards, so that a token tells its place."""
    shards = {}
    for split, lengths in (("train", train), ("val", val)):
        ends = np.cumsum(lengths)
        shards[split] = [np.arange(e - n, e, dtype="<u4") for n, e in zip(lengths, ends, strict=True)]
    meta = {"vocab_size": 10**6, "dtype": "uint32",
            "splits": {s: {"tokens": sum(map(len, shards[s])), "bytes": 1} for s in shards}}
    return Dataset("x", Path("data/x"), meta, shards)


def key(seed, n=1):
    return splitmix64(np.full(n, seed, np.uint64))


def refusal(action, *args, **kwargs):
    """The message of the `DataError` that the action raises; it has one line."""
    with pytest.raises(DataError) as raised:
        action(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def same(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


# The order of training


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_the_permutation_is_a_bijection(seed):
    for n in range(1, 2001):
        assert np.array_equal(np.sort(feistel_permute(np.arange(n), n, key(seed, n))), np.arange(n))


@given(st.integers(2**33, 2**62), SEEDS)
def test_the_permutation_of_a_huge_range_stays_inside_and_apart(n, seed):
    index = np.concatenate([np.arange(500), np.arange(n - 500, n)])
    out = feistel_permute(index, n, key(seed, 1000))
    assert out.min() >= 0 and out.max() < n and len(set(out.tolist())) == 1000


def test_the_permutation_shuffles():
    n = 10_000
    out = feistel_permute(np.arange(n), n, key(1, n))
    assert abs(np.corrcoef(out, np.arange(n))[0, 1]) < 0.05 and abs(np.corrcoef(out[1:], out[:-1])[0, 1]) < 0.05
    first = np.bincount(feistel_permute(np.zeros(n, np.int64), 10, splitmix64(np.arange(n, dtype=np.uint64))), minlength=10)
    assert first.min() > 850 and first.max() < 1150  # 1000 expected, standard deviation 30


def test_the_order_is_the_same_in_every_release():
    """Else a run resumed with newer code would read some windows twice and some never."""
    b = TrainBatches(dataset([1000]), seed=1337, block_size=10, batch_size=8)
    assert b.sequences(np.arange(8))[0][:, 0].tolist() == [310, 110, 810, 670, 590, 910, 400, 710]
    assert b.sequences(np.arange(99, 107))[0][:, 0].tolist() == [844, 674, 114, 44, 24, 524, 374, 154]  # epoch 1


@given(SHARDS, BLOCKS, SEEDS, st.integers(0, 2**40))
def test_each_epoch_reads_every_window_once(lengths, block_size, seed, epoch):
    assume(max(lengths) > block_size)
    b = TrainBatches(dataset(lengths), seed, block_size, batch_size=4)
    usable = [n for n in lengths if n > block_size]
    assert b.n_sequences == sum(max(1, (n - block_size) // block_size) for n in usable)
    x, y = b.sequences(epoch * b.n_sequences + np.arange(b.n_sequences))
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (b.n_sequences, block_size)
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(block_size))  # tokens count up by one

    starts, inside = sorted(x[:, 0].tolist()), collections.Counter()
    offsets = set()
    for n, end in zip(lengths, np.cumsum(lengths), strict=True):
        mine = [s - (end - n) for s in starts if end - n <= s < end]
        inside[n] += len(mine)
        if n <= block_size:
            assert mine == []
            continue
        assert len(mine) == max(1, (n - block_size) // block_size)
        assert np.all(np.diff(mine) == block_size)  # side by side, inputs not overlapping
        assert mine[0] >= 0 and mine[-1] + block_size < n  # none leaves its shard
        if n >= 2 * block_size:
            offsets.add(mine[0])
    assert len(offsets) <= 1 and all(o < block_size for o in offsets)
    if epoch == 0:
        assert offsets <= {0}


def test_later_epochs_fall_elsewhere_in_another_order():
    b = TrainBatches(dataset([1000]), seed=3, block_size=16, batch_size=1)
    epochs = [b.sequences(e * b.n_sequences + np.arange(b.n_sequences))[0][:, 0] for e in range(40)]
    offsets = [int(e.min()) for e in epochs]
    assert offsets[0] == 0 and len(set(offsets)) > 10
    orders = {tuple(((e - o) // 16).tolist()) for e, o in zip(epochs, offsets, strict=True)}
    assert len(orders) == 40


@given(SEEDS, SEEDS, st.integers(0, 10**12))
def test_a_sequence_depends_on_seed_and_k_alone(seed, other, k):
    lengths, n = [5000, 300], 32
    ks = k + np.arange(n)
    read = TrainBatches(dataset(lengths), seed, 8, 4).sequences(ks)
    again = TrainBatches(dataset(lengths), seed, 8, 1, 16)
    for i in range(n):  # alone, from another object, in another order
        assert torch.equal(again.sequences(ks[n - 1 - i:n - i])[0][0], read[0][n - 1 - i])
    if seed != other:
        assert not same(TrainBatches(dataset(lengths), other, 8, 4).sequences(ks), read)


@given(st.data(), st.sampled_from([1, 2, 3, 8]), st.integers(1, 4), st.integers(1, 3),
       st.sampled_from([0, 1, 77, 10**9]))
def test_any_number_of_processes_reads_the_same_global_batch(data, world_size, batch_size, per_rank, step):
    accumulation = world_size * per_rank
    sequences = batch_size * accumulation
    d = dataset([700, 20, 90])
    whole = TrainBatches(d, 5, 6, sequences).micro_batch(step)
    shared = TrainBatches(d, 5, 6, batch_size, accumulation)
    parts = {m * world_size + rank: shared.micro_batch(step, m, rank, world_size)
             for m in range(per_rank) for rank in range(world_size)}
    assert same([torch.cat([parts[i][j] for i in range(accumulation)]) for j in (0, 1)], whole)
    divisor = data.draw(st.sampled_from([i for i in range(1, sequences + 1) if sequences % i == 0]))
    other = TrainBatches(d, 5, 6, divisor, sequences // divisor)
    parts = [other.micro_batch(step, m) for m in range(sequences // divisor)]
    assert same([torch.cat([p[j] for p in parts]) for j in (0, 1)], whole)


def test_steps_follow_each_other_without_gap():
    b = TrainBatches(dataset([500]), 0, 10, batch_size=3, gradient_accumulation_steps=2)
    x = torch.cat([b.micro_batch(s, m)[0] for s in range(8) for m in range(2)])
    assert torch.equal(x, b.sequences(np.arange(48))[0]) and len(set(x[:, 0].tolist())) == 48 < b.n_sequences + 1


def test_a_late_step_of_a_large_dataset_takes_no_memory():
    tokens = np.broadcast_to(np.zeros(1, "<u2"), 10**12)  # one element, seen as a million million
    d = dataset([100])
    d.shards["train"] = [tokens]
    tracemalloc.start()
    x, _ = TrainBatches(d, 1, 64, 12).micro_batch(10**9)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert x.shape == (12, 64) and peak < 2**20


def test_two_terabytes_open_and_serve_in_a_few_megabytes(tmp_path):
    """A sparse file: what it costs to open it and to read any step of it does not depend on its size."""
    size = 2 * 10**12
    write_dataset(tmp_path / "x", {"train.bin": range(40), "val.bin": range(40)})
    try:
        os.truncate(tmp_path / "x/train.bin", size)
    except OSError as error:
        pytest.skip(f"this file system holds no sparse file of two terabytes: {error.strerror}")
    in_meta("splits", "train", "files", "train.bin", "size", value=size)(tmp_path / "x")
    in_meta("splits", "train", "tokens", value=size // 2)(tmp_path / "x")
    tracemalloc.start()
    b = TrainBatches(open_dataset("x", tmp_path), 7, 1024, 8)
    for step in (0, 1, 10**9):
        x, _ = b.micro_batch(step)
        assert x.shape == (8, 1024)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert b.n_sequences == (size // 2 - 1024) // 1024 and peak < 2 * 2**20
    if sys.platform == "linux":  # the system was told that reading ahead is in vain
        maps = Path("/proc/self/smaps").read_text()
        flags = re.search(rf"{tmp_path}/x/train\.bin\n.*?VmFlags: (.*?)\n", maps, re.DOTALL)[1]
        assert "rr" in flags.split()


# Reading ahead


def test_reading_ahead_changes_nothing():
    reads = []

    def read(key):
        reads.append(key)
        return key * 10

    ahead = Prefetch(read, lambda key: key + 1, depth=3)
    assert [ahead.get(k) for k in (5, 6, 7)] == [50, 60, 70]
    assert ahead.get(100) == 1000 and ahead.get(101) == 1010  # out of turn
    assert ahead.get(6) == 60
    assert all(len(ahead.pending) == 3 for _ in range(2))
    assert reads[:3] == [5, 6, 7] and {100, 101} <= set(reads)


def test_reading_ahead_gives_the_batches_of_a_run():
    b = TrainBatches(dataset([5000]), 3, 16, 4, 2)
    order = [(s, m) for s in range(20) for m in range(2)]
    ahead = Prefetch(lambda key: b.micro_batch(*key), lambda key: (key[0] + key[1], 1 - key[1]))
    for key in order:
        assert same(ahead.get(key), b.micro_batch(*key))


def test_an_error_appears_where_its_batch_is_asked_for():
    def read(key):
        if key == 3:
            raise DataError("damaged")
        return key

    ahead = Prefetch(read, lambda key: key + 1)
    assert [ahead.get(k) for k in range(3)] == [0, 1, 2]
    assert "damaged" in refusal(ahead.get, 3)
    assert ahead.get(4) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_travel_to_a_gpu_from_pinned_memory():
    batch = loader.pinned(TrainBatches(dataset([99]), 0, 8, 2).micro_batch(0))
    assert all(t.is_pinned() for t in batch)
    assert same([t.cpu() for t in to_device(batch, "cuda")], batch)


# Validation


@given(SHARDS, BLOCKS, st.integers(0, 500), st.integers(1, 7), st.sampled_from([1, 2, 3, 8]))
def test_val_windows_are_fixed_disjoint_and_even(lengths, block_size, eval_tokens, batch_size, world_size):
    assume(max(lengths) > block_size)
    d = dataset([99], lengths)
    total = sum(max(0, n - 1) // block_size for n in lengths)
    wanted = min(total, max(1, eval_tokens // block_size)) if eval_tokens else total
    windows, sequence_ids = val_sequences(d, block_size, eval_tokens)
    assert windows.count == total and len(sequence_ids) == wanted
    assert sequence_ids[0] >= 0 and sequence_ids[-1] < total and np.all(np.diff(sequence_ids) >= 1)
    gaps = np.diff([-1 - sequence_ids[0], *sequence_ids, 2 * total - 1 - sequence_ids[-1]])  # mirrored at both ends
    assert gaps.max() - gaps.min() <= 2

    whole = [torch.cat(t) for t in zip(*val_batches(d, block_size, eval_tokens, 1), strict=True)]
    x, y = whole
    assert x.dtype == torch.int64 and x.shape == (wanted, block_size) and torch.equal(y, x + 1)
    ranks = [list(val_batches(d, block_size, eval_tokens, batch_size, r, world_size)) for r in range(world_size)]
    assert all(1 <= len(b[0]) <= batch_size for rank in ranks for b in rank)
    assert len({len(rank) for rank in ranks}) == 1  # a model that is parted computes on all at once
    assert all((y == -1).all() or (y >= 0).all() for rank in ranks for _, y in rank)
    ranks = [[b for b in rank if (b[1] >= 0).all()] for rank in ranks]  # without what fills up
    counts = [sum(len(b[0]) for b in rank) for rank in ranks]
    assert max(counts) - min(counts) <= 1
    shared = torch.cat([b[0] for rank in ranks for b in rank])
    assert sorted(shared.tolist()) == x.tolist()  # each window on one process


def test_the_whole_val_split_is_read_once():
    d = dataset([99], [101, 5, 57])
    y = torch.cat([b[1] for b in val_batches(d, 10, 0, 4)])
    targets = sorted(y.flatten().tolist())
    assert targets == [*range(1, 101), *range(107, 157)]  # all but each shard's first token and what is left over
    (more,), (all_of_it,) = val_batches(d, 10, 10**9, 100), val_batches(d, 10, 0, 100)
    assert same(more, all_of_it)


def test_a_split_too_short_for_the_block_says_what_would_fit():
    message = refusal(TrainBatches, dataset([20, 40, 3]), 0, 40, 1)
    assert "block_size=40" in message and "63 tokens" in message and "--block_size=39" in message
    assert "val" in refusal(val_sequences, dataset([99], [10]), 10)
    assert "val" in refusal(val_batches, dataset([99], [10]), 10, 0, 1)  # at once, not at the first batch
    assert "--block_size" not in refusal(val_sequences, dataset([99], [1]), 10)
    assert TrainBatches(dataset([41]), 0, 40, 1).micro_batch(7)[1][0, -1] == 40  # one window is enough


def test_to_device_keeps_the_batch():
    batch = TrainBatches(dataset([99]), 0, 8, 2).micro_batch(0)
    assert same(to_device(batch, "cpu"), batch)


# Opening


def write_dataset(directory, shards, dtype="uint16", vocab_size=100):
    """Files and meta.json by hand. shards: {file name: [ids]}."""
    directory.mkdir(parents=True)
    splits = {}
    for split in ("train", "val"):
        files = {n: np.array(ids, dtype).astype(np.dtype(dtype).newbyteorder("<")).tobytes()
                 for n, ids in shards.items() if n.startswith(split)}
        for name, blob in files.items():
            (directory / name).write_bytes(blob)
        splits[split] = {"tokens": sum(len(b) for b in files.values()) // np.dtype(dtype).itemsize, "bytes": 300,
                         "documents": 1, "files": {n: {"sha256": hashlib.sha256(b).hexdigest(), "size": len(b)}
                                                   for n, b in files.items()}}
    meta = {"schema_version": 1, "tokenizer": {"name": "byte"}, "vocab_size": vocab_size, "eot": None, "dtype": dtype,
            "source": "a test", "splits": splits, "skipped": {}}
    (directory / "meta.json").write_text(json.dumps(meta))
    return meta


SHARD_FILES = {"train_1.bin": range(40, 60), "train_0.bin": range(40), "val.bin": range(60, 99)}


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    write_dataset(tmp_path / "x", SHARD_FILES)
    d = open_dataset("x", tmp_path)
    assert [s.tolist() for s in d.shards["train"]] == [list(range(40)), list(range(40, 60))]
    assert d.tokens("train") == 60 and d.bytes_per_token("train") == 5 and d.vocab_size == 100
    assert not d.shards["val"][0].flags.writeable
    x, _ = TrainBatches(d, 0, 4, 9 + 4).micro_batch(0)
    assert sorted(x[:, 0].tolist()) == [*range(0, 36, 4), *range(40, 56, 4)]


def test_the_fingerprint_follows_the_tokens(tmp_path):
    variants = [{}, {"dtype": "uint32"}, {"vocab_size": 101}, {"shards": {**SHARD_FILES, "val.bin": range(60, 98)}},
                {"shards": {**SHARD_FILES, "train_0.bin": range(40, 60), "train_1.bin": range(40)}}]
    prints = []
    for i, variant in enumerate(variants):
        write_dataset(tmp_path / f"x{i}", **{"shards": SHARD_FILES, **variant})
        prints.append(open_dataset(f"x{i}", tmp_path).fingerprint)
    write_dataset(tmp_path / "again", SHARD_FILES)
    assert len(set(prints)) == len(variants) and open_dataset("again", tmp_path).fingerprint == prints[0]


def in_meta(*path, value):
    """A damage that sets (or, where `value` is KeyError, deletes) one field of meta.json."""
    def damage(directory):
        meta = json.loads((directory / "meta.json").read_text())
        inner = meta
        for name in path[:-1]:
            inner = inner[name]
        if value is KeyError:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        (directory / "meta.json").write_text(json.dumps(meta))
    return damage


def in_file(name, change, keep_books=False):
    """A damage that changes a file's bytes; keep_books: and lets meta.json know."""
    def damage(directory):
        blob = change((directory / name).read_bytes())
        (directory / name).write_bytes(blob)
        if keep_books:
            entry = {"sha256": hashlib.sha256(blob).hexdigest(), "size": len(blob)}
            in_meta("splits", "val" if name.startswith("val") else "train", "files", name, value=entry)(directory)
    return damage


def meta_text(text):
    return lambda directory: (directory / "meta.json").write_text(text)


def rename_file(name):
    def damage(directory):
        entry = {"sha256": "", "size": 1}
        in_meta("splits", "train", "files", value={name: entry})(directory)
    return damage


FLIPPED = in_file("train_0.bin", lambda b: bytes([b[0] ^ 1]) + b[1:])
DAMAGES = {
    "missing file": (lambda d: (d / "val.bin").unlink(), "val.bin", "cannot be read"),
    "truncated": (in_file("train_1.bin", lambda b: b[:-2]), "train_1.bin", "has 38 bytes, meta.json says 40"),
    "padded": (in_file("train_1.bin", lambda b: b + b"\0\0"), "train_1.bin", "has 42 bytes"),
    "emptied": (in_file("val.bin", lambda b: b""), "val.bin", "has 0 bytes"),
    "half a token": (in_file("val.bin", lambda b: b + b"\0", keep_books=True), "meta.json",
                     "val.bin.size is 79, which is no whole number of uint16"),
    "flipped byte": (FLIPPED, "train_0.bin", "sha256"),
    "shards exchanged": (lambda d: (d / "val.bin").replace(d / "train_1.bin"), "train_1.bin", "has 78 bytes"),
    "token beyond": (in_file("val.bin", lambda b: b[:-2] + b"\x64\0", keep_books=True), "val.bin", "token id 100"),
    "a folder": (lambda d: ((d / "val.bin").unlink(), (d / "val.bin").mkdir()), "val.bin", ""),
    "wrong dtype": (in_meta("dtype", value="uint32"), "meta.json", "tokens is 60, but its files hold 30 uint32"),
    "unknown dtype": (in_meta("dtype", value="float16"), "meta.json", "dtype is 'float16'"),
    "wrong count": (in_meta("splits", "val", "tokens", value=40), "meta.json", "tokens is 40, but its files hold 39"),
    "not JSON": (meta_text("{"), "meta.json", "not JSON"),
    "not UTF-8": (lambda d: (d / "meta.json").write_bytes(b"\xff"), "meta.json", "not JSON"),
    "empty JSON": (meta_text(""), "meta.json", "not JSON"),
    "deep JSON": (meta_text("[" * 200_000), "meta.json", "not JSON"),
    "a list": (meta_text("[]"), "meta.json", "not an object"),
    "newer schema": (in_meta("schema_version", value=2), "meta.json", "schema_version is 2, this program reads 1"),
    "boolean vocabulary": (in_meta("vocab_size", value=True), "meta.json", "vocab_size is True"),
    "no vocabulary": (in_meta("vocab_size", value=0), "meta.json", "vocab_size is 0"),
    "eot of text": (in_meta("eot", value="end"), "meta.json", "eot is 'end'"),
    "no val": (in_meta("splits", "val", value=KeyError), "meta.json", "splits.val is not an object"),
    "null val": (in_meta("splits", "val", value=None), "meta.json", "splits.val is not an object"),
    "empty split": (in_meta("splits", "val", "tokens", value=0), "meta.json", "tokens is 0: the split is empty"),
    "no files": (in_meta("splits", "val", "files", value={}), "meta.json", "tokens is 39, but its files hold 0"),
    "no text": (in_meta("splits", "train", "bytes", value=0), "meta.json", "splits.train.bytes is 0"),
    "fraction of a token": (in_meta("splits", "val", "tokens", value=39.0), "meta.json", "39.0, not of type int"),
    "no digest": (in_meta("splits", "val", "files", "val.bin", "sha256", value=KeyError), "meta.json",
                  "splits.val.files.val.bin.sha256 is missing"),
    "another folder": (rename_file("train/../../secret.bin"), "meta.json", "not the name"),
    "no file name": (rename_file("train\0.bin"), "meta.json", "not the name"),
    "the other split": (rename_file("val.bin"), "meta.json", "not the name"),
}
for field in dataset_module.META:
    DAMAGES[f"no {field}"] = (in_meta(field, value=KeyError), "meta.json", f"{field} is missing")
    DAMAGES[f"{field} of another type"] = (in_meta(field, value=[1]), "meta.json", f"{field} is [1], not of type")


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_dataset_is_refused_in_one_line(tmp_path, name):
    damage, file, words = DAMAGES[name]
    write_dataset(tmp_path / "x", SHARD_FILES)
    open_dataset("x", tmp_path)
    damage(tmp_path / "x")
    message = refusal(open_dataset, "x", tmp_path)
    assert str(tmp_path / "x" / file) in message and words in message
    assert message.endswith(f"(run python data/x/prepare.py --out_dir {tmp_path / 'x'} again)")


def test_no_dataset_is_one_line(tmp_path):
    message = refusal(open_dataset, "pycod", tmp_path)
    assert "did you mean pycode?" in message
    assert "run python data/pycode/prepare.py" in refusal(open_dataset, "pycode", tmp_path)


def test_of_large_files_the_batches_are_checked_instead(tmp_path, monkeypatch):
    write_dataset(tmp_path / "x", {"train.bin": [*range(39), 100], "val.bin": range(9)})
    assert "token id 100" in refusal(open_dataset, "x", tmp_path)
    monkeypatch.setattr(dataset_module, "VERIFY_BYTES", 20)
    b = TrainBatches(open_dataset("x", tmp_path), 0, 39, 2)
    message = refusal(b.micro_batch, 0)
    assert "train: has the token id 100" in message and "prepare.py" in message


def test_a_dataset_may_be_required_to_have_a_tokenizer(tmp_path, gpt2):
    write_dataset(tmp_path / "x", SHARD_FILES)
    assert open_dataset("x", tmp_path, tokenizer="byte").vocab_size == 100
    assert "made with the tokenizer byte, not with gpt2" in refusal(open_dataset, "x", tmp_path, tokenizer="gpt2")


# nanoGPT's folders


def bare(directory, train, val, dtype="<u2"):
    directory.mkdir()
    for name, ids in (("train", train), ("val", val)):
        np.array(ids, dtype).tofile(directory / f"{name}.bin")


def test_bare_token_files_need_a_tokenizer_or_a_vocabulary(tmp_path):
    text = "Żółw and more. " * 20
    bare(tmp_path / "x", list(text.encode()) * 3, list(text.encode()))
    message = refusal(open_dataset, "x", tmp_path)
    assert "--tokenizer=gpt2 or --vocab_size=N" in message and "convert_nanogpt_meta" in message
    d = open_dataset("x", tmp_path, tokenizer="byte")
    assert (d.vocab_size, d.meta["eot"], d.tokens("val")) == (257, 256, len(text.encode()))
    assert d.bytes_per_token("val") == d.bytes_per_token("train") == 1
    unnamed = open_dataset("x", tmp_path, vocab_size=256)
    assert unnamed.vocab_size == 256 and unnamed.bytes_per_token("val") is None
    assert same(TrainBatches(unnamed, 0, 8, 4).micro_batch(3), TrainBatches(d, 0, 8, 4).micro_batch(3))
    assert unnamed.fingerprint != d.fingerprint
    with pytest.raises(DataError, match="nobody named the tokenizer"):
        from_meta(unnamed.meta["tokenizer"])


@pytest.mark.parametrize("train, vocab_size, words", [
    (b"abc", 100, "train.bin: has 3 bytes, which is no whole number of uint16 tokens"), (b"", 100, "has 0 bytes"),
    (b"\x64\0", 100, "train.bin: has the token id 100, beyond vocab_size=100 (another --tokenizer or --vocab_size?)"),
    (b"abcdef", 10**5, "has 6 bytes, which is no whole number of uint32 tokens"),
])
def test_bare_token_files_that_cannot_be_are_one_line(tmp_path, train, vocab_size, words):
    bare(tmp_path / "x", [], [1, 2])
    (tmp_path / "x/train.bin").write_bytes(train)
    assert words in refusal(open_dataset, "x", tmp_path, vocab_size=vocab_size)


def test_what_a_killed_preparation_leaves_is_not_taken_for_bare_files(tmp_path):
    bare(tmp_path / "x", [1, 2], [1, 2])
    (tmp_path / "x/.parts.1a2b.tmp").mkdir()
    assert "does not exist" in refusal(open_dataset, "x", tmp_path, vocab_size=9)


def test_an_empty_shard_among_others_is_no_harm(tmp_path):
    write_dataset(tmp_path / "x", {**SHARD_FILES, "train_2.bin": []})
    assert TrainBatches(open_dataset("x", tmp_path), 0, 4, 1).n_sequences == 13


@settings(max_examples=20)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=50))
def test_wide_tokens_come_out_as_they_went_in(tmp_path_factory, ids):
    root = tmp_path_factory.mktemp("wide")
    write_dataset(root / "x", {"train.bin": ids, "val.bin": ids}, "uint32", vocab_size=2**32)
    x, y = next(val_batches(open_dataset("x", root), len(ids) - 1, 0, 1))
    assert x[0].tolist() == ids[:-1] and y[0].tolist() == ids[1:]
