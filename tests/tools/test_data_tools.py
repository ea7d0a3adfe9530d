"""The commands beside the data: a dataset and a mixture are shown as they are."""

import re

import pytest
from conftest import ROOT

from blockgpt.data.prepare import write_dataset
from blockgpt.data.tokenizer import ByteTokenizer
from blockgpt.errors import UserError
from tools import analyze_mixture, inspect_data


def refusal(action, *args):
    with pytest.raises(UserError) as raised:
        action(*args)
    assert "\n" not in str(raised.value)
    return str(raised.value)


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
