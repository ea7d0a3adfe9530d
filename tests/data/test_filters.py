"""Filters: each one keeps and removes the documents that its name says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgpt.data.filters import (
    FILTERS,
    character_fraction,
    compile_filters,
    detect_language,
    first_failing_filter,
    parse_filters,
    repeated_line_fraction,
    repeated_ngram_fraction,
)
from blockgpt.errors import UserError

PROSE = {"en": "The house that was built on the hill is not for sale, and it was the last of them.",
         "de": "Das Haus, das auf dem Hügel steht, ist nicht zu verkaufen, und es war das letzte von ihnen.",
         "fr": "La maison qui est sur la colline n'est pas à vendre, et les gens ne sont pas dans le jardin.",
         "es": "La casa que se construyó en la colina no está a la venta, y era la última de ellas para el rey.",
         "pl": "Dom, który stoi na wzgórzu, nie jest na sprzedaż i był to ostatni z nich, ale się tym nie martwi."}


@pytest.mark.parametrize("name, value, passes, fails", [
    ("min_chars", 5, "12345", "1234"), ("max_chars", 5, "12345", "123456"),
    ("max_repeated_lines", 0.3, "a\nb\nc\na", "a\na\nb\nb"),
    ("max_repeated_words", 0.2, "a b c d e f g h", "a b " * 20),
    ("min_letters", 0.5, "ab1 2", "a1 23"), ("max_digits", 0.2, "abcd1", "abc12"),
    ("max_symbols", 0.2, "abcd.", "a{}.;"), ("max_control", 0.1, "a" * 9 + "\x00", "ab\x00"),
    ("language", "en", PROSE["en"], PROSE["de"]), ("callable", str.islower, "low", "UP"),
    ("callable", "keyword:iskeyword", "while", "whilst"),
])
def test_a_filter_keeps_and_removes(name, value, passes, fails):
    filters = compile_filters({name: value})
    assert first_failing_filter(filters, passes) is None and first_failing_filter(filters, fails) == name


def test_every_filter_is_tested_above():
    mark = test_a_filter_keeps_and_removes.pytestmark[0]
    assert {row[0] for row in mark.args[1]} == set(FILTERS)


def test_the_first_failing_filter_is_named():
    assert first_failing_filter(compile_filters({"min_chars": 3, "max_digits": 0.5}), "12") == "min_chars"
    assert first_failing_filter(compile_filters({"max_digits": 0.5, "min_chars": 3}), "12") == "max_digits"


@pytest.mark.parametrize("language", PROSE)
def test_the_language_is_detected_by_common_words(language):
    assert detect_language(PROSE[language]) == language


@pytest.mark.parametrize("text", ["", "123 456", "xyzzy plugh frobnicate", "日本語の文章です"])
def test_text_without_common_words_has_no_language(text):
    assert detect_language(text) is None


@settings(max_examples=30)
@given(st.text(max_size=50))
def test_fractions_are_between_0_and_1(text):
    for value in (repeated_line_fraction(text), repeated_ngram_fraction(text), character_fraction(text, str.isalpha)):
        assert 0 <= value <= 1
    assert all(type(keeps(text, "en" if name == "language" else len if name == "callable" else 0.5)) is bool
               for name, keeps in FILTERS.items())


def test_filter_settings_are_parsed():
    assert parse_filters(["min_chars=200", "language=en", "callable=keyword:iskeyword"]) == \
        {"min_chars": 200.0, "language": "en", "callable": "keyword:iskeyword"}
    assert parse_filters(None) == {}


@pytest.mark.parametrize("setting, words", [
    ("min_char=2", "did you mean min_chars?"), ("min_chars", "'' is not a number"), ("min_chars=two", "'two'"),
    ("language=klingon", "'klingon' is unknown"), ("callable=nowhere:f", "nowhere"),
    ("callable=keyword:nothing", "nothing"), ("callable=", "module:function"),
])
def test_an_invalid_setting_is_a_one_line_error(setting, words):
    with pytest.raises(UserError) as raised:
        parse_filters([setting])
    assert words in str(raised.value) and "\n" not in str(raised.value)
