"""train_tokenizer: a tokenizer is trained and measured; a mistake is a one-line error."""

import json
import re

import pytest
from dataset_helpers import refusal
from prepare_helpers import MemoryPartition

from blockgpt.data.tokenizer import load_tokenizer
from blockgpt.errors import UserError
from tools import train_tokenizer


def test_a_tokenizer_is_trained_and_measured(tmp_path, capsys, sources):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in sources))
    train_tokenizer.main(["--input", str(tmp_path / "x.jsonl"), "--text_key=body", "--vocab_size=600", "--export_bpe",
                          f"--output={tmp_path}/t"])
    out = capsys.readouterr().out
    for suffix in ("model", "tiktoken"):
        assert re.search(rf"t\.{suffix}: \d+ tokens, \d\.\d+ bytes per token, [\d.]+ MB/s, coverage \d+\.\d+% "
                         r"\(on \d+ sentences held out of training\)", out)
    t = load_tokenizer(f"{tmp_path}/t.model")
    assert t.vocab_size == 600 and t.decode(t.encode(sources[0])) == sources[0]
    assert len(t.encode(sources[0])) < len(sources[0]) / 1.5


def test_documents_are_split_at_line_ends_and_none_is_lost(monkeypatch):
    monkeypatch.setattr(train_tokenizer, "SENTENCE_BYTES", 10)
    texts = ("short", "a line\nand another\nend", "x" * 35, "")
    chunks = list(train_tokenizer.sentences([MemoryPartition(texts)]))
    assert "".join(chunks) == "".join(texts) and max(map(len, chunks)) < 20
    assert "a line\nand anothe" in chunks  # a line longer than SENTENCE_BYTES is split


@pytest.mark.parametrize("flags, words", [
    (["--vocab_size=100"], "--vocab_size: 100 is out of range"), (["--coverage=2"], "--coverage: 2.0 is out of range"),
    (["--max_sentences=9"], "--max_sentences: 9 is out of range"),
    (["--vocab_size=100000"], "--vocab_size 100000: SentencePiece cannot train on this text"),
    (["--model=unigram", "--export_bpe"], "--export_bpe: needs --model bpe"),
    (["--output=/nowhere/t", "--vocab_size=100000"], "--output: /nowhere/t.model: cannot be written"),  # first
    (["--input=/nowhere/*.txt"], "/nowhere/*.txt: no such file"),
])
def test_a_tokenizer_that_cannot_be_trained_is_a_one_line_error(tmp_path, sources, flags, words):
    (tmp_path / "x.txt").write_text(sources[0])
    command = ["--input", str(tmp_path / "x.txt"), *flags]
    if not flags[0].startswith("--output"):  # a flag is given once
        command.append(f"--output={tmp_path}/t")
    assert words in refusal(train_tokenizer.main, command, error=UserError)
