"""analyze_mixture prints what a run would read from each source."""

import re

import pytest
from conftest import ROOT
from dataset_helpers import refusal

from blockgpt.data.prepare import write_dataset
from blockgpt.data.tokenizer import ByteTokenizer
from blockgpt.errors import UserError
from configurator import load_config
from tools import analyze_mixture


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A config file with two phases of the datasets a and b."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, n in (("a", 5000), ("b", 800)):
        write_dataset(folder / name, ByteTokenizer(), [("train", "x" * n), ("val", "abc" * 50)], source="a test")
    (folder / "mix.py").write_text("dataset_schedule = [(0, {'a': 3, 'b': 1}), (50, 'b')]\nblock_size = 16\n"
                                   f"batch_size = 4\nmax_iters = 60\ndata_dir = {str(folder)!r}\n")
    return str(folder / "mix.py")


def test_the_tokens_and_epochs_of_each_source_are_printed_and_plotted(tmp_path, capsys, config_file):
    analyze_mixture.main([config_file, "--plot", str(tmp_path / "p.png")])
    out = capsys.readouterr().out
    assert re.search(r"a +2,400 +62.50% +5,001 +0.482 +0\n", out)
    assert re.search(r"b +1,440 +37.50% +801 +1.84 +656\n", out)
    assert "steps 0 to 50" in out and "75.00%" in out and "steps 50 to 60" in out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_flags_of_train_py_follow_the_config_file(capsys, config_file):
    analyze_mixture.main([config_file, "--max_iters=40", "--batch_size=2"])
    out = capsys.readouterr().out
    assert re.search(r"a +960 +75.00%", out) and "from step 50 on; the run ends after 40 steps" in out


@pytest.mark.parametrize("flags, words", [
    (["--plot=/nowhere/p.png"], "--plot: /nowhere/p.png: cannot be written: No such file or directory"),
    (["--plot=p.nothing"], "--plot: p.nothing: cannot be written: "),
    (["--plot"], "--plot: expected one argument"), (["--plot="], "--plot: needs a file"),
    (["--plot", "--max_iters=3"], "--plot: expected one argument"), (["--max_iter=3"], "did you mean --max_iters=3?"),
])
def test_a_wrong_flag_is_one_line(capsys, config_file, flags, words):
    assert words in refusal(analyze_mixture.main, [config_file, *flags], error=UserError)


@pytest.mark.parametrize("name", ["balanced", "code", "math"])
def test_the_presets_name_datasets_that_can_be_prepared(name):
    (_, weights), = load_config([f"config/mix_{name}.py"]).phases()
    scripts = {p.parent.name for p in ROOT.glob("data/*/prepare.py")}
    assert {source.removesuffix("_gpt2") for source in weights} <= scripts
    assert sum(weights.values()) in (1, 3)
