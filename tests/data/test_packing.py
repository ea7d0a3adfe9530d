"""packing='documents': whole documents in every sequence, each once per epoch, and no token lost."""

import collections
import itertools

import numpy as np
import pytest
import torch
from dataset_helpers import concatenate, counting_dataset, equal, exact_losses, pair, refusal, single_process
from hypothesis import assume, given
from hypothesis import strategies as st

from blockgpt.data import packing as packing_module
from blockgpt.data.packing import IGNORE_INDEX, PackedBatches, best_fit, document_chunks

EOT = 0
DOCUMENT_LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)  # eot included


def corpus(*shards):
    """A dataset of documents of these lengths, by shard; all tokens but the eots count up from 1."""
    d, ids = counting_dataset([1]), iter(range(1, 10**6))
    d.shards["train"] = [np.array([t for n in lengths for t in [*(next(ids) for _ in range(n - 1)), EOT]], "<u4")
                         for lengths in shards]
    d.meta["eot"] = EOT
    return d


def split_documents(tokens):
    """The documents in an array of tokens, eot included, as tuples."""
    return [tuple(d.tolist()) for d in np.split(tokens, np.flatnonzero(tokens == EOT) + 1) if len(d)]


def unpadded_sequences(batches, epoch=0):
    """The sequences of an epoch without padding, as tuples of tokens."""
    n = batches.n_sequences
    ids = epoch * n + np.arange(n)
    x, y = pair(batches.read(ids))
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (n, batches.block_size)
    used = (y != IGNORE_INDEX).sum(1)
    assert int(used.sum()) == batches.n_targets(ids) and used.min() >= 1
    for a, b, m in zip(x, y, used.tolist(), strict=True):
        assert torch.equal(a[1:m], b[:m - 1]) and (b[m:] == IGNORE_INDEX).all() and (a[m + 1:] == EOT).all()
    return [(*a[:m].tolist(), int(b[m - 1])) for a, b, m in zip(x, y, used.tolist(), strict=True)]


@given(st.lists(DOCUMENT_LENGTHS, min_size=1, max_size=3), st.integers(2, 30), st.integers(0, 2**63 - 1))
def test_a_document_is_cut_only_if_it_is_longer_than_a_sequence(shards, block_size, seed):
    assume(any(n >= 2 for lengths in shards for n in lengths))
    d = corpus(*shards)
    b = PackedBatches(d, seed, block_size, 2)
    for epoch in (0, 5):
        sequences = unpadded_sequences(b, epoch)
        found = collections.Counter(document for s in sequences for document in split_documents(np.array(s)))
        for document in itertools.chain.from_iterable(split_documents(tokens) for tokens in d.shards["train"]):
            if 2 <= len(document) <= block_size + 1:
                assert found[document] == 1, document  # whole, once
            elif len(document) > block_size + 1:  # in chunks that overlap by one token
                chunks = [document[i:i + block_size + 1] for i in range(0, len(document) - 1, block_size)]
                assert all(found[chunk] >= 1 for chunk in chunks)
        assert sum(map(len, sequences)) == int(b.chunk_lengths.sum())


@given(st.lists(st.integers(2, 64), min_size=1, max_size=200))
def test_chunks_are_packed_as_if_one_at_a_time(lengths):
    """Against the definition: the longest first, each into the fullest bin that holds it."""
    bins, n = best_fit(np.array(lengths), 64)
    used = np.bincount(bins, lengths, n)
    assert used.max() <= 64 and len(np.unique(bins)) == n and used.min() >= 2
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, size in enumerate(free) if size >= length]
        if fitting:
            free[min(fitting, key=lambda i: free[i])] -= length
        else:
            free.append(64 - length)
    assert sorted(64 - used) == sorted(free)


def test_ordinary_documents_leave_little_padding():
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 20_000).astype(int) + 2
    tokens = np.ones(int(lengths.sum()), np.uint16)
    tokens[np.cumsum(lengths) - 1] = EOT
    _, chunk_lengths = document_chunks([tokens], EOT, 1024)
    _, n_bins = best_fit(chunk_lengths, 1025)
    assert chunk_lengths.sum() / (n_bins * 1025) > 0.995


def test_the_chunks_do_not_depend_on_how_much_is_scanned_at_a_time(monkeypatch):
    d = corpus([3, 9, 30, 2], [5, 5])
    whole = document_chunks(d.shards["train"], EOT, 8)
    monkeypatch.setattr(packing_module, "SCAN_TOKENS", 4)
    for a, b in zip(whole, document_chunks(d.shards["train"], EOT, 8), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_any_number_of_processes_reads_the_same_global_batch(world_size):
    d = corpus([3, 9, 30, 2, 7] * 20)
    whole = PackedBatches(d, 3, 16, 24).micro_batch(10**9)
    sharded = PackedBatches(d, 3, 16, 24 // world_size, world_size)
    micro_batches = [sharded.micro_batch(10**9, 0, rank, world_size) for rank in range(world_size)]
    assert equal(concatenate(micro_batches), whole)
    assert sharded.step_targets(10**9) == int((whole["targets"] != IGNORE_INDEX).sum())


def test_the_offset_of_a_sequence_is_where_its_first_document_begins():
    d = corpus([3, 9, 30, 2], [5, 5, 17])
    b, tokens = PackedBatches(d, 3, 16, 2), np.concatenate(d.shards["train"])
    ids = np.arange(2 * b.n_sequences)
    x = b.read(ids)["tokens"]
    assert [tokens[first:first + 2].tolist() for _, first in b.offsets(ids)] == x[:, :2].tolist()


def test_each_document_of_a_sequence_is_a_segment_and_so_is_its_padding():
    d = corpus([3, 4, 2])
    batch = PackedBatches(d, 0, 11, 1).micro_batch(0)
    assert batch["tokens"].tolist() == [[1, 2, EOT, 3, 4, 5, EOT, 6, EOT, EOT, EOT]]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3]]
    assert batch["segment_ids"].dtype == torch.int64


def test_a_last_document_without_its_end_of_text_is_not_glued_to_the_next():
    """The packing knows where it ends, the tokens do not: it is a segment, and does not predict the next document."""
    d = corpus([3, 4], [2])
    d.shards["train"][0] = d.shards["train"][0][:-1]
    b = PackedBatches(d, 0, 8, 1)
    batch = b.micro_batch(0)
    assert batch["tokens"].tolist() == [[1, 2, EOT, 3, 4, 5, 6, EOT]]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]
    ignored = IGNORE_INDEX
    assert batch["targets"].tolist() == [[2, EOT, 3, 4, 5, ignored, EOT, ignored]]
    assert b.step_targets(0) == 6
    d.shards["train"] = d.shards["train"][:1]  # nothing follows it: every token but the first is a target
    assert PackedBatches(d, 0, 5, 1).micro_batch(0)["targets"].tolist() == [[2, EOT, 3, 4, 5]]


def test_the_order_changes_with_the_epoch_and_the_seed():
    d = corpus([5] * 100)
    orders = [[s[0] for s in unpadded_sequences(PackedBatches(d, seed, 9, 1), epoch)]
              for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0] and sorted(orders[0]) == sorted(orders[1])


def test_documents_of_one_token_are_left_out():
    assert unpadded_sequences(PackedBatches(corpus([1, 3, 1]), 0, 8, 1)) == [(1, 2, EOT)]
    assert "no document of two tokens" in refusal(PackedBatches, corpus([1, 1]), 0, 8, 1)


def test_token_ids_beyond_the_vocabulary_are_refused_in_every_batch():
    d = corpus([5, 9])
    d.meta["vocab_size"] = 12  # the ids are 0 to 12
    batches = PackedBatches(d, 0, 16, 1)
    assert "train: has the token id 12, beyond vocab_size=12" in refusal(batches.micro_batch, 0)


def test_shards_are_read_at_random_after_the_scan(monkeypatch):
    """Read-ahead, which the scan asks for, would make every read of a large file some hundred times as expensive."""
    d, advice = corpus([3, 9], [5, 5]), {}
    monkeypatch.setattr(packing_module, "madvise", lambda tokens, name: advice.setdefault(id(tokens), []).append(name))
    PackedBatches(d, 0, 8, 1)
    assert advice == {id(tokens): ["MADV_SEQUENTIAL", "MADV_RANDOM"] for tokens in d.shards["train"]}


def test_a_dataset_without_an_end_of_text_token_is_refused():
    d = corpus([5])
    d.meta["eot"] = None
    assert "--packing=stream" in refusal(PackedBatches, d, 0, 8, 1)


def test_the_loss_is_the_mean_over_the_targets(data_dir):
    """Padding does not count, whatever the micro-batches."""
    from blockgpt.training.objectives import LanguageModeling
    from configurator import load_config
    from model_builder import build_model

    def objective(batch_size, accumulation):
        return LanguageModeling(load_config([
            f"--data_dir={data_dir}", "--dataset=text", "--packing=documents", "--n_layer=1", "--n_head=2",
            "--n_embd=16", "--block_size=1500", "--vocab_size=320", f"--batch_size={batch_size}", "--device=cpu",
            f"--gradient_accumulation_steps={accumulation}"]), single_process())
    whole = objective(6, 1)
    model = build_model(whole.config.model)
    step, batch = next((step, batch) for step in range(99) for batch in whole.micro_batches(step)
                       if (batch["targets"] == IGNORE_INDEX).any())
    x, y = pair(batch)
    mean = exact_losses(model, x, y.clamp(min=0))[y != IGNORE_INDEX].mean().item()
    list(whole.micro_batches(step))
    assert whole.loss(model, batch)[0].item() == pytest.approx(mean, rel=1e-5)
    split = objective(2, 3)
    assert sum(split.loss(model, b)[0].item() for b in split.micro_batches(step)) == pytest.approx(mean, rel=1e-5)
    assert whole.fingerprint != whole.datasets["text"].fingerprint  # another order of the same tokens is another run
