"""packing='documents': whole documents in every window, each once an epoch, and no token lost."""

import collections

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_loader import dataset, same

from blockgpt.data import packing as packing_module
from blockgpt.data.packing import IGNORED, PackedBatches, best_fit, document_chunks
from blockgpt.errors import DataError

EOT = 0
DOCUMENTS = st.lists(st.integers(1, 50), min_size=1, max_size=40)  # lengths, eot included


def corpus(*shards):
    """A dataset of documents with these lengths, shard by shard; their tokens number themselves from 1 on."""
    d, number = dataset([1]), iter(range(1, 10**6))
    d.shards["train"] = [np.array([t for n in lengths for t in [*(next(number) for _ in range(n - 1)), EOT]], "<u4")
                         for lengths in shards]
    d.meta["eot"] = EOT
    return d


def documents_of(d):
    whole = [np.split(tokens, np.flatnonzero(tokens == EOT) + 1)[:-1] for tokens in d.shards["train"]]
    return [tuple(document.tolist()) for shard in whole for document in shard]


def windows(batches, epoch=0):
    """The windows of an epoch, without padding, as tuples of tokens."""
    n = batches.n_sequences
    x, y = batches.sequences(epoch * n + np.arange(n))
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (n, batches.block_size)
    used = (y != IGNORED).sum(1)
    assert int(used.sum()) == batches.n_targets(epoch * n + np.arange(n)) and used.min() >= 1
    for a, b, m in zip(x, y, used.tolist(), strict=True):
        assert torch.equal(a[1:m], b[:m - 1]) and (b[m:] == IGNORED).all() and (a[m + 1:] == EOT).all()
    return [(*a[:m].tolist(), int(b[m - 1])) for a, b, m in zip(x, y, used.tolist(), strict=True)]


@given(st.lists(DOCUMENTS, min_size=1, max_size=3), st.integers(2, 30), st.integers(0, 2**63 - 1))
def test_no_document_is_cut_unless_it_is_longer_than_the_window(shards, block_size, seed):
    d = corpus(*shards)
    if all(n < 2 for lengths in shards for n in lengths):
        return
    b = PackedBatches(d, seed, block_size, 2)
    for epoch in (0, 5):
        texts, found = windows(b, epoch), collections.Counter()
        for text in texts:
            parts = np.split(np.array(text), np.flatnonzero(np.array(text) == EOT) + 1)
            found.update(tuple(p.tolist()) for p in parts if len(p))
        for document in documents_of(d):
            if 2 <= len(document) <= block_size + 1:
                assert found[document] == 1, document  # whole, once
            elif len(document) > block_size + 1:  # in pieces that overlap by one token
                cut = [document[i:i + block_size + 1] for i in range(0, len(document) - 1, block_size)]
                assert all(found[piece] >= 1 for piece in cut)
        assert sum(len(t) for t in texts) == int(b.lengths.sum())


@given(st.lists(st.integers(2, 64), min_size=1, max_size=200))
def test_pieces_fit_and_are_packed_as_one_by_one(lengths):
    """Against the definition: the longest first, each into the fullest window that holds it."""
    bins, n = best_fit(np.array(lengths), 64)
    filled = np.bincount(bins, lengths, n)
    assert filled.max() <= 64 and len(np.unique(bins)) == n and filled.min() >= 2
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(64 - length)
    assert sorted(64 - filled) == sorted(rooms)


def test_ordinary_documents_leave_little_padding():
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 20_000).astype(int) + 2
    tokens = np.ones(int(lengths.sum()), np.uint16)
    tokens[np.cumsum(lengths) - 1] = EOT
    _, n = document_chunks([tokens], EOT, 1024)
    _, bins = best_fit(n, 1025)
    assert n.sum() / (bins * 1025) > 0.995


def test_the_scan_is_in_blocks(monkeypatch):
    d = corpus([3, 9, 30, 2], [5, 5])
    whole = document_chunks(d.shards["train"], EOT, 8)
    monkeypatch.setattr(packing_module, "SCANNED", 4)
    for a, b in zip(whole, document_chunks(d.shards["train"], EOT, 8), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_any_number_of_processes_reads_the_same_global_batch(world_size):
    d = corpus([3, 9, 30, 2, 7] * 20)
    whole = PackedBatches(d, 3, 16, 24).micro_batch(10**9)
    shared = PackedBatches(d, 3, 16, 24 // world_size, world_size)
    parts = [shared.micro_batch(10**9, 0, rank, world_size) for rank in range(world_size)]
    assert same([torch.cat([p[j] for p in parts]) for j in (0, 1)], whole)
    assert shared.step_targets(10**9) == int((whole[1] != IGNORED).sum())


def test_the_order_changes_with_the_epoch_and_the_seed():
    d = corpus([5] * 100)
    orders = [[w[0] for w in windows(PackedBatches(d, seed, 9, 1), epoch)] for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0] and sorted(orders[0]) == sorted(orders[1])


def test_documents_of_one_token_are_left_out():
    assert windows(PackedBatches(corpus([1, 3, 1]), 0, 8, 1)) == [(1, 2, EOT)]
    with pytest.raises(DataError, match="no document of two tokens"):
        PackedBatches(corpus([1, 1]), 0, 8, 1)


def test_without_a_separator_it_is_refused():
    d = corpus([5])
    d.meta["eot"] = None
    with pytest.raises(DataError, match=r"packing='stream'"):
        PackedBatches(d, 0, 8, 1)


def test_the_loss_is_the_mean_over_the_targets(data_dir):
    """Padding counts for nothing, however it is shared out among micro-batches."""
    from test_objectives import exact_losses, runtime

    from blockgpt.training.objectives import LanguageModeling
    from configurator import load_config
    from model_builder import build_model

    def objective(batch_size, accumulation):
        return LanguageModeling(load_config([
            f"--data_dir={data_dir}", "--dataset=text", "--packing=documents", "--n_layer=1", "--n_head=2",
            "--n_embd=16", "--block_size=1500", "--vocab_size=320", f"--batch_size={batch_size}", "--device=cpu",
            f"--gradient_accumulation_steps={accumulation}"]), runtime())
    whole = objective(6, 1)
    model = build_model(whole.config.model)
    step, x, y = next((step, x, y) for step in range(99) for x, y in whole.micro_batches(step)
                      if (y == IGNORED).any())
    mean = exact_losses(model, x, y.clamp(min=0))[y != IGNORED].mean().item()
    list(whole.micro_batches(step))
    assert whole.loss(model, (x, y)).item() == pytest.approx(mean, rel=1e-5)
    parts = objective(2, 3)
    assert sum(parts.loss(model, b).item() for b in parts.micro_batches(step)) == pytest.approx(mean, rel=1e-5)
    assert whole.fingerprint != whole.dataset.fingerprint  # another order of the same tokens is another run
