"""The commands beside the data: a hostile pickle is refused, a dataset and a mixture are shown as they are."""

import json
import os
import pickle
import re

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgpt.data.dataset import open_dataset
from blockgpt.data.prepare import write_dataset
from blockgpt.data.tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer
from blockgpt.errors import DataError, UserError
from tools import analyze_mixture, convert_nanogpt_meta, inspect_data, train_tokenizer
from tools.convert_nanogpt_meta import read_plain_pickle


def refusal(action, *args):
    with pytest.raises(UserError) as raised:
        action(*args)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# nanoGPT's meta.pkl

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


# Looking


def test_inspect_shows_what_there_is(tmp_path, capsys):
    texts = ["aaaa bbb", "second document", "aaaa bbb", "zz"]
    write_dataset(tmp_path / "x", ByteTokenizer(), [("train", t) for t in texts] + [("val", "aé")], source="a test",
                  skipped={"empty": 7})
    inspect_data.main(["x", "--data_dir", str(tmp_path), "--block_size=8", "--windows=9", "--verify"])
    out = capsys.readouterr().out
    for words in ("byte, vocabulary 257", "left out when it was made: 7 empty", "every file has the digest",
                  "train: 4 documents, 37 tokens, 33 bytes in 1 file; 0.892 bytes per token",
                  "val: 1 documents, 4 tokens, 3 bytes", "97 'a'", "⏹", "median 8 tokens, longest 15, 1 duplicate",
                  "a|a|a|a| |b|b|b", "⏹|s|e|c|o|n|d| "):
        assert words in out
    assert re.search(r"97 'a' +8 +21.62%", out) and out.count("\nwindow") == 4


def test_inspect_finds_a_damaged_file(tmp_path, capsys, monkeypatch):
    from blockgpt.data import dataset
    write_dataset(tmp_path / "x", ByteTokenizer(), [("train", "abc" * 9), ("val", "abc")], source="a test")
    path = tmp_path / "x/train.bin"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    monkeypatch.setattr(dataset, "VERIFY_BYTES", 1)
    inspect_data.main(["x", "--data_dir", str(tmp_path), "--block_size=4"])  # nobody looked
    assert "is damaged" in refusal(inspect_data.main, ["x", "--data_dir", str(tmp_path), "--block_size=4", "--verify"])


def test_analyze_shows_what_a_mixture_will_serve(tmp_path, capsys):
    for name, n in (("a", 5000), ("b", 800)):
        write_dataset(tmp_path / name, ByteTokenizer(), [("train", "x" * n), ("val", "abc" * 50)], source="a test")
    (tmp_path / "mix.py").write_text("dataset_schedule = [(0, {'a': 3, 'b': 1}), (50, 'b')]\nblock_size = 16\n"
                                     f"batch_size = 4\nmax_iters = 60\ndata_dir = {str(tmp_path)!r}\n")
    analyze_mixture.main([str(tmp_path / "mix.py"), "--plot", str(tmp_path / "p.png")])
    out = capsys.readouterr().out
    assert re.search(r"a +2,400 +62.50% +5,001 +0.482 +0\n", out)
    assert re.search(r"b +1,440 +37.50% +801 +1.84 +656\n", out)
    assert "steps 0 to 50" in out and "75.00%" in out and "steps 50 to 60" in out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert refusal(analyze_mixture.main, [str(tmp_path / "mix.py"), "--plot=/nowhere/p.png"]) == (
        "--plot: /nowhere/p.png: cannot be written: No such file or directory")
    assert "needs a file" in refusal(analyze_mixture.main, [str(tmp_path / "mix.py"), "--plot"])


@pytest.mark.parametrize("name", ["balanced", "code", "math"])
def test_the_presets_name_datasets_that_can_be_made(name):
    from configurator import load_config
    (_, shares), = load_config([f"config/mix_{name}.py"]).phases()
    scripts = {p.parent.name for p in ROOT.glob("data/*/prepare.py")}
    assert {source.removesuffix("_gpt2") for source in shares} <= scripts
    assert sum(shares.values()) in (1, 3)


# Training a tokenizer


def test_a_tokenizer_is_trained_and_measured(tmp_path, capsys, sources):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in sources))
    train_tokenizer.main(["--input", str(tmp_path / "x.jsonl"), "--text_key=body", "--vocab_size=600", "--export_bpe",
                          f"--output={tmp_path}/t"])
    out = capsys.readouterr().out
    for suffix in ("model", "tiktoken"):
        assert re.search(rf"t\.{suffix}: \d+ tokens, \d\.\d+ bytes per token, [\d.]+ MB/s, coverage \d+\.\d+%", out)
    t = load_tokenizer(f"{tmp_path}/t.model")
    assert t.vocab_size == 600 and t.decode(t.encode(sources[0])) == sources[0]
    assert len(t.encode(sources[0])) < len(sources[0]) / 1.5


@pytest.mark.parametrize("flags, words", [
    (["--vocab_size=100"], "--vocab_size: 100 is out of range"), (["--coverage=2"], "--coverage: 2.0 is out of range"),
    (["--vocab_size=100000"], "--vocab_size 100000: SentencePiece cannot train on this text"),
    (["--model=unigram", "--export_bpe"], "--export_bpe: needs --model bpe"),
    (["--output=/nowhere/t", "--vocab_size=100000"], "--output: /nowhere/t.model: cannot be written"),  # told first
    (["--input=/nowhere/*.txt"], "/nowhere/*.txt: no such file"),
])
def test_a_tokenizer_that_cannot_be_trained_is_one_line(tmp_path, sources, flags, words):
    (tmp_path / "x.txt").write_text(sources[0])
    command = ["--input", str(tmp_path / "x.txt"), f"--output={tmp_path}/t", *flags]
    assert words in refusal(train_tokenizer.main, command)
