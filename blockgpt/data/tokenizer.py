"""Text to token ids and back.

A tokenizer has `name`, `vocab_size`, `eot` (the id that ends a document, or None), `encode(text)`, `decode(ids)` and
`to_meta()`, which meta.json and checkpoints keep and `from_meta` reads: a tokenizer that was trained is kept whole,
so that a run can be sampled after its dataset is gone. What `encode` accepts, `decode` gives back to the letter; what
a tokenizer cannot give back is refused in one line, since bits per byte would count bytes that no token stands for.
To add one: a class with these and a line in `TOKENIZERS`. Torch is never imported.
"""

import base64
import binascii
import hashlib
import zlib
from pathlib import Path

import numpy as np

from blockgpt.errors import DataError, UserError, did_you_mean, first_line, require_package, short_repr

ENCODINGS = ("gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base")  # tiktoken's, fetched once, then cached
# How an exported SentencePiece BPE is split before merging: in front of spaces, across which it has no pieces either.
SPACES_AND_WORD = r" *[^ ]+| +"
UNNAMED = "unnamed"  # the tokenizer of bare token files of which only the vocabulary's size is known
# The names under which tokenizer.json files have a token that ends a document, the most specific first.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "[EOS]", "[SEP]")


class Tokenizer:
    """What the tokenizers share. `encode_array` is `encode` into an array, for text in bulk."""

    eot = None

    def encode_array(self, text):
        """str -> 1-d array of unsigned ids."""
        return np.array(self.encode(text), np.uint32)

    def to_meta(self):
        return {"name": self.name}


def encode_utf8(text):
    """The text as UTF-8 bytes; `DataError` for a lone surrogate, which UTF-8 cannot hold."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the text has {text[error.start]!r} at character {error.start}, which is not "
                        "Unicode text (give it as UTF-8)") from None


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, ids 0 to 255, and an end-of-text token, 256."""

    name, vocab_size, eot = "byte", 257, 256

    def encode(self, text):
        """str -> list of ids. `DataError` for a lone surrogate."""
        return list(encode_utf8(text))

    def encode_array(self, text):
        return np.frombuffer(encode_utf8(text), np.uint8)

    def decode(self, ids):
        """ids -> str; bytes that are no UTF-8 become U+FFFD, ids without a byte (eot, padding) vanish."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


class CharTokenizer(Tokenizer):
    """One id for each different character of `characters` (any text), in code point order. No end-of-text token."""

    name = "char"

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


class TiktokenTokenizer(Tokenizer):
    """Byte-pair encoding by tiktoken: one of its `ENCODINGS`, or `ranks` in its file format.

    ranks: lines of "base64-token rank", packed by `pack_bytes`. pattern: the regular expression that splits the text
    before pairs are merged. Such a vocabulary gets its end-of-text token behind its last rank. Text that looks like
    a special token is text.
    """

    name = "tiktoken"

    def __init__(self, encoding=None, ranks=None, pattern=SPACES_AND_WORD):
        tiktoken = require_package("tiktoken")
        self.encoding, self.ranks, self.pattern = encoding, ranks, pattern
        if ranks is None:
            if encoding not in ENCODINGS:
                raise DataError(f"tiktoken's encoding {short_repr(encoding)} is unknown{did_you_mean(encoding, ENCODINGS)}")
            try:
                self.bpe = tiktoken.get_encoding(encoding)
            except (OSError, ValueError) as error:  # no network, or a damaged cache
                raise DataError(f"tiktoken cannot fetch {encoding!r}: {first_line(error)} (fetch it where there is a "
                                "network and set TIKTOKEN_CACHE_DIR to the folder that holds it)") from None
        else:
            merges = parse_ranks(unpack_bytes(ranks))
            self.bpe = tiktoken.Encoding("ranks", pat_str=pattern, mergeable_ranks=merges,
                                         special_tokens={"<|endoftext|>": max(merges.values()) + 1})
        self.vocab_size, self.eot = self.bpe.n_vocab, self.bpe.eot_token
        self.n_text = len(self.bpe.token_byte_values())  # the ids below are text, those from here on special or unused

    def encode(self, text):
        """str -> list of ids. `DataError` for a lone surrogate."""
        encode_utf8(text)
        return self.bpe.encode_ordinary(text)

    def encode_array(self, text):
        encode_utf8(text)
        return self.bpe.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids):
        """ids -> str; bytes that are no UTF-8 become U+FFFD, ids that are not text (eot, padding) vanish."""
        return self.bpe.decode([int(i) for i in ids if 0 <= i < self.n_text])

    def to_meta(self):
        if self.ranks is None:
            return {"name": self.name, "encoding": self.encoding}
        return {"name": self.name, "ranks": self.ranks, "pattern": self.pattern}


class RoundTripTokenizer(Tokenizer):
    """A tokenizer whose library may change the text on the way: `encode` decodes what it made and compares."""

    def encode(self, text):
        """str -> list of ids. `DataError` for text that would not come back to the letter."""
        encode_utf8(text)
        ids = self.ids_of(text)
        back = self.decode(ids)
        if back != text:
            at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b),
                      min(len(text), len(back)))
            raise DataError(f"the tokenizer does not give the text back: at character {at}, {text[at:at + 20]!r} comes "
                            f"back as {back[at:at + 20]!r} (use one without normalisation and with byte fallback)")
        return ids


class SentencePieceTokenizer(RoundTripTokenizer):
    """A SentencePiece model, such as tools/train_tokenizer makes or LLaMA's tokenizer.model.

    model: the content of the .model file, packed by `pack_bytes`. Its end-of-sentence piece, if any, ends documents.
    Refused: U+2581, which stands for the space inside; whatever else the model's normaliser changes.
    """

    name = "sentencepiece"

    def __init__(self, model):
        sentencepiece = require_package("sentencepiece")
        self.model = model
        content = unpack_bytes(model)
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(f"not a SentencePiece model: {first_line(error)}") from None
        if not content:  # which the library takes for no argument at all
            raise DataError("not a SentencePiece model: it is empty")
        self.vocab_size = self.pieces.vocab_size()
        self.eot = self.pieces.eos_id() if self.pieces.eos_id() >= 0 else None

    def ids_of(self, text):
        return self.pieces.encode(text)

    def decode(self, ids):
        """ids -> str; bytes that are no UTF-8 become U+FFFD, ids that are not text (eot, padding) vanish."""
        return self.pieces.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def to_meta(self):
        return {"name": self.name, "model": self.model}


class HFTokenizer(RoundTripTokenizer):
    """A Hugging Face tokenizer.json, read by `tokenizers`.

    json: its content, packed by `pack_bytes`. eot: the token that ends documents; None: the first of `END_OF_TEXT` that
    the vocabulary has. Text that looks like a special token is text. Refused: what its normaliser changes.
    """

    name = "hf"

    def __init__(self, json, eot=None):
        tokenizers = require_package("tokenizers")
        self.json = json
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(unpack_bytes(json).decode("utf-8"))
        except UnicodeDecodeError:
            raise DataError("not a tokenizer.json: it is not UTF-8 text") from None
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"not a tokenizer.json: {first_line(error)}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self.vocab_size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        known = [t for t in ((eot,) if eot else END_OF_TEXT) if self.tokenizer.token_to_id(t) is not None]
        if eot and not known:
            raise DataError(f"the vocabulary has no token {short_repr(eot)} to end documents with")
        self.eot_token = known[0] if known else None
        self.eot = self.tokenizer.token_to_id(self.eot_token) if known else None

    def ids_of(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """ids -> str; special tokens (eot) and ids beyond the vocabulary (padding) vanish."""
        return self.tokenizer.decode([int(i) for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=True)

    def to_meta(self):
        return {"name": self.name, "json": self.json, "eot": self.eot_token}


TOKENIZERS = {cls.name: cls for cls in
              (ByteTokenizer, CharTokenizer, TiktokenTokenizer, SentencePieceTokenizer, HFTokenizer)}


def from_meta(meta):
    """The tokenizer that `meta` (the "tokenizer" entry of a meta.json) describes. `DataError` if there is none."""
    arguments = dict(meta)
    name = arguments.pop("name", None)
    if name == UNNAMED:
        raise DataError("nobody named the tokenizer of these token files (train with --tokenizer=… instead of "
                        "--vocab_size to have text)")
    if name not in TOKENIZERS:
        raise DataError(f"tokenizer {name!r} is unknown{did_you_mean(name, TOKENIZERS)}")
    try:
        return TOKENIZERS[name](**arguments)
    except TypeError as error:
        raise DataError(f"tokenizer {name!r} cannot be made of {sorted(arguments)}: {error} "
                        "(prepare the dataset again)") from None


def load_tokenizer(spec):
    """The tokenizer that a user names: "byte", one of `ENCODINGS`, or a file.

    Files: *.model (SentencePiece), *.json (Hugging Face), *.tiktoken (ranks, split by `SPACES_AND_WORD`). "char"
    needs text to take its characters from and is not made here. `DataError` if there is no such tokenizer.
    """
    if spec == "byte":
        return ByteTokenizer()
    if spec in ENCODINGS:
        return TiktokenTokenizer(spec)
    readers = {".model": SentencePieceTokenizer, ".json": HFTokenizer, ".tiktoken":
               lambda content: TiktokenTokenizer(ranks=content)}
    read = readers.get(Path(spec).suffix)
    if read is None:
        raise DataError(f"tokenizer {short_repr(spec)} is unknown{did_you_mean(spec, ('byte', *ENCODINGS))}, or a file: "
                        f"{', '.join('*' + suffix for suffix in readers)}")
    try:
        content = Path(spec).read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer {spec}: cannot be read: {error.strerror}") from None
    try:
        return read(pack_bytes(content))
    except DataError as error:
        raise DataError(f"tokenizer {spec}: {error}") from None


def describe_tokenizer(meta):
    """A tokenizer's entry in meta.json in a few words: its name, and what tells it from others of that name."""
    content = next((meta[k] for k in ("model", "ranks", "json") if isinstance(meta.get(k), str)), None)
    if content is not None:
        return f"{meta['name']} {hashlib.sha256(content.encode()).hexdigest()[:8]}"
    return str(meta.get("encoding") or meta.get("name"))


def pack_bytes(content):
    """bytes -> str that JSON can hold."""
    return base64.b64encode(zlib.compress(content, 9)).decode("ascii")


def unpack_bytes(text):
    """What was packed; `DataError` if this is nothing of the kind."""
    try:
        return zlib.decompress(base64.b64decode(text, validate=True))
    except (TypeError, ValueError, binascii.Error, zlib.error):
        raise DataError("the tokenizer's content in the JSON is damaged (prepare the dataset again)") from None


def parse_ranks(content):
    """{token bytes: rank} of a .tiktoken file. `DataError` unless its ranks count up from 0, every byte among them."""
    try:
        pairs = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise DataError("not a .tiktoken file: a line is not a base64 token and its rank") from None
    if sorted(ranks.values()) != list(range(len(pairs))) or not all(bytes([b]) in ranks for b in range(256)):
        raise DataError("not a .tiktoken file: its ranks do not count up from 0, or a byte has none")
    return ranks


def to_ranks(tokenizer):
    """The content of a .tiktoken file that splits text as this SentencePiece BPE model does.

    Both merge the best-ranked neighbours first, tiktoken from bytes on, SentencePiece from characters on. So the
    bytes come first, then what joins them to characters, then the pieces in their order. Only text with characters
    that the model has not seen can differ: they share tokens for their first bytes. `UserError` for a unigram model.
    """
    model = require_package("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(unpack_bytes(tokenizer.model))
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise UserError("only a BPE model can be exported to tiktoken's format: others have no merges (--model bpe)")
    if model.trainer_spec.treat_whitespace_as_suffix or model.normalizer_spec.add_dummy_prefix:
        raise UserError("a model that moves or adds spaces cannot be exported to tiktoken's format (train one here)")
    normal = [p for p in model.pieces if p.type == p.NORMAL]
    pieces = [p.piece.replace("▁", " ").encode() for p in sorted(normal, key=lambda p: -p.score) if len(p.piece) > 1]
    characters = [p.piece.replace("▁", " ").encode() for p in normal if len(p.piece) == 1]
    beginnings = [c[:n] for c in sorted(characters) for n in range(2, len(c) + 1)]
    tokens = dict.fromkeys([*(bytes([b]) for b in range(256)), *beginnings, *pieces])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


