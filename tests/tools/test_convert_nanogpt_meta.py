"""convert_nanogpt_meta: a pickle's plain values are read, and nothing in it is executed."""

import os
import pickle

import numpy as np
import pytest
from dataset_helpers import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgpt.data.dataset import open_dataset
from blockgpt.data.tokenizer import CharTokenizer
from blockgpt.errors import DataError
from tools import convert_nanogpt_meta
from tools.convert_nanogpt_meta import read_plain_pickle

PLAIN = st.recursive(st.none() | st.booleans() | st.integers() | st.text(),
                     lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner))


@pytest.mark.slow
@settings(max_examples=50)
@given(PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_values_are_read_as_pickle_reads_them(value, protocol):
    read = read_plain_pickle(pickle.dumps(value, protocol))
    assert read == value and type(read) is type(value)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("value", [Hostile(), {"itos": {0: Hostile()}}, complex(1), os.mkdir, DataError])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_reference_to_a_class_or_function_is_refused_and_not_called(tmp_path, monkeypatch, value, protocol):
    monkeypatch.chdir(tmp_path)
    assert "refers to '" in refusal(read_plain_pickle, pickle.dumps(value, protocol))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stream, words", [
    (b"cos\nmkdir\n(S'pwned'\ntR.", "refers to 'os.mkdir'"), (b"(S'pwned'\nios\nmkdir\n.", "refers to 'os.mkdir'"),
    (b"Pid\n.", "refers to the persistent object 'id'"), (b"K\x00Q.", "refers to the persistent object 0"),
    (b"\x80\x02\x82\x01.", "unregistered extension code 1"), (b"]K\x01b.", "is not a complete pickle"),
    (b"\x80\x05\x97.", "is not a complete pickle"),
    (b"\x80\x05\x96\xff\xff\xff\xff\xff\0\0\0.", "is not a complete pickle: KeyError: 150"),  # a terabyte
    (b"", "is not a complete pickle"), (b"}", "is not a complete pickle"),
])
def test_every_opcode_that_could_call_or_allocate_is_refused(tmp_path, monkeypatch, stream, words):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(read_plain_pickle, stream)
    assert not list(tmp_path.iterdir())


def test_a_large_memo_index_takes_no_memory():
    assert read_plain_pickle(b"}r\xff\xff\xff\x7f.") == {}
    assert read_plain_pickle(b"}p99999999999\n.") == {}


@settings(max_examples=50)
@given(st.binary(max_size=60) | PLAIN.map(pickle.dumps).flatmap(
    lambda data: st.integers(0, len(data) - 1).map(lambda n: data[:n])))
def test_any_bytes_are_read_or_refused(data):
    try:
        read_plain_pickle(data)
    except DataError as error:
        assert "\n" not in str(error)


def nanogpt_folder(directory, text):
    """A folder as nanoGPT's data/shakespeare_char/prepare.py writes it."""
    characters = sorted(set(text))
    stoi = {c: i for i, c in enumerate(characters)}
    cut = int(len(text) * 0.9)
    directory.mkdir()
    for split, split_text in (("train", text[:cut]), ("val", text[cut:])):
        np.array([stoi[c] for c in split_text], np.uint16).tofile(directory / f"{split}.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": stoi}
    (directory / "meta.pkl").write_bytes(pickle.dumps(meta))


def test_a_character_dataset_of_nanogpt_is_converted(tmp_path, capsys, sources):
    nanogpt_folder(tmp_path / "x", sources[0])
    refusal(open_dataset, "x", tmp_path)  # nothing says what the ids mean
    convert_nanogpt_meta.main([str(tmp_path / "x")])
    d = open_dataset("x", tmp_path)
    cut = int(len(sources[0]) * 0.9)
    assert d.meta["tokenizer"] == CharTokenizer(sources[0]).to_meta()
    assert CharTokenizer(d.meta["tokenizer"]["characters"]).decode(d.shards["val"][0]) == sources[0][cut:]
    assert d.meta["splits"]["val"]["bytes"] == len(sources[0][cut:].encode())
    assert f"vocabulary {d.vocab_size}" in capsys.readouterr().out
    assert "without meta.json" in refusal(convert_nanogpt_meta.main, [str(tmp_path / "x")])


def test_a_bpe_dataset_of_nanogpt_is_converted(tmp_path, gpt2):
    (tmp_path / "x").mkdir()
    text = "To be, or not to be: that is the question.\n" * 9
    for split in ("train", "val"):
        np.array(gpt2.encode(text), np.uint16).tofile(tmp_path / f"x/{split}.bin")
    assert "cannot be read" in refusal(convert_nanogpt_meta.main, [str(tmp_path / "x")])
    convert_nanogpt_meta.main([str(tmp_path / "x"), "--tokenizer=gpt2"])
    d = open_dataset("x", tmp_path)
    assert d.vocab_size == 50257 and d.meta["splits"]["val"]["bytes"] == len(text)


@pytest.mark.parametrize("meta, words", [
    ({"itos": {0: "a", 2: "b"}}, "no itos"), ([], "no itos"), ({"itos": {}}, "no itos"),
    ({"itos": {0: "ab"}}, "values that are not single characters"),
    ({"itos": {0: "b", 1: "a"}}, "order of their code points"),
    ({"itos": {0.0: "a"}}, "no itos"), ({"itos": {0: "a", 1: (1, 2)}}, "not single characters"),
    ({"itos": {0: b"a"}}, "not single characters"), ({"itos": {0: Hostile()}}, "refers to 'posix.mkdir'"),
    (b"not a pickle", "is not a complete pickle"),
])
def test_a_meta_pkl_that_is_not_nanogpts_is_a_one_line_error_and_nothing_is_written(tmp_path, meta, words):
    nanogpt_folder(tmp_path / "x", "ab" * 30)
    (tmp_path / "x/meta.pkl").write_bytes(meta if type(meta) is bytes else pickle.dumps(meta))
    message = refusal(convert_nanogpt_meta.main, [str(tmp_path / "x")])
    assert message.startswith(f"{tmp_path}/x/meta.pkl: ") and words in message
    assert not (tmp_path / "x/meta.json").exists()


def test_a_meta_pkl_larger_than_any_vocabulary_is_refused(tmp_path, monkeypatch):
    nanogpt_folder(tmp_path / "x", "ab" * 30)
    monkeypatch.setattr(convert_nanogpt_meta, "MAX_BYTES", 20)
    assert "meta.pkl: is too large" in refusal(convert_nanogpt_meta.main, [str(tmp_path / "x")])
