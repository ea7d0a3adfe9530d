"""nanoGPT's meta.pkl: plain values are read, everything else is refused and not executed."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgpt.data.dataset import open_dataset
from blockgpt.data.tokenizer import CharTokenizer
from blockgpt.errors import DataError, UserError
from tools import convert_nanogpt_meta
from tools.convert_nanogpt_meta import read_plain_pickle


def refusal(action, *args):
    with pytest.raises(UserError) as raised:
        action(*args)
    assert "\n" not in str(raised.value)
    return str(raised.value)


PLAIN = st.recursive(st.none() | st.booleans() | st.integers() | st.text(),
                     lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner))


@settings(max_examples=50)
@given(PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_values_are_read_as_pickle_reads_them(value, protocol):
    read = read_plain_pickle(pickle.dumps(value, protocol))
    assert read == value and type(read) is type(value)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("value", [Hostile(), {"itos": {0: Hostile()}}, [1.5], (1, 2), {1}, b"bytes", complex(1)])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_whatever_is_not_plain_is_refused_and_not_carried_out(tmp_path, monkeypatch, value, protocol):
    monkeypatch.chdir(tmp_path)
    assert "has the instruction" in refusal(read_plain_pickle, pickle.dumps(value, protocol))
    assert not list(tmp_path.iterdir())


@settings(max_examples=50)
@given(st.binary(max_size=60) | PLAIN.map(pickle.dumps).flatmap(
    lambda data: st.integers(0, len(data) - 1).map(lambda n: data[:n])))
def test_any_bytes_are_read_or_refused(data):
    try:
        read_plain_pickle(data)
    except DataError as error:
        assert "\n" not in str(error)


def nanogpt_folder(directory, text):
    """A folder as nanoGPT's data/shakespeare_char/prepare.py leaves it."""
    characters = sorted(set(text))
    stoi = {c: i for i, c in enumerate(characters)}
    cut = int(len(text) * 0.9)
    directory.mkdir()
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        np.array([stoi[c] for c in part], np.uint16).tofile(directory / f"{split}.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": stoi}
    (directory / "meta.pkl").write_bytes(pickle.dumps(meta))


def test_nanogpts_characters_become_a_dataset(tmp_path, capsys, sources):
    nanogpt_folder(tmp_path / "x", sources[0])
    assert "say what they hold" in refusal(open_dataset, "x", tmp_path)
    convert_nanogpt_meta.main([str(tmp_path / "x")])
    d = open_dataset("x", tmp_path)
    cut = int(len(sources[0]) * 0.9)
    assert d.meta["tokenizer"] == CharTokenizer(sources[0]).to_meta()
    assert CharTokenizer(d.meta["tokenizer"]["characters"]).decode(d.shards["val"][0]) == sources[0][cut:]
    assert d.meta["splits"]["val"]["bytes"] == len(sources[0][cut:].encode())
    assert f"vocabulary {d.vocab_size}" in capsys.readouterr().out
    assert "without meta.json" in refusal(convert_nanogpt_meta.main, [str(tmp_path / "x")])


def test_nanogpts_byte_pairs_become_a_dataset(tmp_path, gpt2):
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
    ({"itos": {0: "ab"}}, "something else than characters"), ({"itos": {0: "b", 1: "a"}}, "order of their code points"),
    ({"itos": {0: Hostile()}}, "has the instruction"), (b"not a pickle", "is not a whole pickle"),
])
def test_a_meta_pkl_that_is_not_nanogpts_is_one_line_and_writes_nothing(tmp_path, meta, words):
    nanogpt_folder(tmp_path / "x", "ab" * 30)
    (tmp_path / "x/meta.pkl").write_bytes(meta if type(meta) is bytes else pickle.dumps(meta))
    message = refusal(convert_nanogpt_meta.main, [str(tmp_path / "x")])
    assert message.startswith(f"{tmp_path}/x/meta.pkl: ") and words in message
    assert not (tmp_path / "x/meta.json").exists()
