"""The writer: each document is in the dataset once, in order, in the split that the recipe assigns."""

import collections
import json
import os
import time
import tracemalloc

import numpy as np
import pytest
from dataset_helpers import refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_helpers import MemoryPartition, contents, documents, partitions_of, run_prepare

from blockgpt.data import sources as sources_module
from blockgpt.data import writer
from blockgpt.data.dataset import open_dataset
from blockgpt.data.sources import file_partitions
from blockgpt.data.tokenizer import CharTokenizer
from blockgpt.data.writer import Recipe, partition_path, shard_names
from blockgpt.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
TEXTS = [f"document {i}\n" + "x" * (i % 13) for i in range(200)]


# Documents and splits


@settings(max_examples=40)
@given(texts=st.lists(TEXT, min_size=2, max_size=60), n=st.integers(1, 9), fraction=st.floats(0.05, 0.95))
def test_each_document_is_written_once_in_order(tmp_path_factory, texts, n, fraction):
    out = tmp_path_factory.mktemp("x")
    unique = list(dict.fromkeys(texts))
    try:
        meta = run_prepare(out, partitions_of(texts, n), val_fraction=fraction)
    except DataError as error:
        assert "split would be empty" in str(error) and not any(out.iterdir())
        return
    train, val = documents(out, "train"), documents(out, "val")
    assert set(train) | set(val) == set(unique) and len(train) + len(val) == len(unique)
    assert train == [t for t in unique if t in set(train)] and val == [t for t in unique if t in set(val)]
    assert meta["skipped"]["duplicate"] == len(texts) - len(unique)
    assert meta["splits"]["val"]["bytes"] == sum(len(t.encode()) for t in val)


def test_a_document_stays_in_its_split_when_other_documents_change(tmp_path):
    run_prepare(tmp_path / "a", partitions_of(TEXTS, 7))
    run_prepare(tmp_path / "b", partitions_of([*TEXTS[100:], "new"], 31))
    a, b = (set(documents(tmp_path / name, "val")) for name in "ab")
    assert a & set(TEXTS[100:]) == b - {"new"}
    assert 20 < len(a) < 60  # 40 of 200 expected


def test_by_position_the_end_of_each_document_is_val(tmp_path):
    run_prepare(tmp_path, [MemoryPartition(("abcdefghij", "0123456789"))], by_position=True)
    assert documents(tmp_path, "train") == ["abcdefgh", "01234567"] and documents(tmp_path, "val") == ["ij", "89"]


def test_a_split_that_the_source_names_is_final():
    for recipe in (Recipe(val_fraction=0.999), Recipe(by_position=True)):
        assert recipe.split_document("train", "text", b"0" * 16) == [("train", "text", b"0" * 16)]


def test_without_separators_no_end_of_text_token_is_written(tmp_path):
    meta = run_prepare(tmp_path, partitions_of(TEXTS), separate=False)
    assert meta["eot"] is None and not (np.fromfile(tmp_path / "train.bin", "<u2") == 256).any()


def test_what_filters_and_tokenizer_refuse_is_counted(tmp_path):
    texts = [*TEXTS, "short", "é" * 20, "é" * 21]
    tokenizer = CharTokenizer("".join(TEXTS))
    meta = run_prepare(tmp_path, partitions_of(texts), tokenizer, filters={"min_chars": 10}, separate=False)
    assert meta["skipped"] == {"duplicate": 0, "filter_min_chars": 1, "not_encodable": 2}
    assert meta["recipe"]["filters"] == {"min_chars": "10"}
    message = refusal(run_prepare, tmp_path / "none", [MemoryPartition(("é" * 20,))], tokenizer, separate=False)
    assert "1 of 1 documents are lost, the first (not_encodable)" in message and "'é' is not among" in message


def test_a_document_of_which_one_half_cannot_be_encoded_is_left_out_complete(tmp_path):
    texts = ("abcdefghij", "abcdefgh€j")  # the second half of the second text
    meta = run_prepare(tmp_path, [MemoryPartition(texts)], CharTokenizer("abcdefghij"), by_position=True,
                       separate=False)
    assert [meta["splits"][split]["tokens"] for split in ("train", "val")] == [8, 2]
    assert meta["skipped"]["not_encodable"] == 1


# Duplicates


def test_duplicates_are_found_in_several_buckets(tmp_path, monkeypatch):
    texts = [f"text {i % 70}" for i in range(300)]
    run_prepare(tmp_path / "a", partitions_of(texts))
    monkeypatch.setattr(writer, "DEDUP_ROWS", 32)
    run_prepare(tmp_path / "b", partitions_of(texts))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    run_prepare(tmp_path / "c", partitions_of(texts), deduplicate=False)
    all_texts = documents(tmp_path / "c", "train") + documents(tmp_path / "c", "val")
    assert collections.Counter(all_texts) == collections.Counter(texts)


# Shards


@pytest.mark.parametrize("shard_tokens", [1, 50, 777])
def test_shards_contain_whole_documents_and_read_as_one(tmp_path, monkeypatch, shard_tokens):
    monkeypatch.setattr(writer, "COPY_TOKENS", 64)
    run_prepare(tmp_path / "one", partitions_of(TEXTS))
    meta = run_prepare(tmp_path / "many", partitions_of(TEXTS), shard_tokens=shard_tokens)
    files = meta["splits"]["train"]["files"]
    assert len(files) > 3 and all(name == f"train_{i:05}.bin" for i, name in enumerate(files))
    for split in ("train", "val"):
        assert documents(tmp_path / "one", split) == documents(tmp_path / "many", split)
    for name, entry in files.items():
        ids = np.fromfile(tmp_path / "many" / name, "<u2")
        assert ids[-1] == 256 and len(ids) * 2 == entry["size"] and len(ids) <= shard_tokens + 64 + 30
    d = open_dataset("many", tmp_path)
    assert np.concatenate(d.shards["train"]).tolist() == np.fromfile(tmp_path / "one/train.bin", "<u2").tolist()


def test_shards_of_an_older_dataset_are_removed_and_other_files_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "COPY_TOKENS", 64)
    run_prepare(tmp_path / "x", partitions_of(TEXTS), shard_tokens=100)
    (tmp_path / "x/notes.txt").write_text("stays")
    run_prepare(tmp_path / "x", partitions_of(TEXTS[:50]))
    assert sorted(contents(tmp_path / "x")) == ["meta.json", "notes.txt", "train.bin", "val.bin"]


@pytest.mark.parametrize("meta", [None, [], {}, {"splits": 3}, {"splits": {"train": {"files": [1]}}},
                                  {"splits": {s: {"files": ["../x.bin", "x.txt"]} for s in ("train", "val")}}])
def test_an_older_meta_json_names_only_shards_in_its_folder(meta):
    assert shard_names(meta) == []


# The work directory


def test_a_partition_is_named_by_its_identity(tmp_path):
    a, b = partitions_of(["a", "b"], 1)
    assert partition_path(tmp_path, a) == partition_path(tmp_path, MemoryPartition(("a",)))
    assert partition_path(tmp_path, a) != partition_path(tmp_path, b)


def test_temporaries_of_a_process_killed_long_ago_are_removed(tmp_path):
    old = tmp_path / "x/.parts.1a2b.tmp"
    old.mkdir(parents=True)
    (old / "0000000.ids").write_bytes(b"1234")
    run_prepare(tmp_path / "x", partitions_of(TEXTS))
    assert old.exists()
    for path in (old / "0000000.ids", old):
        os.utime(path, (time.time() - 2 * writer.STALE_SECONDS,) * 2)
    run_prepare(tmp_path / "x", partitions_of(TEXTS))
    assert not old.exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "PARTITION_BYTES", 2**20)
    monkeypatch.setattr(writer, "COPY_TOKENS", 2**16)
    line = json.dumps({"text": "word " * 2000}) + "\n"
    with open(tmp_path / "x.jsonl", "w") as file:
        for i in range(2000):
            file.write(line.replace("word", f"w{i}", 1))  # 20 MB
    partitions = file_partitions([str(tmp_path / "x.jsonl")])
    tracemalloc.start()
    run_prepare(tmp_path / "x", partitions)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20
