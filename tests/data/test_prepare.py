"""What preparing promises: the files say what meta.json says, and a dataset is there whole or not at all."""

import collections
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgpt.data import dataset as dataset_module
from blockgpt.data.dataset import ensure_prepared, open_dataset
from blockgpt.data.prepare import write_dataset
from blockgpt.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from blockgpt.errors import DataError

ROOT = dataset_module.ROOT
DOCUMENTS = [("train", "First.\n"), ("val", "Żółw"), ("train", "Zweites."), ("train", "")]


def write(directory, documents=DOCUMENTS, tokenizer=None, **more):
    return write_dataset(directory, tokenizer or ByteTokenizer(), documents, **{"source": "a test", **more})


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(action, *args, **kwargs):
    """The message of the `DataError` that the action raises; it has one line."""
    with pytest.raises(DataError) as raised:
        action(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def names(directory):
    return sorted(p.name for p in directory.iterdir())


class WideTokenizer(Tokenizer):
    """One token a code point, from a vocabulary that two bytes cannot number."""

    name, vocab_size = "wide", 0x110000

    def encode(self, text):
        return [ord(c) for c in text]


# What is written


def test_files_hold_the_tokens_and_meta_counts_them(tmp_path, capsys):
    skipped = collections.Counter(empty=2)
    meta = write(tmp_path, skipped=skipped, python="3.x")
    assert meta == json.loads((tmp_path / "meta.json").read_text())
    train = np.fromfile(tmp_path / "train.bin", "<u2").tolist()
    assert train == [*b"First.\n", 256, *b"Zweites.", 256, 256]
    assert np.fromfile(tmp_path / "val.bin", "<u2").tolist() == [*"Żółw".encode(), 256]
    blob = (tmp_path / "train.bin").read_bytes()
    assert meta["splits"]["train"] == {
        "tokens": 18, "bytes": 15, "documents": 3,
        "files": {"train.bin": {"sha256": hashlib.sha256(blob).hexdigest(), "size": 36}}}
    assert meta["splits"]["val"]["bytes"] == 7 and meta["splits"]["val"]["tokens"] == 8
    del meta["splits"]
    assert meta == {"schema_version": 1, "tokenizer": {"name": "byte"}, "vocab_size": 257, "eot": 256,
                    "dtype": "uint16", "source": "a test", "skipped": {"empty": 2}, "python": "3.x"}
    out = capsys.readouterr().out
    assert "18 tokens" in out and "2 empty" in out and str(tmp_path) in out


def test_a_large_vocabulary_takes_uint32(tmp_path):
    meta = write(tmp_path, tokenizer=WideTokenizer())
    assert meta["dtype"] == "uint32"
    assert np.fromfile(tmp_path / "val.bin", "<u4").tolist() == [ord(c) for c in "Żółw"]


def test_the_loader_opens_what_the_writer_wrote(tmp_path):
    write(tmp_path / "x")
    d = open_dataset("x", tmp_path)
    assert d.tokens("val") == 8 and d.vocab_size == 257 and d.bytes_per_token("val") == 7 / 8


def test_the_same_documents_give_the_same_files(tmp_path):
    for name in "ab":
        write(tmp_path / name)
    assert names(tmp_path / "a") == ["meta.json", "train.bin", "val.bin"]
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_documents_are_streamed(tmp_path):
    unread = iter(DOCUMENTS)
    write(tmp_path, (pair for pair in unread))
    assert next(unread, None) is None


# All or nothing


def interrupted(error):
    yield from DOCUMENTS
    raise error


@pytest.mark.parametrize("documents", [[("train", "abc")], [("val", "abc")], []])
def test_an_empty_split_is_refused_and_leaves_nothing(tmp_path, documents):
    assert "split would be empty" in refusal(write, tmp_path, documents, CharTokenizer("abc"))
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug"), DataError("no"), OSError(28, "No space")])
@pytest.mark.parametrize("before", [[], DOCUMENTS])
def test_a_failure_keeps_the_old_dataset_and_no_temporaries(tmp_path, error, before):
    if before:
        write(tmp_path / "x", before)
    else:
        (tmp_path / "x").mkdir()
    old = {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir()}
    with pytest.raises(DataError if isinstance(error, OSError) else type(error)):
        write(tmp_path / "x", interrupted(error))
    assert {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir()} == old


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on file size stands for the disk: the write itself fails, in the middle."""
    source = tmp_path / "input.txt"
    source.write_text("abcdefghij" * 100_000)
    code = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
            "runpy.run_path(sys.argv.pop(1), run_name='__main__')")
    script = ROOT / "data/shakespeare_char/prepare.py"
    done = subprocess.run([sys.executable, "-c", code, script, "--source", source, "--out_dir", tmp_path / "x"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "cannot be written" in done.stderr
    assert names(tmp_path / "x") == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(write, tmp_path / "file" / "x")


def kill_when_ready(code, *args):
    """Run Python `code`, wait for its first line of output, kill -9 it."""
    child = subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE,
                             stdin=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL


WAIT = "import sys; print('ready', flush=True); sys.stdin.read()"


def test_killed_while_writing_leaves_no_dataset(tmp_path):
    kill_when_ready(f"""
import sys
from blockgpt.data.prepare import write_dataset
from blockgpt.data.tokenizer import ByteTokenizer
def documents():
    yield from [("train", "x" * 3_000_000), ("val", "y")]
    {WAIT}
write_dataset(sys.argv[1], ByteTokenizer(), documents(), source="a test")""", tmp_path / "x")
    left = names(tmp_path / "x")
    assert left and all(name.endswith(".tmp") for name in left)
    assert "x" in refusal(open_dataset, "x", tmp_path)
    write(tmp_path / "x")
    assert open_dataset("x", tmp_path).tokens("train") == 18


def test_killed_between_the_renames_leaves_no_dataset(tmp_path):
    write(tmp_path / "x")
    kill_when_ready(f"""
import os, sys
from blockgpt.data.prepare import write_dataset
from blockgpt.data.tokenizer import ByteTokenizer
replace = os.replace
def slow_replace(a, b):
    replace(a, b)
    {WAIT}
os.replace = slow_replace
write_dataset(sys.argv[1], ByteTokenizer(), [("train", "other"), ("val", "texts")], source="a test")""", tmp_path / "x")
    assert (tmp_path / "x" / "train.bin").stat().st_size == 12  # the new one is there already
    assert not (tmp_path / "x" / "meta.json").exists()
    refusal(open_dataset, "x", tmp_path)


def test_two_processes_at_once_do_not_mix(tmp_path):
    def documents():
        yield from DOCUMENTS[:2]
        write(tmp_path / "x", [("train", "the other process"), ("val", "is faster")])
        assert open_dataset("x", tmp_path).tokens("train") == 18
        yield from DOCUMENTS[2:]
    write(tmp_path / "x", documents())
    assert open_dataset("x", tmp_path).tokens("train") == 18
    assert names(tmp_path / "x") == ["meta.json", "train.bin", "val.bin"]


def test_preparing_the_same_again_never_takes_it_away(tmp_path, monkeypatch):
    write(tmp_path / "x")
    opened = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: opened.append(open_dataset("x", tmp_path)) or replace(a, b))
    write(tmp_path / "x")
    assert len(opened) == 3  # two splits and meta.json


def test_what_a_killed_process_left_long_ago_is_removed(tmp_path):
    old, new, foreign = (tmp_path / n for n in (".meta.json.1a2b.tmp", ".meta.json.3c4d.tmp", ".mine.tmp"))
    for path in (old, new, foreign):
        path.write_bytes(b"")
    for path in (old, foreign):
        os.utime(path, (0, 0))
    write(tmp_path)
    assert not old.exists() and new.exists() and foreign.exists()


# ensure


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder whose data/pycode/prepare.py notes its arguments, or fails if told to."""
    root = tmp_path / "project"
    for name in ("pycode", "shakespeare_char"):
        (root / "data" / name).mkdir(parents=True)
        (root / "data" / name / "prepare.py").write_text(
            "import os, sys\nfrom pathlib import Path\n"
            "if os.environ.get('FAIL'): print('noise\\nerror: /x: disk full', file=sys.stderr); sys.exit(2)\n"
            "out = Path(sys.argv[2]); out.mkdir(exist_ok=True); (out / 'meta.json').write_text(str(sys.argv[1:]))\n"
            "print('summary')\n")
    monkeypatch.setattr(dataset_module, "ROOT", root)
    return root


def test_ensure_makes_the_embedded_corpus_once(project, capfd):
    ensure_prepared("pycode")
    meta = project / "data/pycode/meta.json"
    assert "--out_dir" in meta.read_text()
    assert capfd.readouterr().out.count("\n") == 1
    meta.write_text("mine")
    ensure_prepared("pycode")
    assert meta.read_text() == "mine" and capfd.readouterr().out == ""


def test_ensure_prepares_into_another_data_dir(project, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    ensure_prepared("pycode", str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere/pycode/meta.json").exists() and not (project / "data/pycode/meta.json").exists()


def test_ensure_tells_why_preparing_failed(project, monkeypatch):
    monkeypatch.setenv("FAIL", "1")
    message = refusal(ensure_prepared, "pycode")
    assert message.endswith("/x: disk full") and "error:" not in message


def test_ensure_names_the_command_or_the_datasets_there_are(project, tmp_path):
    assert "run python data/shakespeare_char/prepare.py" in refusal(ensure_prepared, "shakespeare_char")
    assert f"--out_dir {tmp_path}/shakespeare_char" in refusal(ensure_prepared, "shakespeare_char", tmp_path)
    assert "did you mean shakespeare_char?" in refusal(ensure_prepared, "shakespear")
    write(tmp_path / "mine")
    ensure_prepared("mine", tmp_path)
    assert "one of mine, pycode, shakespeare_char" in refusal(ensure_prepared, "qqq", tmp_path)


# data/pycode


@pytest.fixture
def stdlib(tmp_path):
    root = tmp_path / "lib"
    files = {"b.py": b"b = 1\n", "a.py": "ä = 2\n".encode(), "pkg/m.py": b"", "pkg/latin.py": b"# \xe9\n",
             "data.txt": b"no", "site-packages/x.py": b"no", "__pycache__/c.py": b"no", "pkg/dist-packages/y.py": b"no"}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "gone.py").symlink_to("nowhere")  # listed, and cannot be read, not even by root
    for i in range(200):
        (root / f"pkg/f{i}.py").write_text(f"x = {i}\n")
    return root


def test_pycode_collects_source_in_order_and_counts_the_rest(stdlib):
    pycode, skipped = load_script("pycode"), collections.Counter()
    found = list(pycode.collect(str(stdlib), skipped))
    assert [text for _, text in found[:2]] == ["ä = 2\n", "b = 1\n"]
    assert len(found) == 202 and not any("no" in text for _, text in found)
    assert skipped == {"empty": 1, "not_utf8": 1, "unreadable": 1}


def test_pycode_splits_by_path_alone(stdlib):
    pycode = load_script("pycode")
    first = list(pycode.collect(stdlib, collections.Counter()))
    (stdlib / "b.py").write_text("changed")
    (stdlib / "a.py").unlink()
    second = list(pycode.collect(stdlib, collections.Counter()))
    assert [s for s, _ in second] == [s for s, _ in first[1:]]
    assert 0.05 < sum(s == "val" for s, _ in first) / len(first) < 0.2
    assert {n: pycode.split_of(n) for n in ("abc.py", "ast.py", "json/decoder.py")} == \
        {"abc.py": "train", "ast.py": "val", "json/decoder.py": "train"}  # as on every machine
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
def test_a_standard_library_without_source_is_one_line(tmp_path, make):
    make(tmp_path / "lib")
    assert "no .py files" in refusal(list, load_script("pycode").collect(tmp_path / "lib", collections.Counter()))


# data/shakespeare_char


def shakespeare(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, argv)])
    load_script("shakespeare_char").main()


def test_shakespeare_runs_from_anywhere(tmp_path):
    (tmp_path / "input.txt").write_text("To be, or not to be: that is the question.\n" * 10)
    command = [sys.executable, ROOT / "data/shakespeare_char/prepare.py", "--source", "input.txt", "--out_dir", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
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
                                           (b"<html>", "something else")])
def test_a_failed_download_is_one_line_that_names_source(tmp_path, monkeypatch, answer, words):
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
    assert words in message and "--source FILE" in message and names(tmp_path) == []


@pytest.mark.parametrize("content, words", [(None, "cannot be read"), (b"ab\xff", "not UTF-8"),
                                            (b"", "would be empty")])
def test_a_source_without_text_is_one_line(tmp_path, monkeypatch, content, words):
    if content is not None:
        (tmp_path / "input.txt").write_bytes(content)
    message = refusal(shakespeare, monkeypatch, "--source", tmp_path / "input.txt", "--out_dir", tmp_path / "x")
    assert words in message and "input.txt" in message
