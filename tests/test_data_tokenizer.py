"""What the tokenizers promise: text comes back whole, mistakes name the character."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tokenizer import ByteTokenizer, CharTokenizer, from_meta
from errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # what UTF-8 can hold


def one_line(raised):
    assert "\n" not in str(raised.value)
    return str(raised.value)


@given(TEXT)
def test_bytes_round_trip(text):
    t = ByteTokenizer()
    ids = t.encode(text)
    assert ids == list(text.encode()) and t.decode(ids) == text
    assert all(0 <= i < t.vocab_size for i in ids) and t.eot not in ids and t.eot < t.vocab_size


@given(TEXT)
def test_chars_round_trip(text):
    t = CharTokenizer(text)
    ids = t.encode(text)
    assert t.decode(ids) == text and all(0 <= i < t.vocab_size for i in ids)
    assert t.vocab_size == len(set(text)) and t.eot is None


@given(TEXT)
def test_a_tokenizer_survives_meta_json(text):
    for t in (ByteTokenizer(), CharTokenizer(text)):
        again = from_meta(json.loads(json.dumps(t.to_meta())))
        assert type(again) is type(t) and again.vocab_size == t.vocab_size and again.encode(text) == t.encode(text)


@given(st.lists(st.integers(0, 400)))
def test_decoding_drops_what_stands_for_no_text_and_never_fails(ids):
    t = ByteTokenizer()
    text = bytes(i for i in ids if i < 256).decode(errors="replace")
    assert t.decode(ids) == t.decode(np.array(ids, np.int64)) == text
    assert CharTokenizer("ab").decode(ids) == "".join("ab"[i] for i in ids if i < 2)


def test_character_ids_follow_code_points():
    assert CharTokenizer("banana\n").encode("\nabn") == [0, 1, 2, 3]


def test_an_unknown_character_is_named():
    with pytest.raises(DataError) as raised:
        CharTokenizer("abc\n").encode("abc€")
    assert "'€'" in one_line(raised)


def test_a_lone_surrogate_is_named():
    with pytest.raises(DataError) as raised:
        ByteTokenizer().encode("ab\udcff")
    assert "udcff" in one_line(raised) and "character 2" in one_line(raised)


@pytest.mark.parametrize("meta, word", [({"name": "bite"}, "did you mean byte?"), ({}, "None"),
                                        ({"name": "char"}, "char"), ({"name": "byte", "merges": []}, "merges"),
                                        ({"name": "char", "characters": 3}, "characters")])
def test_meta_that_describes_no_tokenizer_is_one_line(meta, word):
    with pytest.raises(DataError) as raised:
        from_meta(meta)
    assert word in one_line(raised)
