"""A tokenizer of this project as the files that transformers loads: tokenizer.json and tokenizer_config.json.

Every tokenizer becomes a tokenizer.json of the `tokenizers` library. It must encode a sample text to the same ids as
the original, or it is not written. To add a tokenizer: a function from it to a `tokenizers.Tokenizer`, and a line in
CONVERTERS.
"""

import itertools
import json
from collections.abc import Mapping
from typing import Any

from blockgpt.data.tokenizer import (
    HFTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    from_meta,
    unpack_bytes,
)
from blockgpt.errors import DataError, require_package
from blockgpt.huggingface.source import SAMPLE_TEXT

BYTE_EOT = "<|endoftext|>"


def tokenizer_files(meta: Mapping[str, Any], context: int, chat_template: str | None = None
                    ) -> tuple[dict[str, bytes], dict[str, Any], list[str]]:
    """({file name: content}, ids for config.json, warnings) of a tokenizer.

    Args:
        meta: its entry in meta.json.
        context: tokens that the model can see.
        chat_template: for tokenizer_config.json.
    """
    try:
        ours = from_meta(dict(meta))
        converted = CONVERTERS[ours.name](ours)
    except DataError as error:
        return {}, {}, [f"no tokenizer is written: {error}"]
    content = converted.to_str() if not isinstance(converted, bytes) else converted.decode("utf-8-sig")
    text = readable_sample(ours)
    if require_package("tokenizers").Tokenizer.from_str(content).encode(text, add_special_tokens=False).ids != \
            list(ours.encode(text)):
        return {}, {}, ["no tokenizer is written: its tokenizer.json would encode text to other ids"]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context,
                              "clean_up_tokenization_spaces": False}
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": ours.eot, "pad_token_id": None}
    if ours.eot is not None:
        config["eos_token"] = BYTE_EOT if ours.name == "byte" else ours.eot_text
    if chat_template:
        config["chat_template"] = chat_template
    files = {"tokenizer.json": content.encode(),
             "tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
    if isinstance(ours, SentencePieceTokenizer):
        files["tokenizer.model"] = unpack_bytes(ours.model)
    return files, ids, []


def readable_sample(tokenizer: Tokenizer) -> str:
    """The part of a sample text that a tokenizer can encode."""
    def is_encodable(c: str) -> bool:
        try:
            return bool(tokenizer.encode(c))
        except DataError:
            return False

    try:
        tokenizer.encode(SAMPLE_TEXT)
        return SAMPLE_TEXT
    except DataError:
        return "".join(c for c in SAMPLE_TEXT if is_encodable(c))


def byte_alphabet() -> dict[int, str]:
    """{byte: the character that stands for it in byte-level tokenizers}: GPT-2's, of printable characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], pattern: str | None) -> Any:
    """A byte-level BPE; text is split by `pattern` first."""
    tokenizers = require_package("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    steps = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if pattern is not None:
        steps.insert(0, tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def add_special(tokenizer: Any, texts: Mapping[str, int]) -> Any:
    """The tokenizer with special tokens, whose ids follow its vocabulary in order."""
    special = require_package("tokenizers").AddedToken
    tokenizer.add_special_tokens([special(text, special=True, normalized=False)
                                  for text, _ in sorted(texts.items(), key=lambda item: item[1])])
    return tokenizer


def from_bytes(ours: Tokenizer) -> Any:
    """UTF-8 bytes, and the end-of-text token after them."""
    tokenizer = byte_level({character: byte for byte, character in byte_alphabet().items()}, [], None)
    return add_special(tokenizer, {BYTE_EOT: 256})


def from_characters(ours: Any) -> Any:
    """One id for each character."""
    tokenizers = require_package("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(ours.ids)))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return tokenizer


def from_tiktoken(ours: Any) -> Any:
    """Ranks: a token of several bytes is the merge of the two that tiktoken joins last."""
    assert isinstance(ours, TiktokenTokenizer)
    ranks: dict[bytes, int] = ours.bpe._mergeable_ranks
    alphabet = byte_alphabet()

    def text(token: bytes) -> str:
        return "".join(alphabet[b] for b in token)

    merges = [(rank, tuple(map(text, last_merge(token, ranks)))) for token, rank in ranks.items() if len(token) > 1]
    tokenizer = byte_level({text(token): rank for token, rank in ranks.items()},
                           [(a, b) for _, (a, b) in sorted(merges)], ours.bpe._pat_str)
    return add_special(tokenizer, ours.bpe._special_tokens)


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens from which `token` is merged: those that are left when only lower ranks are merged."""
    tokens = [bytes([b]) for b in token]
    while len(tokens) > 2:
        _, i = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(itertools.pairwise(tokens)))
        tokens[i:i + 2] = [tokens[i] + tokens[i + 1]]
    return tokens[0], tokens[1]


def from_sentencepiece(ours: Any) -> Any:
    """A SentencePiece BPE or unigram model with byte fallback and without a normaliser that changes text."""
    assert isinstance(ours, SentencePieceTokenizer)
    tokenizers = require_package("tokenizers")
    model = require_package("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(unpack_bytes(ours.model))
    vocabulary = [(p.piece, p.score) for p in model.pieces]
    unknown = next((i for i, p in enumerate(model.pieces) if p.type == p.UNKNOWN), None)
    fallback = model.trainer_spec.byte_fallback
    if model.trainer_spec.model_type == model.trainer_spec.UNIGRAM:
        core = tokenizers.models.Unigram(vocabulary, unknown, fallback)
    else:
        vocab = {text: i for i, (text, _) in enumerate(vocabulary)}
        normal = {p.piece: i for i, p in enumerate(model.pieces) if p.type in (p.NORMAL, p.USER_DEFINED)}
        merges = [(-vocabulary[i][1], i, vocab[text[:n]], text[:n], text[n:]) for text, i in normal.items()
                  for n in range(1, len(text)) if text[:n] in vocab and text[n:] in vocab]
        unk_token = None if unknown is None else vocabulary[unknown][0]
        core = tokenizers.models.BPE(vocab, [(a, b) for *_, a, b in sorted(merges)], fuse_unk=True,
                                     byte_fallback=fallback, unk_token=unk_token)
    tokenizer = tokenizers.Tokenizer(core)
    prefix = model.normalizer_spec.add_dummy_prefix
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    tokenizer.normalizer = normalizers.Sequence([*([normalizers.Prepend("▁")] if prefix else []),
                                                 normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    special = {p.piece: i for i, p in enumerate(model.pieces) if p.type in (p.CONTROL, p.UNKNOWN)}
    return add_special(tokenizer, special)


def from_tokenizer_json(ours: Any) -> bytes:
    """The file that it was read from, unchanged."""
    assert isinstance(ours, HFTokenizer)
    return unpack_bytes(ours.json)


CONVERTERS = {"byte": from_bytes, "char": from_characters, "tiktoken": from_tiktoken,
              "sentencepiece": from_sentencepiece, "hf": from_tokenizer_json}
