"""Text to token ids and back.

A tokenizer has `name`, `vocab_size`, `eot` (the id that ends a document, or None), `encode(text)`,
`decode(ids)` and `to_meta()`, which meta.json keeps and `from_meta` reads. To add one: a class with these
and a line in `TOKENIZERS`. Torch is never imported.
"""

from errors import DataError, did_you_mean


class ByteTokenizer:
    """UTF-8 bytes, ids 0 to 255, and an end-of-text token, 256."""

    name, vocab_size, eot = "byte", 257, 256

    def encode(self, text):
        """str -> list of ids. `DataError` for a lone surrogate, which UTF-8 cannot hold."""
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise DataError(f"the text has {text[error.start]!r} at character {error.start}, which is not "
                            "Unicode text (give it as UTF-8)") from None

    def decode(self, ids):
        """ids -> str; bytes that are no UTF-8 become U+FFFD, ids without a byte (eot, padding) vanish."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def to_meta(self):
        return {"name": self.name}


class CharTokenizer:
    """One id for each different character of `characters` (any text), in code point order. No end-of-text token."""

    name, eot = "char", None

    def __init__(self, characters):
        self.characters = "".join(sorted(set(characters)))
        self.vocab_size = len(self.characters)
        self.ids = {c: i for i, c in enumerate(self.characters)}

    def encode(self, text):
        """str -> list of ids. `DataError` names a character that the vocabulary lacks."""
        try:
            return [self.ids[c] for c in text]
        except KeyError as error:
            raise DataError(f"the character {error.args[0]!r} is not among the {self.vocab_size} of this vocabulary "
                            f"({self.characters!r:.200})") from None

    def decode(self, ids):
        """ids -> str; ids beyond the vocabulary (padding) vanish."""
        return "".join(self.characters[i] for i in ids if 0 <= i < self.vocab_size)

    def to_meta(self):
        return {"name": self.name, "characters": self.characters}


TOKENIZERS = {cls.name: cls for cls in (ByteTokenizer, CharTokenizer)}


def from_meta(meta):
    """The tokenizer that `meta` (the "tokenizer" entry of a meta.json) describes. `DataError` if there is none."""
    arguments = dict(meta)
    name = arguments.pop("name", None)
    if name not in TOKENIZERS:
        raise DataError(f"tokenizer {name!r} is unknown{did_you_mean(name, TOKENIZERS)}")
    try:
        return TOKENIZERS[name](**arguments)
    except TypeError as error:
        raise DataError(f"tokenizer {name!r} cannot be made of {sorted(arguments)}: {error} "
                        "(prepare the dataset again)") from None
