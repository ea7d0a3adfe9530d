"""The dataset of the negative control."""

import itertools
import json

import numpy as np
from dataset_helpers import write_shards
from hypothesis import given
from hypothesis import strategies as st

from blockgpt.data.dataset import open_dataset
from blockgpt.experiments.sweeps.control import DOCUMENT_TOKENS, shuffle_documents, write_shuffled


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(0, 9))
def test_each_document_keeps_its_tokens_and_its_place(ids, eot):
    ids = np.array(ids, dtype="<u2")
    shuffled = shuffle_documents(ids, eot, np.random.default_rng(0))
    assert (np.flatnonzero(shuffled == eot) == np.flatnonzero(ids == eot)).all()
    ends = [-1, *np.flatnonzero(ids == eot), len(ids)]
    for start, end in itertools.pairwise(ends):
        assert sorted(shuffled[start + 1:end]) == sorted(ids[start + 1:end])


def test_without_end_of_text_tokens_blocks_are_shuffled():
    ids = np.arange(2 * DOCUMENT_TOKENS + 5)
    shuffled = shuffle_documents(ids, None, np.random.default_rng(0))
    assert (shuffled != ids).mean() > 0.99
    assert (sorted(shuffled[:DOCUMENT_TOKENS]) == ids[:DOCUMENT_TOKENS]).all()
    assert (sorted(shuffled[2 * DOCUMENT_TOKENS:]) == ids[2 * DOCUMENT_TOKENS:]).all()


def test_the_shuffled_dataset_validates_on_the_original_and_is_written_once(tmp_path):
    write_shards(tmp_path / "x", {"train.bin": range(99), "train_2.bin": [*range(50), *range(9)], "val.bin": range(40)})
    original = open_dataset("x", tmp_path)
    write_shuffled(original, tmp_path / "x-shuffled")
    shuffled = open_dataset("x-shuffled", tmp_path)  # checks digests and sizes
    assert [shard.tolist() for shard in shuffled.shards["val"]] == [shard.tolist() for shard in original.shards["val"]]
    for before, after in zip(original.shards["train"], shuffled.shards["train"], strict=True):
        assert before.tolist() != after.tolist() and sorted(before) == sorted(after)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "x-shuffled").glob("*.*")}
    write_shuffled(original, tmp_path / "x-shuffled")
    assert times == {path: path.stat().st_mtime_ns for path in times}

    write_shards(tmp_path / "y", {"train.bin": range(80), "val.bin": range(40)})  # the original has changed
    write_shuffled(open_dataset("y", tmp_path), tmp_path / "x-shuffled")
    meta = json.loads((tmp_path / "x-shuffled/meta.json").read_text())
    assert meta["splits"]["train"]["tokens"] == 80 and open_dataset("x-shuffled", tmp_path)


def test_it_is_reproducible(tmp_path):
    write_shards(tmp_path / "x", {"train.bin": range(99), "val.bin": range(40)})
    for name in ("a", "b"):
        write_shuffled(open_dataset("x", tmp_path), tmp_path / name)
    assert open_dataset("a", tmp_path).fingerprint == open_dataset("b", tmp_path).fingerprint
