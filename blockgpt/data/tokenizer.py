"""Tokenizers: text to token ids and back.

A tokenizer is a subclass of `Tokenizer`: `encode`, `decode` and `to_meta`. What `to_meta` returns is saved in meta.json
and in checkpoints, and `from_meta` builds the tokenizer from it: a trained tokenizer is saved complete, so that a run
can be sampled without its dataset. `decode(encode(text))` is `text`, or `encode` raises a `DataError`: bits per byte
would otherwise count bytes that no token represents.
To add one: a subclass and a line in `TOKENIZERS`. Torch is never imported.
"""

import base64
import binascii
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blockgpt.console import echo
from blockgpt.data.formats import read_file
from blockgpt.data.losses import library_errors
from blockgpt.errors import DataError, UserError, did_you_mean, first_line, require_package, short_repr
from blockgpt.files import exists, is_dir, list_dir, user_path

ENCODINGS = ("gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base")  # tiktoken's, downloaded once, then cached
# How an exported SentencePiece BPE splits text before merging: before spaces, which its tokens do not cross.
SPACES_AND_WORD = r" *[^ ]+| +"
UNNAMED = "unnamed"  # the tokenizer of bare token files, if only their vocabulary size is known
# The names of the end-of-text token in tokenizer.json files, the most specific first.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<|eos|>", "[EOS]",
               "[SEP]")
# Llama 3's tokenizer.model has the ranks alone. What it splits text by, and its tokens after the ranks, in their order:
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4)),
                  "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
                  *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)))


class Tokenizer:
    """The interface of every tokenizer.

    Attributes:
        name: of the class, a key of `TOKENIZERS`.
        vocab_size: token ids are 0 to vocab_size - 1.
        eot: the id that ends a document, or None.
        eot_text: what that token looks like in text, if it looks like anything.
        special: the names of tokens that can be chosen to end documents.
    """

    name: str
    vocab_size: int
    eot: int | None = None
    eot_text: str | None = None
    special: Sequence[str] = ()

    def encode(self, text: str) -> list[int]:
        """Text to ids. `DataError` for text that `decode` would not give back unchanged."""
        raise NotImplementedError

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` into a 1-d array of unsigned integers; subclasses make it fast for bulk text."""
        return np.array(self.encode(text), np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text. Ids without text (eot, padding) are dropped; bytes that are not UTF-8 become U+FFFD."""
        raise NotImplementedError

    def to_meta(self) -> dict[str, Any]:
        """The JSON-able arguments from which `from_meta` builds this tokenizer."""
        return {"name": self.name}


def encode_utf8(text: str) -> bytes:
    """The text as UTF-8 bytes; `DataError` for a lone surrogate, which UTF-8 cannot represent."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the text has {text[error.start]!r} at character {error.start}, which is not "
                        "Unicode text (give it as UTF-8)") from None


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, ids 0 to 255, and an end-of-text token, 256."""

    name = "byte"
    vocab_size = 257
    eot = 256

    def encode(self, text: str) -> list[int]:
        return list(encode_utf8(text))

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(encode_utf8(text), np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


class CharTokenizer(Tokenizer):
    """One id for each different character of `characters` (any text), in code point order. No end-of-text token."""

    name = "char"

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.vocab_size = len(self.characters)
        self.ids = {c: i for i, c in enumerate(self.characters)}

    def encode(self, text: str) -> list[int]:
        """Text to ids. `DataError` names a character that is not in the vocabulary."""
        try:
            return [self.ids[c] for c in text]
        except KeyError as error:
            raise DataError(f"the character {error.args[0]!r} is not among the {self.vocab_size} of this vocabulary "
                            f"({self.characters!r:.200})") from None

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[i] for i in ids if 0 <= i < self.vocab_size)

    def to_meta(self) -> dict[str, Any]:
        return {"name": self.name, "characters": self.characters}


class TiktokenTokenizer(Tokenizer):
    """Byte-pair encoding by tiktoken. Text that looks like a special token is encoded as text.

    Args:
        encoding: one of `ENCODINGS`; None with ranks.
        ranks: the content of a .tiktoken file (lines of "base64-token rank"), packed by `pack_bytes`. The id after the
            last rank becomes the end-of-text token.
        pattern: with ranks, the regular expression that splits the text before pairs are merged.
        special: with ranks, the tokens that follow them.
        eot: the special token that ends documents.
    """

    name = "tiktoken"

    def __init__(self, encoding: str | None = None, ranks: str | None = None, pattern: str = SPACES_AND_WORD,
                 special: Sequence[str] = ("<|endoftext|>",), eot: str | None = None) -> None:
        tiktoken = require_package("tiktoken")
        self.arguments: dict[str, Any] = {"encoding": encoding}
        if ranks is not None:
            self.arguments = {"ranks": ranks, "pattern": pattern}
        if ranks is not None and tuple(special) != ("<|endoftext|>",):
            self.arguments["special"] = list(special)
        if eot is not None:
            self.arguments["eot"] = eot
        if ranks is None:
            if encoding not in ENCODINGS:
                raise DataError(f"tiktoken's encoding {short_repr(encoding)} is unknown"
                                f"{did_you_mean(encoding, ENCODINGS)}")
            try:
                self.bpe = tiktoken.get_encoding(encoding)
            except (OSError, ValueError) as error:  # no network, or a damaged cache
                raise DataError(f"tiktoken cannot fetch {encoding!r}: {first_line(error)} (download it on a machine "
                                "with a network and set TIKTOKEN_CACHE_DIR to its folder)") from None
        else:
            merges = parse_ranks(unpack_bytes(ranks))
            with library_errors("not a .tiktoken file that can be used"):
                self.bpe = tiktoken.Encoding("ranks", pat_str=pattern, mergeable_ranks=merges,
                                             special_tokens={t: len(merges) + i for i, t in enumerate(special)})
        self.vocab_size, self.special = self.bpe.n_vocab, sorted(self.bpe.special_tokens_set)
        self.eot_text = "<|endoftext|>" if eot is None else eot
        if self.eot_text not in self.special:
            raise no_eot(self.eot_text, self.special)
        self.eot = self.bpe.encode_single_token(self.eot_text)
        self.n_text = len(self.bpe.token_byte_values())  # ids from here on are special or unused

    def encode(self, text: str) -> list[int]:
        encode_utf8(text)  # tiktoken would replace a lone surrogate
        with library_errors("tiktoken fails on the text"):
            return self.bpe.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        encode_utf8(text)
        with library_errors("tiktoken fails on the text"):
            return self.bpe.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        return self.bpe.decode([int(i) for i in ids if 0 <= i < self.n_text])

    def to_meta(self) -> dict[str, Any]:
        return {"name": self.name, **self.arguments}


class RoundTripTokenizer(Tokenizer):
    """A tokenizer whose library can change the text: `encode` decodes its ids and compares."""

    def encode_unchecked(self, text: str) -> list[int]:
        """Text to ids by the library."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        encode_utf8(text)
        with library_errors("the tokenizer fails on the text"):
            ids = self.encode_unchecked(text)
            decoded = self.decode(ids)
        if decoded != text:
            at = next((i for i, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b),
                      min(len(text), len(decoded)))
            raise DataError(f"the tokenizer changes the text: at character {at}, {text[at:at + 20]!r} is decoded as "
                            f"{decoded[at:at + 20]!r} (use one without normalisation and with byte fallback)")
        return ids


class SentencePieceTokenizer(RoundTripTokenizer):
    """A SentencePiece model: one that tools/train_tokenizer trained, LLaMA's tokenizer.model, ...

    `encode` refuses U+2581, which SentencePiece uses for the space, and whatever else the model's normaliser changes.

    Args:
        model: the content of the .model file, packed by `pack_bytes`.
        eot: the token that ends documents; None: its end-of-sentence token, if any.
    """

    name = "sentencepiece"

    def __init__(self, model: str, eot: str | None = None) -> None:
        sentencepiece = require_package("sentencepiece")
        self.model, self.eot_argument = model, eot
        content = unpack_bytes(model)
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(f"not a SentencePiece model: {first_line(error)}") from None
        if not content:  # the library treats it as an absent argument
            raise DataError("not a SentencePiece model: it is empty")
        self.vocab_size = self.processor.vocab_size()
        self.eot = self.processor.eos_id() if self.processor.eos_id() >= 0 else None
        self.special = [self.processor.id_to_piece(i) for i in range(self.vocab_size) if self.processor.is_control(i)]
        if eot is not None:
            if eot not in self.special:  # any other token is text
                raise no_eot(eot, self.special)
            self.eot = self.processor.piece_to_id(eot)
        self.eot_text = None if self.eot is None else self.processor.id_to_piece(self.eot)

    def encode_unchecked(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self.processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def to_meta(self) -> dict[str, Any]:
        eot = {} if self.eot_argument is None else {"eot": self.eot_argument}
        return {"name": self.name, "model": self.model, **eot}


class HFTokenizer(RoundTripTokenizer):
    """A Hugging Face tokenizer.json, read by `tokenizers`. Text that looks like a special token is encoded as text.

    `encode` refuses text that the normaliser changes.

    Args:
        json: the content of the file, packed by `pack_bytes`.
        eot: the token that ends documents; None: the first of `END_OF_TEXT` that the vocabulary has.
    """

    name = "hf"

    def __init__(self, json: str, eot: str | None = None) -> None:
        tokenizers = require_package("tokenizers")
        self.json = json
        try:
            content = unpack_bytes(json).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError("not a tokenizer.json: it is not UTF-8 text") from None
        with library_errors("not a tokenizer.json"):
            self.tokenizer = tokenizers.Tokenizer.from_str(content)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self.vocab_size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.special = [t.content for _, t in sorted(self.tokenizer.get_added_tokens_decoder().items())]
        self.eot_text = next((t for t in (END_OF_TEXT if eot is None else (eot,)) if self.is_separator(t)), None)
        if eot is not None and self.eot_text is None:
            raise no_eot(eot, self.special)
        self.eot = None if self.eot_text is None else self.tokenizer.token_to_id(self.eot_text)

    def is_separator(self, token: str) -> bool:
        """Whether the vocabulary has a token, and text never contains it."""
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            return False
        try:
            with library_errors(token):
                return token_id not in self.encode_unchecked(token)
        except DataError:  # as text, it cannot be encoded at all
            return True

    def encode_unchecked(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        text_ids = [int(i) for i in ids if 0 <= i < self.vocab_size and i != self.eot]
        return self.tokenizer.decode(text_ids, skip_special_tokens=True)

    def to_meta(self) -> dict[str, Any]:
        return {"name": self.name, "json": self.json, "eot": self.eot_text}


def no_eot(token: str, special: Sequence[str]) -> DataError:
    """The error for a token that cannot end documents; `special` can."""
    return DataError(f"{short_repr(token)} is no special token of the vocabulary, so it cannot end documents"
                     f"{did_you_mean(token, special)}")


TOKENIZERS: dict[str, Callable[..., Tokenizer]] = {
    cls.name: cls for cls in (ByteTokenizer, CharTokenizer, TiktokenTokenizer, SentencePieceTokenizer, HFTokenizer)}


def from_meta(meta: dict[str, Any]) -> Tokenizer:
    """Build the tokenizer that the "tokenizer" entry of a meta.json describes; `DataError` if it is not valid."""
    arguments = dict(meta)
    name = arguments.pop("name", None)
    if name == UNNAMED:
        raise DataError("the tokenizer of these token files is not known (train with --tokenizer=… instead of "
                        "--vocab_size to have text)")
    if name not in TOKENIZERS:
        raise DataError(f"tokenizer {name!r} is unknown{did_you_mean(name, TOKENIZERS)}")
    try:
        return TOKENIZERS[name](**arguments)
    except TypeError as error:
        raise DataError(f"tokenizer {name!r} cannot be built from {sorted(arguments)}: {error} "
                        "(prepare the dataset again)") from None


# Of a checkpoint's folder: the first that has an eos_token names the end of its documents.
TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def load_tokenizer(spec: str, eot: str | None = None) -> Tokenizer:
    """Load the tokenizer that a user names.

    Args:
        spec: "byte", one of `ENCODINGS`, or a file: *.model (SentencePiece, or Llama 3's ranks), *.json (Hugging Face),
            *.tiktoken (ranks, split by `SPACES_AND_WORD`), or a folder with one. "char" is not accepted: its characters
            are taken from the text.
        eot: the token that ends documents; None: the tokenizer's own.

    Raises:
        DataError: there is no such tokenizer, its file cannot be read, or it has no such token.
    """
    if spec in ("byte", "char") and eot is not None:
        raise DataError(f"--eot {eot}: the tokenizer {spec} has no tokens to choose from")
    if spec == "byte":
        return ByteTokenizer()
    more: dict[str, Any] = {} if eot is None else {"eot": eot}
    if spec in ENCODINGS:
        return TiktokenTokenizer(spec, **more)
    path = tokenizer_file(spec)
    try:
        content = read_file(path)
        named_in, named = checkpoint_eos(user_path(spec)) if eot is None else (path, None)
    except DataError as error:
        raise DataError(f"tokenizer {error}") from None
    build, unusable = TOKENIZER_FILES[path.suffix], None
    try:
        if named is not None:
            try:
                return build(content, {"eot": named})
            except DataError as error:  # the vocabulary has no such token, or text can contain it
                unusable = error
        tokenizer = build(content, more)
    except DataError as error:
        raise DataError(f"tokenizer {path}: {error}") from None
    if unusable is not None:
        end = "no token" if tokenizer.eot is None else repr(tokenizer.eot_text or tokenizer.eot)
        echo(f"warning: {named_in}: eos_token: {unusable}; documents end with {end} (--eot=TOKEN names another)",
             sys.stderr)
    return tokenizer


def checkpoint_eos(folder: Path) -> tuple[Path, str | None]:
    """(file, token): the end-of-sentence token that a checkpoint's folder names, and where; None if it names none."""
    for name in TOKEN_FILES:
        path = folder / name
        try:
            config = json.loads(read_file(path)) if exists(path) else {}
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: is not JSON: {first_line(error)}") from None
        token = config.get("eos_token") if isinstance(config, dict) else None
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text:
            return path, text
    return folder, None


def model_tokenizer(content: bytes, more: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a *.model file."""
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", content):
        arguments = {"pattern": LLAMA3_PATTERN, "special": LLAMA3_SPECIAL, "eot": "<|end_of_text|>", **more}
        return TiktokenTokenizer(ranks=pack_bytes(content), **arguments)
    return SentencePieceTokenizer(pack_bytes(content), **more)


TOKENIZER_FILES: dict[str, Callable[[bytes, dict[str, Any]], Tokenizer]] = {
    ".model": model_tokenizer, ".json": lambda content, more: HFTokenizer(pack_bytes(content), **more),
    ".tiktoken": lambda content, more: TiktokenTokenizer(ranks=pack_bytes(content), **more)}


def tokenizer_file(spec: str) -> Path:
    """The file of a tokenizer: the path itself, or the file in that folder."""
    path = user_path(spec)
    if is_dir(path):
        names = ("tokenizer.json", "tokenizer.model", *(p.name for p in list_dir(path, "*.tiktoken")))
        path = next((path / name for name in names if exists(path / name)), path)
        if is_dir(path):
            raise DataError(f"tokenizer {path}: the folder has no tokenizer.json, tokenizer.model or *.tiktoken")
    if path.suffix not in TOKENIZER_FILES:
        suffixes = ", ".join("*" + suffix for suffix in TOKENIZER_FILES)
        raise DataError(f"tokenizer {short_repr(spec)} is unknown{did_you_mean(spec, ('byte', *ENCODINGS))}, "
                        f"or a file: {suffixes}, or a folder with one")
    return path


def describe_tokenizer(meta: dict[str, Any]) -> str:
    """A short description of a tokenizer's entry in meta.json: its name, and the hash of a trained one."""
    content = next((meta[k] for k in ("model", "ranks", "json") if isinstance(meta.get(k), str)), None)
    if content is not None:
        return f"{meta['name']} {hashlib.sha256(content.encode()).hexdigest()[:8]}"
    return str(meta.get("encoding") or meta.get("name"))


def pack_bytes(content: bytes) -> str:
    """Compress bytes to a string for JSON."""
    return base64.b64encode(zlib.compress(content, 9)).decode("ascii")


def unpack_bytes(text: str) -> bytes:
    """The inverse of `pack_bytes`; `DataError` for a string that it did not write."""
    try:
        return zlib.decompress(base64.b64decode(text, validate=True))
    except (TypeError, ValueError, binascii.Error, zlib.error):
        raise DataError("the tokenizer's content in the JSON is damaged (prepare the dataset again)") from None


def parse_ranks(content: bytes) -> dict[bytes, int]:
    """{token bytes: rank} of a .tiktoken file; `DataError` unless ranks count up from 0 and every byte has one."""
    try:
        pairs = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise DataError("not a .tiktoken file: a line is not a base64 token and its rank") from None
    if sorted(ranks.values()) != list(range(len(pairs))) or not all(bytes([b]) in ranks for b in range(256)):
        raise DataError("not a .tiktoken file: its ranks do not count up from 0, or a byte has none")
    return ranks


def to_ranks(tokenizer: SentencePieceTokenizer) -> bytes:
    """Export a SentencePiece BPE model as the content of a .tiktoken file that splits text in the same way.

    Both libraries merge the best-ranked neighbours first; tiktoken begins with bytes, SentencePiece with characters.
    So the bytes come first, then the tokens that join bytes to characters, then SentencePiece's tokens in their order.
    Only text with characters that the model has not seen can differ: such characters can share tokens for their first
    bytes. `UserError` for a unigram model.
    """
    protobuf = require_package("sentencepiece.sentencepiece_model_pb2")
    model = protobuf.ModelProto.FromString(unpack_bytes(tokenizer.model))
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise UserError("only a BPE model can be exported to tiktoken's format: others have no merges "
                        "(train it with --model bpe)")
    if model.trainer_spec.treat_whitespace_as_suffix or model.normalizer_spec.add_dummy_prefix:
        raise UserError("a model that moves or adds spaces cannot be exported to tiktoken's format "
                        "(train one with tools.train_tokenizer)")
    normal = [p for p in model.pieces if p.type == p.NORMAL]
    merged = [p.piece.replace("▁", " ").encode() for p in sorted(normal, key=lambda p: -p.score) if len(p.piece) > 1]
    characters = [p.piece.replace("▁", " ").encode() for p in normal if len(p.piece) == 1]
    prefixes = [c[:n] for c in sorted(characters) for n in range(2, len(c) + 1)]
    tokens = dict.fromkeys([*(bytes([b]) for b in range(256)), *prefixes, *merged])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
