"""Which documents are kept: each filter a function of (text, limit), named and counted.

To add one: a function and a line in `FILTERS`. It returns whether the text stays.
"""

import importlib
import re

from blockgpt.errors import UserError, did_you_mean, short_repr

# The commonest words of a language make up a third of its running text, and few of them are another's.
COMMON_WORDS = {language: frozenset(words.split()) for language, words in {
    "de": "der die das und ist nicht mit ein eine zu den von sich auf für dem im auch es wie werden bei",
    "en": "the of and to in is that it was for on with as be at by this are or from have not you which",
    "es": "el la los las de que y en un una es por con no para se del al lo como más pero su",
    "fr": "le la les des et est une un que dans pour qui ne pas sur au avec il du ce plus par sont",
    "it": "il di che è la per un una non con del della sono nel gli le da si come anche alla più",
    "nl": "de het een van en is dat niet op te zijn voor met die aan er ook als bij maar om",
    "pl": "i w na z się nie do to jest że o jak po od za przez ale był dla są tym",
    "pt": "o a os as de que e em um uma é não para com por se do da mais como mas dos",
}.items()}
WORD = re.compile(r"[^\W\d_]+")


def repeated_lines(text):
    """The share of the characters that stand in lines which stood in the text before."""
    seen, repeated, total = set(), 0, 0
    for line in filter(None, map(str.strip, text.splitlines())):
        total += len(line)
        if line in seen:
            repeated += len(line)
        seen.add(line)
    return repeated / total if total else 0.0


def repeated_words(text, n=5):
    """The share of runs of n words that stood in the text before."""
    words = text.split()
    runs = max(0, len(words) - n + 1)
    return 1 - len({tuple(words[i:i + n]) for i in range(runs)}) / runs if runs else 0.0


def share(text, belongs):
    """The share of the characters, spaces apart, of which `belongs` is true."""
    solid = "".join(text.split())
    return sum(map(belongs, solid)) / len(solid) if solid else 0.0


def is_symbol(character):
    return not character.isalnum()


def is_control(character):
    return not character.isprintable()


def language_of(text):
    """The language of `COMMON_WORDS` whose words are the most frequent, None below one word in twelve."""
    words = [w.lower() for w in WORD.findall(text[:20_000])]
    hits = {language: sum(w in common for w in words) for language, common in COMMON_WORDS.items()}
    best = max(hits, key=hits.get)
    return best if words and hits[best] >= len(words) / 12 else None


FILTERS = {
    "min_chars": lambda text, n: len(text) >= n,
    "max_chars": lambda text, n: len(text) <= n,
    "max_repeated_lines": lambda text, most: repeated_lines(text) <= most,
    "max_repeated_words": lambda text, most: repeated_words(text) <= most,
    "min_letters": lambda text, least: share(text, str.isalpha) >= least,
    "max_digits": lambda text, most: share(text, str.isdigit) <= most,
    "max_symbols": lambda text, most: share(text, is_symbol) <= most,
    "max_control": lambda text, most: share(text, is_control) <= most,
    "language": lambda text, language: language_of(text) == language,
    "callable": lambda text, function: bool(function(text)),
}


def parse_filters(settings):
    """["min_chars=200", "language=en", "callable=module:function"] -> {name: value}; `UserError` if one is wrong."""
    filters = {}
    for setting in settings or ():
        name, _, value = setting.partition("=")
        if name not in FILTERS:
            raise UserError(f"--filter {short_repr(setting)}: no such filter{did_you_mean(name, FILTERS)}")
        if name == "language" and value not in COMMON_WORDS:
            raise UserError(f"--filter {setting}: {short_repr(value)} is unknown{did_you_mean(value, COMMON_WORDS)}")
        if name not in ("language", "callable"):
            try:
                value = float(value)
            except ValueError:
                raise UserError(f"--filter {short_repr(setting)}: {short_repr(value)} is not a number") from None
        filters[name] = value
    compile_filters(filters)  # a function that is not there is told now
    return filters


def compile_filters(filters):
    """{name: value} -> [(name, text -> whether it stays)]. A callable may be given as "module:function"."""
    return [(name, FILTERS[name], import_function(value) if name == "callable" else value) for name, value in filters.items()]


def import_function(function):
    """The function that "module:function" names."""
    if callable(function):
        return function
    module, _, name = function.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--filter callable={function}: {error} (module:function, importable from here)") from None


def first_failing_filter(filters, text):
    """The name of the first of the `compile_filters` filters that the text does not pass, or None."""
    return next((name for name, keeps, value in filters if not keeps(text, value)), None)
