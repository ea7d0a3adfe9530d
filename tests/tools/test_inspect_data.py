"""inspect_data prints what a dataset contains, and finds a damaged file."""

import re

import pytest
from dataset_helpers import refusal

from blockgpt.data import dataset
from blockgpt.data.prepare import write_dataset
from blockgpt.data.tokenizer import ByteTokenizer
from blockgpt.errors import UserError
from tools import inspect_data


def test_the_contents_of_a_dataset_are_printed(tmp_path, capsys):
    texts = ["aaaa bbb", "second document", "aaaa bbb", "zz"]
    write_dataset(tmp_path / "x", ByteTokenizer(), [("train", t) for t in texts] + [("val", "aé")], source="a test",
                  skipped={"empty": 7})
    inspect_data.main(["x", "--data_dir", str(tmp_path), "--block_size=8", "--sequences=9", "--verify"])
    out = capsys.readouterr().out
    for words in ("byte, vocabulary 257", "documents skipped when it was prepared: 7 empty",
                  "every file has the digest",
                  "train: 4 documents, 37 tokens, 33 bytes in 1 file; 0.892 bytes per token",
                  "val: 1 documents, 4 tokens, 3 bytes", "97 'a'", "⏹", "median 8 tokens, longest 15, 1 duplicate",
                  "a|a|a|a| |b|b|b", "⏹|s|e|c|o|n|d| "):
        assert words in out
    assert re.search(r"97 'a' +8 +21.62%", out) and out.count("\nsequence") == 4


def test_the_histogram_counts_every_value_once():
    lines = inspect_data.histogram([1, 3, 4, 15, 16, 16], 4)
    assert [re.findall(r"[\d,]+", line) for line in lines] == [["1", "3", "2"], ["4", "15", "2"], ["16", "63", "2"]]


def test_verify_finds_a_damaged_file_of_a_large_dataset(tmp_path, capsys, monkeypatch):
    write_dataset(tmp_path / "x", ByteTokenizer(), [("train", "abc" * 9), ("val", "abc")], source="a test")
    path = tmp_path / "x/train.bin"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    monkeypatch.setattr(dataset, "VERIFY_BYTES", 1)
    command = ["x", "--data_dir", str(tmp_path), "--block_size=4"]
    inspect_data.main(command)  # the digests are not checked
    assert "is damaged" in refusal(inspect_data.main, [*command, "--verify"])


def test_token_ids_beyond_the_vocabulary_are_one_line(tmp_path, capsys, monkeypatch):
    write_dataset(tmp_path / "x", ByteTokenizer(), [("train", "abc" * 9), ("val", "abc")], source="a test")
    path = tmp_path / "x/train.bin"
    path.write_bytes(b"\1\1" + path.read_bytes()[2:])
    monkeypatch.setattr(dataset, "VERIFY_BYTES", 1)
    assert "train: has the token id 257, beyond vocab_size=257" in refusal(
        inspect_data.main, ["x", "--data_dir", str(tmp_path), "--block_size=4"])


@pytest.mark.parametrize("flag", ["--sequences=-1", "--block_size=0", "--tokens=0", "--top=-1"])
def test_a_value_out_of_range_is_one_line(flag):
    assert "is out of range, must be at least" in refusal(inspect_data.main, ["x", flag], error=UserError)
