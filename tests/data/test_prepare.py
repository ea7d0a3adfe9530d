"""Preparing: the files match meta.json, and after any interruption a dataset is complete or does not exist."""

import collections
import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
from conftest import ROOT, environment, run_python
from dataset_helpers import refusal
from prepare_helpers import MemoryPartition, contents, partitions_of, run_prepare

from blockgpt.data import prepare as prepare_module
from blockgpt.data import sources as sources_module
from blockgpt.data import writer
from blockgpt.data.dataset import open_dataset
from blockgpt.data.prepare import ProgressDisplay, write_dataset
from blockgpt.data.sources import file_partitions
from blockgpt.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, from_meta, load_tokenizer
from blockgpt.errors import DataError, UserError

DOCUMENTS = [("train", "First.\n"), ("val", "Żółw"), ("train", "Zweites."), ("train", "")]


def write(directory, documents=DOCUMENTS, tokenizer=None, **more):
    return write_dataset(directory, tokenizer or ByteTokenizer(), documents, **{"source": "a test", **more})


class WideTokenizer(Tokenizer):
    """One token per code point; its vocabulary needs more than two bytes."""

    name, vocab_size = "wide", 0x110000

    def encode(self, text):
        return [ord(c) for c in text]


# What is written


def test_files_contain_the_tokens_that_meta_counts(tmp_path, capsys):
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


class Text(str):
    """A str that can be weakly referenced."""


def test_documents_are_streamed_one_at_a_time(tmp_path):
    texts = []

    def documents():
        for i in range(100):
            text = Text(f"document {i}")
            texts.append(weakref.ref(text))
            yield "val" if i % 5 == 0 else "train", text
            del text
            assert sum(ref() is not None for ref in texts) <= 1  # the consumer's own, until it has the next one

    assert write(tmp_path, documents())["splits"]["train"]["documents"] == 80


def test_a_large_vocabulary_is_stored_as_uint32(tmp_path):
    meta = write(tmp_path, tokenizer=WideTokenizer(), separate=False)
    assert meta["dtype"] == "uint32"
    assert np.fromfile(tmp_path / "val.bin", "<u4").tolist() == [ord(c) for c in "Żółw"]


def test_the_reading_side_opens_what_was_written(tmp_path):
    write(tmp_path / "x")
    d = open_dataset("x", tmp_path)
    assert d.tokens("val") == 8 and d.vocab_size == 257 and d.bytes_per_token("val") == 7 / 8


def test_a_trained_tokenizer_is_saved_with_the_dataset(tmp_path, sentencepiece_model, sources):
    model = load_tokenizer(str(sentencepiece_model))
    write(tmp_path / "x", [("train", sources[0]), ("val", sources[1].replace("▁", ""))], model)
    d = open_dataset("x", tmp_path)
    restored = from_meta(d.meta["tokenizer"])
    assert restored.decode(d.shards["train"][0].tolist()) == sources[0] and d.meta["eot"] == restored.eot == 1


def test_the_same_documents_give_the_same_files(tmp_path):
    for name in "ab":
        write(tmp_path / name)
    assert sorted(contents(tmp_path / "a")) == ["meta.json", "train.bin", "val.bin"]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_documents_are_streamed(tmp_path):
    remaining = iter(DOCUMENTS)
    write(tmp_path, (pair for pair in remaining))
    assert next(remaining, None) is None


# All or nothing


def interrupted(error):
    yield from DOCUMENTS
    raise error


@pytest.mark.parametrize("documents", [[("train", "abc")], [("val", "abc")], []])
def test_an_empty_split_is_refused_and_leaves_nothing(tmp_path, documents):
    assert "split would be empty" in refusal(write, tmp_path, documents, CharTokenizer("abc"), separate=False)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug"), DataError("no"), OSError(28, "No space")])
@pytest.mark.parametrize("existing", [[], DOCUMENTS])
def test_a_failure_keeps_the_old_dataset_and_no_temporaries(tmp_path, error, existing):
    if existing:
        write(tmp_path / "x", existing)
    else:
        (tmp_path / "x").mkdir()
    before = contents(tmp_path / "x")
    with pytest.raises(DataError if isinstance(error, OSError) else type(error)):
        write(tmp_path / "x", interrupted(error))
    assert contents(tmp_path / "x") == before


def test_a_full_disk_is_a_one_line_error_and_leaves_nothing(tmp_path):
    """A limit on the file size acts as the full disk: a write fails in the middle."""
    source = tmp_path / "input.txt"
    source.write_text("abcdefghij" * 100_000)
    code = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
            "runpy.run_path(sys.argv.pop(1), run_name='__main__')")
    script = ROOT / "data/shakespeare_char/prepare.py"
    done = run_python("-c", code, script, "--source", source, "--out_dir", tmp_path / "x")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "cannot be written" in done.stderr
    assert contents(tmp_path / "x") == {}


def test_a_folder_that_cannot_be_created_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(write, tmp_path / "file" / "x")
    assert "are saved" not in refusal(run_prepare, tmp_path / "file" / "x", [MemoryPartition(("text",))])


def start(*command, cwd=None):
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, env=environment(), stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_when_ready(code, *args):
    """Run Python `code`, wait for its first line of output, kill -9 it."""
    child = start("-c", code, *args)
    assert child.stdout.readline() == "ready\n"
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL


WAIT = "import sys; print('ready', flush=True); sys.stdin.read()"


def test_a_process_killed_while_it_writes_leaves_no_dataset(tmp_path):
    kill_when_ready(f"""
import sys
from blockgpt.data.prepare import write_dataset
from blockgpt.data.tokenizer import ByteTokenizer
def documents():
    yield from [("train", "x" * 3_000_000), ("val", "y")]
    {WAIT}
write_dataset(sys.argv[1], ByteTokenizer(), documents(), source="a test")""", tmp_path / "x")
    names = [p.name for p in (tmp_path / "x").iterdir()]
    assert names and all(name == ".lock" or name.endswith(".tmp") for name in names)
    assert "x" in refusal(open_dataset, "x", tmp_path)
    write(tmp_path / "x")
    assert open_dataset("x", tmp_path).tokens("train") == 18


def test_a_process_killed_between_the_renames_leaves_no_dataset(tmp_path):
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
    assert (tmp_path / "x" / "train.bin").stat().st_size == 12  # the new file
    assert not (tmp_path / "x" / "meta.json").exists()
    refusal(open_dataset, "x", tmp_path)


def test_two_processes_at_once_do_not_mix_their_files(tmp_path):
    def documents():
        yield from DOCUMENTS[:2]
        write(tmp_path / "x", [("train", "the other process"), ("val", "is faster")])
        assert open_dataset("x", tmp_path).tokens("train") == 18
        yield from DOCUMENTS[2:]
    write(tmp_path / "x", documents())
    assert open_dataset("x", tmp_path).tokens("train") == 18
    assert sorted(contents(tmp_path / "x")) == ["meta.json", "train.bin", "val.bin"]


def test_preparing_the_same_dataset_again_never_removes_it(tmp_path, monkeypatch):
    write(tmp_path / "x")
    opened = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: opened.append(open_dataset("x", tmp_path)) or replace(a, b))
    write(tmp_path / "x")
    assert len(opened) == 3  # two splits and meta.json


def test_old_temporaries_of_a_killed_process_are_removed(tmp_path):
    old, new, foreign = (tmp_path / n for n in (".meta.json.1a2b.tmp", ".meta.json.3c4d.tmp", ".other.tmp"))
    for path in (old, new, foreign):
        path.write_bytes(b"")
    for path in (old, foreign):
        os.utime(path, (0, 0))
    write(tmp_path)
    assert not old.exists() and new.exists() and foreign.exists()


# Several partitions and processes


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A folder of files that gives several partitions."""
    monkeypatch.setattr(sources_module, "PARTITION_BYTES", 5000)
    (tmp_path / "corpus").mkdir()
    for i in range(40):
        lines = [json.dumps({"text": f"{i} {j} {hashlib.md5(bytes([i, j])).hexdigest() * 3}"}) for j in range(15)]
        (tmp_path / f"corpus/{i:02}.jsonl").write_text("\n".join(lines))
    return tmp_path / "corpus"


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(tmp_path, corpus):
    partitions = file_partitions([str(corpus)])
    assert len(partitions) > 5
    for workers in (1, 3):
        run_prepare(tmp_path / f"w{workers}", partitions, workers=workers)
    assert contents(tmp_path / "w1") == contents(tmp_path / "w3")
    assert sorted(contents(tmp_path / "w1")) == ["meta.json", "train.bin", "val.bin"]


SMALL_PARTITIONS = """
import runpy, sys
sys.path.insert(0, {root!r})
import blockgpt.data.prepare as prepare
import blockgpt.data.sources
blockgpt.data.sources.PARTITION_BYTES = 5000
{code}
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def files_command(corpus, out_dir, *flags, code=""):
    """The arguments of Python for data/files/prepare.py with small partitions; `code` runs first."""
    return ["-c", SMALL_PARTITIONS.format(root=str(ROOT), code=code), ROOT / "data/files/prepare.py", "--name=x",
            "--input", corpus, "--out_dir", out_dir, "--tokenizer=byte", "--val_fraction=0.2", *flags]


# Prints a line per finished partition; after the third, waits until stdin is closed.
PAUSE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
original, finished = prepare.finish_partition, []
def finish_partition(*args):
    original(*args)
    finished.append(args)
    print("done", flush=True)
    if len(finished) == 3:
        sys.stdin.read()
prepare.finish_partition = finish_partition
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_partitions_that_were_finished_before_a_kill_are_not_encoded_again(tmp_path, corpus, how):
    out = tmp_path / "x"
    child = start(*files_command(corpus, out, "--workers=1", code=PAUSE))
    for _ in range(3):
        assert child.stdout.readline() == "done\n"
    child.send_signal(how)
    child.wait()
    _, err = child.communicate()
    assert child.returncode == (-how if how == signal.SIGKILL else 130) and "Traceback" not in err
    assert not (out / "meta.json").exists()
    (work,) = out.glob(".parts.*.tmp")
    assert len(list(work.glob("*.json"))) == 3
    assert "x" in refusal(open_dataset, "x", tmp_path)  # it is not taken for a complete dataset

    resumed = run_python(*files_command(corpus, out, "--workers=1", code=PAUSE))
    assert resumed.returncode == 0, resumed.stderr
    total = len(file_partitions([str(corpus)]))
    assert f"continuing: 3 of {total} partitions are finished" in resumed.stdout
    assert resumed.stdout.count("done\n") == total - 3
    run_prepare(tmp_path / "uninterrupted", file_partitions([str(corpus)]))
    a, b = contents(out), contents(tmp_path / "uninterrupted")
    assert sorted(a) == sorted(b) and a["train.bin"] == b["train.bin"] and a["val.bin"] == b["val.bin"]


@pytest.mark.slow
def test_a_kill_before_the_commit_leaves_nothing_behind_after_the_next_run(tmp_path, corpus):
    code = """
def commit(*args):
    print("encoded", flush=True)
    sys.stdin.read()
prepare.commit = commit
"""
    out = tmp_path / "x"
    child = start(*files_command(corpus, out, "--workers=1", "--shard_tokens=5000", code=code))
    assert child.stdout.readline() == "encoded\n"
    child.kill()
    child.communicate()
    resumed = run_python(*files_command(corpus, out, "--workers=1"))
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"continuing: (\d+) of \1 partitions are finished", resumed.stdout)
    assert sorted(contents(out)) == ["meta.json", "train.bin", "val.bin"]


@pytest.mark.slow
def test_workers_end_with_the_main_process(tmp_path, corpus):
    (tmp_path / "fault.py").write_text("import threading\ndef keep(text):\n    print('filtering', flush=True)\n"
                                       "    threading.Event().wait()\n")
    child = start(*files_command(corpus, tmp_path / "x", "--workers=2", "--filter=callable=fault:keep"), cwd=tmp_path)
    assert child.stdout.readline() == "filtering\n"
    child.kill()
    child.communicate(timeout=60)  # until the end of the output, to which the workers write too


@pytest.mark.slow
def test_a_killed_worker_is_a_one_line_error_and_the_same_command_continues(tmp_path, corpus):
    out = tmp_path / "x"  # 'fa' + 'il': of a file that the filter names, the recipe has the content
    (tmp_path / "fault.py").write_text("import os\ndef keep(text):\n"
                                       "    if text.startswith('20 7 ') and os.path.exists('fa' + 'il'):\n"
                                       "        os.kill(os.getpid(), 9)\n    return True\n")
    (tmp_path / "fail").touch()
    flags = ["--workers=2", "--filter=callable=fault:keep"]
    killed = run_python(*files_command(corpus, out, *flags), cwd=tmp_path)
    assert killed.returncode == 2 and killed.stderr.count("\n") == 1 and "a worker process was killed" in killed.stderr
    assert killed.stderr.endswith("(the finished partitions are saved: the same command continues)\n")
    (tmp_path / "fail").unlink()
    resumed = run_python(*files_command(corpus, out, *flags), cwd=tmp_path)
    assert resumed.returncode == 0 and "partitions are finished" in resumed.stdout, resumed.stderr
    assert sorted(contents(out)) == ["meta.json", "train.bin", "val.bin"]


def test_a_damaged_file_is_a_one_line_error_and_after_a_repair_the_command_continues(tmp_path, corpus, capsys):
    damaged = corpus / "99.jsonl.gz"
    good = gzip.compress(b'{"text": "the last document"}\n' * 5000)  # its head is not damaged
    damaged.write_bytes(good[:-12])
    out = tmp_path / "x"
    message = refusal(run_prepare, out, file_partitions([str(corpus)]))
    assert str(damaged) in message
    assert message.endswith("(the finished partitions are saved: the same command continues)")
    assert [p.name[:7] for p in out.iterdir()] == [".parts."]
    damaged.write_bytes(good)
    meta = run_prepare(out, file_partitions([str(corpus)]))
    assert sum(s["documents"] for s in meta["splits"].values()) == 601
    done, total = map(int, re.search(r"continuing: (\d+) of (\d+) partitions", capsys.readouterr().out).groups())
    assert done == total - 1 > 5


def test_after_a_full_disk_the_same_command_continues(tmp_path, corpus):
    """A limit on the file size acts as the full disk. The partitions are below it, the shard is not."""
    out = tmp_path / "x"
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    full = run_python(*files_command(corpus, out, "--workers=1", code=code))
    assert full.returncode == 2 and full.stderr.count("\n") == 1, full.stderr
    assert f"{out}: cannot be written: File too large" in full.stderr
    assert "the same command continues" in full.stderr
    assert [p.name[:7] for p in out.iterdir()] == [".parts."]
    resumed = run_python(*files_command(corpus, out, "--workers=1"))
    assert resumed.returncode == 0 and "continuing: " in resumed.stdout
    assert sorted(contents(out)) == ["meta.json", "train.bin", "val.bin"]


def test_a_second_process_that_prepares_the_same_dataset_is_refused(tmp_path, corpus):
    out = tmp_path / "x"
    child = start(*files_command(corpus, out, "--workers=1", code=PAUSE))
    for _ in range(3):
        assert child.stdout.readline() == "done\n"
    with pytest.raises(UserError, match=f"x: process {child.pid} on .* prepares this dataset"):
        run_prepare(out, file_partitions([str(corpus)]), val_fraction=0.5)  # another recipe, but one folder
    child.communicate()
    assert child.returncode == 0 and (out / "meta.json").exists()


def test_finished_partitions_are_kept_however_old_they_are(tmp_path, corpus, capsys):
    damaged = corpus / "99.jsonl.gz"
    damaged.write_bytes(gzip.compress(b'{"text": "the last document"}\n' * 5000)[:-12])
    refusal(run_prepare, tmp_path / "x", file_partitions([str(corpus)]))
    (work,) = (tmp_path / "x").glob(".parts.*.tmp")
    for path in (*work.iterdir(), work):
        os.utime(path, (time.time() - 9 * writer.STALE_SECONDS,) * 2)
    damaged.unlink()
    run_prepare(tmp_path / "x", file_partitions([str(corpus)]))
    assert "continuing: " in capsys.readouterr().out


# Progress


def test_short_work_prints_no_progress(tmp_path, capfd):
    run_prepare(tmp_path, partitions_of([f"text {i}" for i in range(40)]))
    out, err = capfd.readouterr()
    assert out.startswith("train ") and err == ""


def test_progress_in_a_file_is_a_line_every_30_seconds(capsys, monkeypatch):
    clock = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    progress = ProgressDisplay(10, 2)
    progress.advance(500, 800_000)
    clock = 129.0
    progress.update(1)
    assert capsys.readouterr().out == ""
    clock = 130.0
    progress.advance(100, 0)
    line = capsys.readouterr().out
    assert line.endswith("\n") and line.count("\n") == 1 and "\r" not in line
    assert " 3/10 " in line and "600 tokens, 20 tokens/s, 0.0 MB/s" in line
    progress.update(1)
    assert capsys.readouterr().out == ""  # not again at once


def test_progress_on_a_terminal_is_a_bar_that_is_removed_at_the_end(capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(prepare_module, "TERMINAL_SECONDS", 0)
    progress = ProgressDisplay(10, 2)
    progress.advance(500, 800)
    progress.update(1)
    progress.close()
    assert " 3/10 " in terminal.getvalue() and "500 tokens, " in terminal.getvalue()
    assert "MB/s" in terminal.getvalue() and terminal.getvalue().rsplit("\r", 2)[1].isspace()
    assert capsys.readouterr().out == ""
