"""The engine of every dataset: whatever the number of processes, the kills, the duplicates, the same files."""

import collections
import gzip
import hashlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest
from conftest import ROOT, environment, run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from blockgpt.data import sources as sources_module
from blockgpt.data import writer
from blockgpt.data.dataset import open_dataset
from blockgpt.data.loader import TrainBatches
from blockgpt.data.prepare import Progress, prepare, write_dataset
from blockgpt.data.sources import file_partitions
from blockgpt.data.tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer
from blockgpt.data.writer import Recipe
from blockgpt.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@dataclass(frozen=True)
class Part:
    """Documents in memory, as a part."""

    texts: tuple

    def identity(self):
        return self.texts

    def documents(self, skipped):
        return ((None, text) for text in self.texts)


def run(out_dir, parts, tokenizer=None, workers=1, shard_tokens=2**28, **recipe):
    recipe = Recipe(**{"val_fraction": 0.2, **recipe})
    return prepare(out_dir, tokenizer or ByteTokenizer(), parts, source="a test", recipe=recipe, workers=workers,
                   shard_tokens=shard_tokens)


def parts_of(texts, n=7):
    return [Part(tuple(texts[i:i + n])) for i in range(0, len(texts), n)]


def documents(directory, split):
    """The texts of a prepared split of bytes."""
    meta = json.loads((directory / "meta.json").read_text())
    ids = np.concatenate([np.fromfile(directory / f, "<u2") for f in sorted(meta["splits"][split]["files"])])
    return [bytes(d[d < 256].astype(np.uint8)).decode() for d in np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1]]


def tree(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def refusal(action, *args, **kwargs):
    with pytest.raises(DataError) as raised:
        action(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


TEXTS = [f"document {i}\n" + "x" * (i % 13) for i in range(200)]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A folder of files that makes several parts."""
    monkeypatch.setattr(sources_module, "PARTITION_BYTES", 5000)
    (tmp_path / "corpus").mkdir()
    for i in range(40):
        lines = [json.dumps({"text": f"{i} {j} {hashlib.md5(bytes([i, j])).hexdigest() * 3}"}) for j in range(15)]
        (tmp_path / f"corpus/{i:02}.jsonl").write_text("\n".join(lines))
    return tmp_path / "corpus"


# What comes out


@settings(max_examples=40)
@given(texts=st.lists(TEXT, min_size=2, max_size=60), n=st.integers(1, 9), fraction=st.floats(0.05, 0.95))
def test_each_document_comes_out_once_in_order(tmp_path_factory, texts, n, fraction):
    out = tmp_path_factory.mktemp("x")
    first = list(dict.fromkeys(texts))
    try:
        meta = run(out, parts_of(texts, n), val_fraction=fraction)
    except DataError as error:
        assert "split would be empty" in str(error) and not any(out.iterdir())
        return
    train, val = documents(out, "train"), documents(out, "val")
    assert set(train) | set(val) == set(first) and len(train) + len(val) == len(first)
    assert train == [t for t in first if t in set(train)] and val == [t for t in first if t in set(val)]
    assert meta["skipped"]["duplicate"] == len(texts) - len(first)
    assert meta["splits"]["val"]["bytes"] == sum(len(t.encode()) for t in val)


def test_the_number_of_processes_changes_nothing(tmp_path, corpus):
    parts = file_partitions([str(corpus)])
    assert len(parts) > 5
    for workers in (1, 2, 3):
        run(tmp_path / f"w{workers}", parts, workers=workers)
    assert tree(tmp_path / "w1") == tree(tmp_path / "w2") == tree(tmp_path / "w3")
    assert sorted(tree(tmp_path / "w1")) == ["meta.json", "train.bin", "val.bin"]


def test_a_document_stays_in_its_split_when_others_come_and_go(tmp_path):
    run(tmp_path / "a", parts_of(TEXTS, 7))
    run(tmp_path / "b", parts_of([*TEXTS[100:], "new"], 31))
    a, b = (set(documents(tmp_path / name, "val")) for name in "ab")
    assert a & set(TEXTS[100:]) == b - {"new"}
    assert 20 < len(a) < 60  # 40 of 200 expected


def test_duplicates_are_found_bucket_by_bucket(tmp_path, monkeypatch):
    texts = [f"text {i % 70}" for i in range(300)]
    run(tmp_path / "a", parts_of(texts))
    monkeypatch.setattr(writer, "DEDUP_ROWS", 32)
    run(tmp_path / "b", parts_of(texts))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    run(tmp_path / "c", parts_of(texts), deduplicate=False)
    kept = documents(tmp_path / "c", "train") + documents(tmp_path / "c", "val")
    assert collections.Counter(kept) == collections.Counter(texts)


@pytest.mark.parametrize("shard_tokens", [1, 50, 777])
def test_shards_hold_whole_documents_and_read_as_one(tmp_path, monkeypatch, shard_tokens):
    monkeypatch.setattr(writer, "COPY_TOKENS", 64)
    run(tmp_path / "one", parts_of(TEXTS))
    meta = run(tmp_path / "many", parts_of(TEXTS), shard_tokens=shard_tokens)
    files = meta["splits"]["train"]["files"]
    assert len(files) > 3 and all(name == f"train_{i:05}.bin" for i, name in enumerate(files))
    for split in ("train", "val"):
        assert documents(tmp_path / "one", split) == documents(tmp_path / "many", split)
    for name, entry in files.items():
        ids = np.fromfile(tmp_path / "many" / name, "<u2")
        assert ids[-1] == 256 and len(ids) * 2 == entry["size"] and len(ids) <= shard_tokens + 64 + 30
    d = open_dataset("many", tmp_path)
    assert np.concatenate(d.shards["train"]).tolist() == np.fromfile(tmp_path / "one/train.bin", "<u2").tolist()


def test_shards_of_an_older_dataset_go(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "COPY_TOKENS", 64)
    run(tmp_path / "x", parts_of(TEXTS), shard_tokens=100)
    (tmp_path / "x/mine.txt").write_text("stays")
    run(tmp_path / "x", parts_of(TEXTS[:50]))
    assert sorted(tree(tmp_path / "x")) == ["meta.json", "mine.txt", "train.bin", "val.bin"]


def test_by_position_the_end_of_each_document_is_val(tmp_path):
    run(tmp_path, [Part(("abcdefghij", "0123456789"))], by_position=True)
    assert documents(tmp_path, "train") == ["abcdefgh", "01234567"] and documents(tmp_path, "val") == ["ij", "89"]


def test_without_separators_documents_run_together(tmp_path):
    meta = run(tmp_path, parts_of(TEXTS), separate=False)
    assert meta["eot"] is None and not (np.fromfile(tmp_path / "train.bin", "<u2") == 256).any()


def test_what_filters_and_tokenizer_refuse_is_counted(tmp_path):
    texts = [*TEXTS, "short", "é" * 20, "é" * 21]
    characters = CharTokenizer("".join(TEXTS))
    meta = run(tmp_path, parts_of(texts), characters, filters={"min_chars": 10})
    assert meta["skipped"] == {"duplicate": 0, "filter_min_chars": 1, "not_encodable": 2}
    assert meta["recipe"]["filters"] == {"min_chars": "10"}
    message = refusal(run, tmp_path / "none", [Part(("é" * 20,))], characters)
    assert "1 not_encodable" in message and "'é' is not among" in message


def test_a_trained_tokenizer_goes_with_the_dataset(tmp_path, pieces, sources):
    model = load_tokenizer(str(pieces))
    write_dataset(tmp_path / "x", model, [("train", sources[0]), ("val", sources[1].replace("▁", ""))], source="a test")
    d = open_dataset("x", tmp_path)
    from blockgpt.data.tokenizer import from_meta
    again = from_meta(d.meta["tokenizer"])
    assert again.decode(d.shards["train"][0].tolist()) == sources[0] and d.meta["eot"] == again.eot == 1


def test_tiny_shakespeare_has_nanogpts_counts(tmp_path, gpt2, tinyshakespeare):
    done = run_python(ROOT / "data/shakespeare/prepare.py", "--source", tinyshakespeare, "--out_dir", tmp_path / "x")
    assert done.returncode == 0, done.stderr
    d = open_dataset("x", tmp_path)
    assert (d.tokens("train"), d.tokens("val"), d.vocab_size) == (301_966, 36_059, 50_257)


# Memory


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "PARTITION_BYTES", 2**20)
    monkeypatch.setattr(writer, "COPY_TOKENS", 2**16)
    line = json.dumps({"text": "word " * 2000}) + "\n"
    with open(tmp_path / "x.jsonl", "w") as file:
        for i in range(2000):
            file.write(line.replace("word", f"w{i}", 1))  # 20 MB
    parts = file_partitions([str(tmp_path / "x.jsonl")])
    tracemalloc.start()
    run(tmp_path / "x", parts)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20


# Failures


def files_command(corpus, out_dir, *flags):
    return [ROOT / "data/files/prepare.py", "--name=x", "--input", corpus, "--out_dir", out_dir, "--tokenizer=byte",
            "--val_fraction=0.2", *flags]


SMALL_PARTS = ("import sys, runpy; sys.path.insert(0, {root!r}); sys.argv.pop(0); import blockgpt.data.sources; "
               "blockgpt.data.sources.PARTITION_BYTES = 5000; {more}\nrunpy.run_path(sys.argv[0], run_name='__main__')")


def small_parts(corpus, out_dir, *flags, more=""):
    """data/files/prepare.py in a process of its own with small parts; `more`: code to run first."""
    code = SMALL_PARTS.format(root=str(ROOT), more=more)
    return ["-c", code, *map(str, files_command(corpus, out_dir, *flags))]


def start(*command, cwd=None):
    return subprocess.Popen([sys.executable, *command], cwd=cwd, env=environment(), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


SLOW = "import blockgpt.data.writer as writer, time; old = writer.finish_partition; import blockgpt.data.prepare\n" \
       "def slow(*a): old(*a); print('done', flush=True); time.sleep(0.2)\n" \
       "blockgpt.data.prepare.finish_part = slow\n" \
       "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # ignored where a shell says so


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_what_was_done_before_a_kill_is_not_done_again(tmp_path, corpus, how):
    out = tmp_path / "x"
    child = start(*small_parts(corpus, out, "--workers=1", more=SLOW))
    for _ in range(3):
        assert child.stdout.readline() == "done\n"
    child.send_signal(how)
    _, err = child.communicate()
    assert child.returncode == (-how if how == signal.SIGKILL else 130) and "Traceback" not in err
    assert not (out / "meta.json").exists()
    (work,) = out.glob(".parts.*.tmp")
    done = {p.name: p.stat().st_mtime_ns for p in work.glob("*.json")}
    assert 3 <= len(done) <= 4
    assert "x" in refusal(open_dataset, "x", tmp_path)  # a half-made dataset never looks whole

    again = run_python(*small_parts(corpus, out, "--workers=1", more=SLOW))
    assert again.returncode == 0, again.stderr
    parts = len(file_partitions([str(corpus)]))
    assert f"going on: {len(done)} of {parts} parts were done" in again.stdout
    assert again.stdout.count("done\n") - 1 == parts - len(done)
    whole = run_python(*small_parts(corpus, tmp_path / "whole", "--workers=1"))
    assert whole.returncode == 0
    a, b = tree(out), tree(tmp_path / "whole")
    assert sorted(a) == sorted(b) and a["train.bin"] == b["train.bin"] and a["val.bin"] == b["val.bin"]


def test_a_kill_when_all_is_written_leaves_nothing_behind(tmp_path, corpus):
    stuck = "import blockgpt.data.prepare, threading\ndef stuck(*a): print('written', flush=True); threading.Event().wait()\n" \
            "blockgpt.data.prepare.publish = stuck"
    out = tmp_path / "x"
    child = start(*small_parts(corpus, out, "--workers=1", "--shard_tokens=5000", more=stuck))
    assert child.stdout.readline() == "written\n"
    child.kill()
    child.communicate()
    again = run_python(*small_parts(corpus, out, "--workers=1"))
    assert again.returncode == 0 and re.search(r"going on: (\d+) of \1 parts were done", again.stdout), again.stderr
    assert sorted(tree(out)) == ["meta.json", "train.bin", "val.bin"]


def test_workers_end_with_the_main_process(tmp_path, corpus):
    (tmp_path / "fault.py").write_text("import threading\ndef keep(text):\n    print('at work', flush=True)\n"
                                       "    threading.Event().wait()\n")
    child = start(*small_parts(corpus, tmp_path / "x", "--workers=2", "--filter=callable=fault:keep"), cwd=tmp_path)
    assert child.stdout.readline() == "at work\n"
    child.kill()
    child.communicate(timeout=60)  # to the end of the output, which the workers write to as well


def test_a_killed_worker_is_one_line_and_the_same_command_goes_on(tmp_path, corpus):
    out = tmp_path / "x"
    (tmp_path / "fault.py").write_text("import os\ndef keep(text):\n    if text.startswith('20 7 '):\n"
                                       "        os.kill(os.getpid(), 9)\n    return True\n")
    flags = ["--workers=2", "--filter=callable=fault:keep"]
    died = run_python(*small_parts(corpus, out, *flags), cwd=tmp_path)
    assert died.returncode == 2 and died.stderr.count("\n") == 1 and "a worker process was killed" in died.stderr
    (tmp_path / "fault.py").write_text("def keep(text):\n    return True\n")
    again = run_python(*small_parts(corpus, out, *flags), cwd=tmp_path)
    assert again.returncode == 0 and "parts were done" in again.stdout, again.stderr
    assert sorted(tree(out)) == ["meta.json", "train.bin", "val.bin"]


def test_a_file_that_cannot_be_read_is_one_line_and_mended_the_rest_goes_on(tmp_path, corpus, capsys):
    bad = corpus / "99.jsonl.gz"
    good = gzip.compress(b'{"text": "the last document"}\n' * 50)
    bad.write_bytes(good[:-12])
    out = tmp_path / "x"
    message = refusal(run, out, file_partitions([str(corpus)]))
    assert str(bad) in message and message.endswith("(the parts done are kept: the same command goes on)")
    assert [p.name[:7] for p in out.iterdir()] == [".parts."]
    bad.write_bytes(good)
    meta = run(out, file_partitions([str(corpus)]))
    assert sum(s["documents"] for s in meta["splits"].values()) == 601
    done, total = map(int, re.search(r"going on: (\d+) of (\d+) parts", capsys.readouterr().out).groups())
    assert done == total - 1 > 5


def test_a_full_disk_is_one_line_and_with_room_the_same_command_goes_on(tmp_path, corpus):
    """A limit on file size stands for the disk. The parts fit below it, the shard does not."""
    out = tmp_path / "x"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    full = run_python(*small_parts(corpus, out, "--workers=1", more=limit))
    assert full.returncode == 2 and full.stderr.count("\n") == 1, full.stderr
    assert f"{out}: cannot be written: File too large" in full.stderr and "what was done is kept" in full.stderr
    assert [p.name[:7] for p in out.iterdir()] == [".parts."]
    again = run_python(*small_parts(corpus, out, "--workers=1"))
    assert again.returncode == 0 and "going on: " in again.stdout
    assert sorted(tree(out)) == ["meta.json", "train.bin", "val.bin"]


def test_two_that_prepare_the_same_do_not_meet(tmp_path, corpus):
    out = tmp_path / "x"
    child = start(*small_parts(corpus, out, "--workers=1", more=SLOW))
    assert child.stdout.readline() == "done\n"
    second = run_python(*small_parts(corpus, out, "--workers=1"))
    assert second.returncode == 2 and "another process is preparing the same" in second.stderr
    child.communicate()
    assert child.returncode == 0 and (out / "meta.json").exists()


def test_the_work_of_a_process_killed_long_ago_is_removed(tmp_path, corpus):
    old = tmp_path / "x/.parts.1a2b.tmp"
    old.mkdir(parents=True)
    (old / "0000000.ids").write_bytes(b"1234")
    run(tmp_path / "x", parts_of(TEXTS))
    assert old.exists()
    for path in (old / "0000000.ids", old):
        os.utime(path, (time.time() - 2 * writer.STALE,) * 2)
    run(tmp_path / "x", parts_of(TEXTS))
    assert not old.exists()


def test_work_that_can_go_on_is_kept_however_old_it_is(tmp_path, corpus, capsys):
    bad = corpus / "99.jsonl.gz"
    bad.write_bytes(b"no gzip")
    refusal(run, tmp_path / "x", file_partitions([str(corpus)]))
    (work,) = (tmp_path / "x").glob(".parts.*.tmp")
    for path in (*work.iterdir(), work):
        os.utime(path, (time.time() - 9 * writer.STALE,) * 2)
    bad.unlink()
    run(tmp_path / "x", file_partitions([str(corpus)]))
    assert "going on: " in capsys.readouterr().out


def test_progress_tells_parts_tokens_and_speed(capsys):
    progress = Progress(10, 2)
    progress.advance(500, 800)
    assert capsys.readouterr().out == ""  # not at every document
    progress.started, progress.shown = progress.started - 10, progress.shown - 60
    progress.part_done()
    line = capsys.readouterr().out
    assert "part 3/10" in line and " 500 tokens" in line and re.search(r" (49|50) tokens/s +0\.0 MB/s", line)


# The commands


def test_files_are_prepared_and_trained_on(tmp_path, pieces):
    """This repository's own sources, by a tokenizer of their own."""
    done = run_python(ROOT / "data/files/prepare.py", "--name=own", "--input", ROOT / "docs", f"{ROOT}/*.py", f"{ROOT}/blockgpt",
                      "--out_dir", tmp_path / "own", "--tokenizer", pieces, "--workers=2", "--val_fraction=0.3")
    assert done.returncode == 0, done.stderr
    d = open_dataset("own", tmp_path)
    assert d.meta["splits"]["train"]["documents"] > 10 and 1.5 < d.bytes_per_token("train") < 4
    assert "--name=own" in d.meta["command"]
    TrainBatches(d, 0, 64, 4).micro_batch(0)
    trained = run_python(ROOT / "train.py", "--dataset=own", f"--data_dir={tmp_path}", "--n_layer=1", "--n_head=2",
                         "--n_embd=16", "--block_size=32", "--max_iters=3", "--device=cpu", "--run_name=r",
                         "--eval_tokens=64", "--mfu_peak=1", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    sample = run_python(ROOT / "sample.py", f"--run={tmp_path}/runs/r", "--prompt=def main(", "--max_new_tokens=5",
                        "--device=cpu")
    assert sample.returncode == 0 and sample.stdout.startswith("def main("), sample.stderr


@pytest.mark.parametrize("name, flags", [("fineweb", ["--sample=100BT"]), ("openwebtext", []), ("openwebmath", []),
                                         ("tinystories", [])])
def test_a_hub_corpus_is_prepared_from_a_local_copy(tmp_path, monkeypatch, name, flags):
    """The scripts' own road through `datasets`, on a folder laid out as the repository on the hub is."""
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
