"""The prepare.py scripts and the flags that they share: each makes a dataset that can be trained on."""

import importlib.util
import json
import runpy
import sys
import sysconfig
import urllib.error
import urllib.request

import numpy as np
import pytest
from conftest import ROOT, environment, run_python
from dataset_helpers import refusal
from forked import run_train
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_helpers import MemoryPartition, documents

from blockgpt.data import dataset as dataset_module
from blockgpt.data import writer
from blockgpt.data.commands import char_tokenizer, command_parser, parse_and_check, prepare_with
from blockgpt.data.dataset import open_dataset
from blockgpt.data.loader import TrainBatches
from blockgpt.data.losses import Skipped
from blockgpt.data.tokenizer import CharTokenizer
from blockgpt.errors import UserError


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The shared flags


def parse_flags(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, flags)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    return parse_and_check(command_parser("a test", None))


@pytest.mark.parametrize("flag, words", [
    ("--val_fraction=0", "--val_fraction: 0.0 is out of range, must be above 0 and below 1"),
    ("--val_fraction=1", "--val_fraction: 1.0 is out of range"), ("--workers=0", "--workers: 0 is out of range"),
    ("--shard_tokens=0", "--shard_tokens: 0 is out of range"), ("--filter=min=3", "--filter 'min=3': no such filter"),
    ("--worker=3", "unrecognized arguments: --worker=3 (did you mean --workers?)"),
])
def test_an_invalid_flag_is_a_one_line_error(monkeypatch, flag, words):
    assert words in refusal(parse_flags, monkeypatch, flag, error=UserError)


@pytest.mark.parametrize("flags, recipe", [
    ([], {"val_fraction": 0.01, "deduplicate": True, "filters": {}}),
    (["--val_fraction=0.5", "--keep_duplicates"], {"val_fraction": 0.5, "deduplicate": False}),
    (["--filter=min_chars=2", "--filter=max_digits=0.5"], {"filters": {"min_chars": "2.0", "max_digits": "0.5"}}),
])
def test_the_flags_become_the_recipe(tmp_path, monkeypatch, flags, recipe):
    partition = MemoryPartition(tuple(f"text {i}" for i in range(400)))
    args = parse_flags(monkeypatch, f"--out_dir={tmp_path / 'x'}", "--tokenizer=byte", "--workers=1", *flags)
    meta = prepare_with(args, [partition], "a test")
    assert {key: meta["recipe"][key] for key in recipe} == recipe
    assert meta["command"].startswith(f"python prepare.py --out_dir={tmp_path / 'x'} ")


def test_shard_tokens_limits_the_files(tmp_path, monkeypatch):
    partition = MemoryPartition(tuple(f"text {i}" for i in range(40)))
    monkeypatch.setattr(writer, "COPY_TOKENS", 16)
    args = parse_flags(monkeypatch, f"--out_dir={tmp_path}", "--tokenizer=byte", "--workers=1", "--shard_tokens=50",
                       "--val_fraction=0.2")
    assert len(prepare_with(args, [partition], "a test")["splits"]["train"]["files"]) > 2


def test_characters_are_taken_from_all_partitions(tmp_path, monkeypatch):
    partitions = [MemoryPartition(("abc", "xyz")), MemoryPartition(("é",))]
    assert char_tokenizer(partitions).characters == "abcxyzé"
    args = parse_flags(monkeypatch, f"--out_dir={tmp_path}", "--tokenizer=char", "--workers=1",
                       "--val_fraction=0.4", "--by_position", "--no_separator")
    assert prepare_with(args, partitions, "a test")["tokenizer"]["characters"] == "abcxyzé"


# data/files


@pytest.fixture
def files_script(tmp_path, monkeypatch):
    """files_script(*flags) runs data/files/prepare.py in this process."""
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, flags)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        load_script("files").main()
    return run


def test_files_go_into_the_folder_of_their_name(tmp_path, monkeypatch, files_script):
    script_root = tmp_path / "project"
    (script_root / "data").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("0123456789" * 9)
    monkeypatch.setattr(dataset_module, "ROOT", script_root)
    files_script("--name=own", "--input", tmp_path / "a.txt", "--tokenizer=byte", "--by_position", "--no_separator",
                 "--workers=1")
    meta = json.loads((script_root / "data/own/meta.json").read_text())
    assert [meta["splits"][split]["tokens"] for split in ("train", "val")] == [81, 9] and meta["eot"] is None


@pytest.mark.parametrize("name, words", [("a/b", "'a/b' is not the name of a folder"), ("..", "'..' is not the name"),
                                         ("pycode", "pycode is a dataset of the project")])
def test_a_name_that_is_no_new_dataset_is_refused(files_script, name, words):
    assert words in refusal(files_script, f"--name={name}", "--input=x.txt", error=UserError)


@pytest.mark.slow
def test_files_are_prepared_trained_on_and_sampled(tmp_path, sentencepiece_model, monkeypatch, capsys):
    """This project's own sources, by a tokenizer that was trained on them."""
    done = run_python(ROOT / "data/files/prepare.py", "--name=own", "--input", ROOT / "docs", f"{ROOT}/*.py",
                      f"{ROOT}/blockgpt", "--out_dir", tmp_path / "own", "--tokenizer", sentencepiece_model,
                      "--workers=2", "--val_fraction=0.3")
    assert done.returncode == 0, done.stderr
    d = open_dataset("own", tmp_path)
    assert d.meta["splits"]["train"]["documents"] > 10 and 1.5 < d.bytes_per_token("train") < 4
    assert "--name=own" in d.meta["command"]
    TrainBatches(d, 0, 64, 4).micro_batch(0)
    flags = ["--dataset=own", f"--data_dir={tmp_path}", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=32",
             "--max_iters=3", "--device=cpu", "--run_name=r", "--eval_tokens=64", "--mfu_peak=1"]
    trained = run_train(flags, tmp_path, environment(), tmp_path / "output")
    assert trained.returncode == 0, trained.stderr
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--run={tmp_path}/runs/r", "--prompt=def main(",
                                      "--max_new_tokens=5", "--device=cpu"])
    runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("def main(")


# data/fineweb, openwebtext, openwebmath, tinystories


@pytest.mark.parametrize("name, flags", [("fineweb", ["--sample=100BT"]), ("openwebtext", []), ("openwebmath", []),
                                         ("tinystories", [])])
def test_a_hub_dataset_is_prepared_from_a_local_copy(tmp_path, monkeypatch, name, flags):
    """The scripts use `datasets` as they do for the hub, on a folder with the layout of the repository there."""
    splits = {"train": 60, "validation": 20} if name == "tinystories" else {"train": 60}
    configuration = "sample-100BT" if name == "fineweb" else "default"
    (tmp_path / "hub").mkdir()
    files = []
    for split, n in splits.items():
        lines = [json.dumps({"text": f"{split} document {i}", "url": "x"}) + "\n" for i in range(n)]
        (tmp_path / f"hub/{split}-0.jsonl").write_text("".join(lines[:n // 2]))
        (tmp_path / f"hub/{split}-1.jsonl").write_text("".join(lines[n // 2:]))
        files.append(f"  - split: {split}\n    path: \"{split}-*.jsonl\"\n")
    (tmp_path / "hub/README.md").write_text(f"---\nconfigs:\n- config_name: {configuration}\n  data_files:\n"
                                            f"{''.join(files)}---\n")
    monkeypatch.setattr(sys, "argv", ["prepare.py", f"--source={tmp_path}/hub", f"--out_dir={tmp_path}/x",
                                      "--tokenizer=byte", "--val_fraction=0.2", "--workers=1", *flags])
    runpy.run_path(str(ROOT / f"data/{name}/prepare.py"), run_name="__main__")
    train, val = documents(tmp_path / "x", "train"), documents(tmp_path / "x", "val")
    assert len(train) + len(val) == sum(splits.values())
    if name == "tinystories":
        assert len(train) == 60 and all(t.startswith("validation") for t in val)


# data/pycode


@pytest.fixture
def stdlib(tmp_path):
    root = tmp_path / "lib"
    files = {"b.py": b"b = 1\n", "a.py": "ä = 2\n".encode(), "pkg/m.py": b"", "pkg/latin.py": b"# \xe9\n",
             "data.txt": b"no", "site-packages/x.py": b"no", "__pycache__/c.py": b"no", "pkg/dist-packages/y.py": b"no"}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "gone.py").symlink_to("nowhere")  # listed, but cannot be read, not even by root
    for i in range(200):
        (root / f"pkg/f{i}.py").write_text(f"x = {i}\n")
    return root


def test_pycode_collects_source_files_in_order_and_counts_the_rest(stdlib):
    pycode, skipped = load_script("pycode"), Skipped()
    pairs = list(pycode.collect(str(stdlib), skipped))
    assert [text for _, text in pairs[:2]] == ["ä = 2\n", "b = 1\n"]
    assert len(pairs) == 202 and not any("no" in text for _, text in pairs)
    assert skipped == {"empty": 1, "not_utf8": 1, "unreadable": 1}


def test_pycode_splits_by_path_alone(stdlib):
    pycode = load_script("pycode")
    first = list(pycode.collect(stdlib, Skipped()))
    (stdlib / "b.py").write_text("changed")
    (stdlib / "a.py").unlink()
    second = list(pycode.collect(stdlib, Skipped()))
    assert [s for s, _ in second] == [s for s, _ in first[1:]]
    assert 0.05 < sum(s == "val" for s, _ in first) / len(first) < 0.2
    assert {n: pycode.split_of(n) for n in ("abc.py", "ast.py", "json/decoder.py")} == \
        {"abc.py": "train", "ast.py": "val", "json/decoder.py": "train"}  # the same on every computer
    assert pycode.split_of("not unicode \udcff.py") in ("train", "val")


def test_pycode_runs_as_a_command(stdlib, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(stdlib))
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--out_dir", str(tmp_path / "pycode")])
    load_script("pycode").main()
    d = open_dataset("pycode", tmp_path)
    assert d.meta["splits"]["train"]["documents"] + d.meta["splits"]["val"]["documents"] == 202
    assert d.meta["python"] == sys.version.split()[0].rstrip("+")
    assert "1 not_utf8" in capsys.readouterr().out


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()])
def test_a_standard_library_without_source_is_a_one_line_error(tmp_path, make):
    make(tmp_path / "lib")
    assert "no .py files" in refusal(list, load_script("pycode").collect(tmp_path / "lib", Skipped()))


# data/shakespeare, data/shakespeare_char


def shakespeare(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, argv)])
    load_script("shakespeare_char").main()


def test_shakespeare_runs_from_anywhere(tmp_path):
    (tmp_path / "input.txt").write_text("To be, or not to be: that is the question.\n" * 10)
    done = run_python(ROOT / "data/shakespeare_char/prepare.py", "--source", "input.txt", "--out_dir", "x",
                      cwd=tmp_path, env={"PYTHONPATH": ""})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    d = open_dataset("x", tmp_path)
    assert (d.tokens("train"), d.tokens("val"), d.meta["eot"]) == (387, 43, None)


@settings(max_examples=20)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=2))
def test_shakespeare_splits_the_characters_90_to_10(tmp_path_factory, text):
    out = tmp_path_factory.mktemp("x")
    (out / "input.txt").write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as monkeypatch:
        shakespeare(monkeypatch, "--source", out / "input.txt", "--out_dir", out)
    meta = json.loads((out / "meta.json").read_text())
    cut = int(len(text) * 0.9)
    tokenizer = CharTokenizer(text)
    assert np.fromfile(out / "train.bin", "<u2").tolist() == tokenizer.encode(text[:cut])
    assert np.fromfile(out / "val.bin", "<u2").tolist() == tokenizer.encode(text[cut:])
    assert meta["splits"]["val"]["bytes"] == len(text[cut:].encode())


@pytest.mark.parametrize("answer, words", [(urllib.error.URLError("no route"), "no route"),
                                           (b"<html>", "is not the expected file")])
def test_a_failed_download_is_a_one_line_error_that_names_the_flag(tmp_path, monkeypatch, answer, words):
    class Response:
        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def read(self):
            return answer

    def urlopen(url, timeout):
        if isinstance(answer, Exception):
            raise answer
        return Response()

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    message = refusal(shakespeare, monkeypatch, "--out_dir", tmp_path)
    assert words in message and "--source FILE" in message and not any(tmp_path.iterdir())


@pytest.mark.parametrize("content, words", [(None, "cannot be read"), (b"ab\xff", "not UTF-8"),
                                            (b"", "would be empty")])
def test_a_source_without_text_is_a_one_line_error(tmp_path, monkeypatch, content, words):
    if content is not None:
        (tmp_path / "input.txt").write_bytes(content)
    message = refusal(shakespeare, monkeypatch, "--source", tmp_path / "input.txt", "--out_dir", tmp_path / "x")
    assert words in message and "input.txt" in message


def test_tiny_shakespeare_has_nanogpts_counts(tmp_path, gpt2, tinyshakespeare):
    done = run_python(ROOT / "data/shakespeare/prepare.py", "--source", tinyshakespeare, "--out_dir", tmp_path / "x")
    assert done.returncode == 0, done.stderr
    d = open_dataset("x", tmp_path)
    assert (d.tokens("train"), d.tokens("val"), d.vocab_size) == (301_966, 36_059, 50_257)
