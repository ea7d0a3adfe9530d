"""Sources: every file format gives its documents unchanged, also when a large file is read in several spans."""

import csv
import gzip
import http.server
import json
import os
import re
import shutil
import threading

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unprivileged import run_unprivileged

from blockgpt.data import hub, readers, sources
from blockgpt.data.hub import hub_partitions
from blockgpt.data.losses import Skipped
from blockgpt.data.sources import file_partitions
from blockgpt.errors import DataError

TEXTS = ["First document.\nTwo lines.\n", "Żółw 🐢\r\n\tend", 'with, "commas"\nand \\n', " ", "last"]


def read(patterns, **more):
    """(texts, skipped) of all partitions of the files."""
    skipped = Skipped(max_loss=1)
    partitions = file_partitions(list(map(str, patterns)), **more)
    pairs = [pair for partition in partitions for pair in partition.documents(skipped)]
    assert all(split is None for split, _ in pairs)
    return [text for _, text in pairs], dict(skipped)


def refusal(action, *args, **kwargs):
    with pytest.raises(DataError) as raised:
        action(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def as_jsonl(texts, key="text"):
    return "".join(json.dumps({key: t, "n": 1}) + "\n" for t in texts).encode()


def write_csv(path, texts, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerows([["id", "text"], *((i, t) for i, t in enumerate(texts))])


def write_parquet(path, texts, key="text", row_group_size=2):
    table = pyarrow.table({key: pyarrow.array(texts, pyarrow.string()), "n": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson.gz", "x.jsonl.zst", "x.csv", "x.tsv", "x.csv.gz", "x.parquet",
                                  "x.JSONL.GZ"])
def test_every_format_gives_the_texts_unchanged(tmp_path, name):
    path = tmp_path / name
    if "parquet" in name:
        write_parquet(path, TEXTS)
    elif "csv" in name or "tsv" in name:
        write_csv(tmp_path / "plain", TEXTS, "\t" if "tsv" in name else ",")
        path.write_bytes((tmp_path / "plain").read_bytes())
    else:
        path.write_bytes(as_jsonl(TEXTS))
    if name.lower().endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()[:20]) + gzip.compress(path.read_bytes()[20:]))  # two members
    if name.endswith(".zst"):
        path.write_bytes(zstd(path.read_bytes()))
    assert read([path]) == (TEXTS, {})


def test_a_text_file_is_one_document_and_paths_are_sorted(tmp_path):
    for name, content in {"b.md": b"b\r\n", "a.py": b"a", "sub/c.txt": b"c", "sub/d.txt.gz": gzip.compress(b"d"),
                          "e.html.zst": zstd("ż".encode()), ".hidden": b"no", "empty": b"", "latin": b"\xe9"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert read([tmp_path]) == (["a", "b\r\n", "ż", "c", "d"], {"empty": 1, "not_utf8": 1})
    assert read([f"{tmp_path}/**/*.txt*", f"{tmp_path}/sub/c.txt"])[0] == ["c", "d"]  # each once
    assert read([f"{tmp_path}/.hidden"])[0] == ["no"]


def test_lines_without_text_are_counted(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n\nnot json\n{"text": 3}\n[1]\n{"no": "b"}\n{"text": ""}\n'
                                       + b"[" * 100_000 + b'\n{"text": "\xff"}\n{"text": "z"}')
    assert read([tmp_path / "x.jsonl"]) == (["a", "z"], {"not_json": 3, "no_text": 3, "empty": 1})


def test_text_key_names_the_field(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(as_jsonl(TEXTS, "content"))
    write_parquet(tmp_path / "x.parquet", [*TEXTS, None], "content")
    assert read([tmp_path], text_key="content") == (TEXTS * 2, {"no_content": 1})
    assert "no column 'contents' (did you mean content?)" in refusal(read, [f"{tmp_path}/*.parquet"],
                                                                     text_key="contents")
    write_csv(tmp_path / "x.csv", TEXTS)
    assert "no column 'body' (one of id, text)" in refusal(read, [tmp_path / "x.csv"], text_key="body")


@settings(max_examples=30)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), max_size=30),
       size=st.integers(1, 200), suffix=st.sampled_from(["jsonl", "parquet"]), ended=st.booleans())
def test_a_large_file_in_spans_gives_each_document_once(tmp_path_factory, texts, size, suffix, ended):
    path = tmp_path_factory.mktemp("spans") / f"x.{suffix}"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sources, "PARTITION_BYTES", size)
        if suffix == "parquet":
            write_parquet(path, texts)
        else:
            path.write_bytes(as_jsonl(texts) if ended else as_jsonl(texts)[:-1])
        assert read([path]) == (texts, {})
        if size < 20 and len(texts) > 2:
            assert len(file_partitions([str(path)])) > 1


@settings(max_examples=50)
@given(content=st.text("ab\nż", min_size=1, max_size=200), size=st.integers(1, 60), longest=st.integers(8, 40))
def test_a_large_text_is_split_between_characters_and_loses_none(tmp_path_factory, content, size, longest):
    path = tmp_path_factory.mktemp("cut") / "x.txt"
    path.write_text(content)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sources, "PARTITION_BYTES", size)
        monkeypatch.setattr(readers, "MAX_DOCUMENT", longest)
        texts, skipped = read([path])
    assert "".join(texts) == content and not skipped
    assert all(len(t.encode()) <= 3 * longest for t in texts)


def test_a_csv_field_may_be_as_long_as_a_document(tmp_path):
    csv.field_size_limit(131_072)  # Python's default, which applies to the whole process
    texts = ["x" * 131_073, "short"]
    write_csv(tmp_path / "x.csv", texts)
    assert read([tmp_path / "x.csv"]) == (texts, {})


def test_a_line_longer_than_a_document_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT", 50)
    (tmp_path / "x.jsonl").write_bytes(as_jsonl(["a", "x" * 500, "b"]))
    assert read([tmp_path / "x.jsonl"]) == (["a", "b"], {"too_long": 1})


@pytest.mark.parametrize("name, content, words", [
    ("x.jsonl.gz", gzip.compress(as_jsonl(TEXTS * 50))[:-9], "cannot be read: Compressed file ended"),
    ("x.txt.gz", b"no gzip", "is not gzip: its content is text"),
    ("x.jsonl.zst", zstd(as_jsonl([str(i) for i in range(9999)]))[:-9], "cannot be read: "),
    ("x.zst", b"no zstd", "is not zstd: its content is text"),
    ("x.parquet", b"no parquet", "is not a parquet file: "),
    ("x.parquet.gz", b"", "is a compressed parquet file"),
    ("x.csv", b"", "no column 'text'"),
])
def test_a_damaged_file_is_a_one_line_error_that_names_it(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    message = refusal(read, [tmp_path / name])
    assert message.startswith(f"{tmp_path / name}: ") and words in message


def test_a_damaged_parquet_is_a_one_line_error(tmp_path):
    write_parquet(tmp_path / "x.parquet", TEXTS * 100)
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    content[4:2000] = bytes(1996)  # the pages, not the footer
    (tmp_path / "x.parquet").write_bytes(content)
    assert str(tmp_path / "x.parquet") in refusal(read, [tmp_path / "x.parquet"])


def test_a_pattern_that_matches_nothing_is_a_one_line_error(tmp_path):
    assert "no such file" in refusal(file_partitions, [f"{tmp_path}/*.txt"])
    assert "no such file" in refusal(file_partitions, [str(tmp_path)])  # an empty folder


def test_small_files_share_a_partition_which_changes_with_any_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PARTITION_BYTES", 100)
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("x" * 40)
    partitions = file_partitions([str(tmp_path)])
    assert [len(p.spans) for p in partitions] == [2, 2, 2, 2, 2]
    before = [p.identity() for p in partitions]
    (tmp_path / "5.txt").write_text("y" * 41)
    changed = [a != b for a, b in zip(before, (p.identity() for p in file_partitions([str(tmp_path)])), strict=True)]
    assert changed == [False, False, True, False, False]


@pytest.mark.parametrize("change", ["size", "time", "path", "text_key"])
def test_a_partition_is_identified_by_path_size_and_time(tmp_path, change):
    path = tmp_path / "x.jsonl"
    path.write_text("abc")
    (before,) = file_partitions([str(tmp_path)])
    if change == "size":
        path.write_text("abcd")
        os.utime(path, ns=(before.spans[0].mtime_ns,) * 2)
    elif change == "time":
        os.utime(path, ns=(before.spans[0].mtime_ns + 1000,) * 2)
    elif change == "path":
        path.rename(tmp_path / "y.jsonl")
    (after,) = file_partitions([str(tmp_path)], "body" if change == "text_key" else "text")
    assert after.identity() != before.identity()


def test_large_and_small_files_are_read_in_the_order_of_their_paths(tmp_path, monkeypatch):
    for name, n in {"a.jsonl": 1, "b.jsonl": 30, "c.jsonl": 1, "d.jsonl": 1}.items():
        (tmp_path / name).write_bytes(as_jsonl([f"{name} {i}" for i in range(n)]))
    whole = read([tmp_path])[0]
    monkeypatch.setattr(sources, "PARTITION_BYTES", 100)
    assert read([tmp_path])[0] == whole == sorted(whole, key=lambda text: text.split()[0])


def test_text_in_another_encoding_is_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT", 50)
    (tmp_path / "x.txt").write_bytes(b"\x80" * 1000)
    texts, skipped = read([tmp_path])
    assert texts == [] and skipped["not_utf8"] > 1


# The hub: the same library and code, on local files


def hub_texts(partitions):
    skipped = Skipped(max_loss=1)
    return [pair for partition in partitions for pair in partition.documents(skipped)], skipped


def test_a_hub_dataset_has_a_partition_per_file(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_bytes(as_jsonl([f"{i}a", "", f"{i}b"]))
    partitions = hub_partitions("json", data_files=tuple(f"{tmp_path}/{i}.jsonl" for i in range(3)), into="val")
    assert len(partitions) == 3 and len({json.dumps(p.identity()) for p in partitions}) == 3
    texts, skipped = hub_texts(partitions)
    assert sorted(texts) == sorted(("val", f"{i}{c}") for i in range(3) for c in "ab") and skipped["empty"] == 3
    partitions = hub_partitions("json", data_files=f"{tmp_path}/0.jsonl", text_key="body")
    assert "no column 'body'" in refusal(hub_texts, partitions)


@pytest.mark.parametrize("closed, words", [
    (0o000, "data/b: cannot be read: Permission denied"), (0o444, "data/b/0.jsonl: cannot be read: Permission denied"),
    ("/no/such/disk", "data/b: is a link to /no/such/disk, which does not exist")])
def test_a_closed_folder_of_a_local_copy_is_an_error_and_its_files_are_never_left_out(tmp_path, closed, words):
    for folder in "ab":
        (tmp_path / "data" / folder).mkdir(parents=True)
        (tmp_path / "data" / folder / "0.jsonl").write_bytes(as_jsonl(["text"]))
    if isinstance(closed, str):
        shutil.rmtree(tmp_path / "data/b")
        (tmp_path / "data/b").symlink_to(closed)
    else:
        (tmp_path / "data/b").chmod(closed)
    for more in ({}, {"path": "json", "data_files": (f"{tmp_path}/data/a", f"{tmp_path}/data")}):
        message = run_unprivileged(lambda more=more: hub_partitions(**{"path": str(tmp_path)} | more))
        assert message.startswith(f"UserError: {tmp_path}/{words}"), message


class InterruptedHandler(http.server.BaseHTTPRequestHandler):
    """Serves a file, and closes the connection in the middle of it for the first `cuts` requests."""

    content, cuts, requests = b"", 0, 0

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self):
        cls, start, stop = type(self), 0, len(self.content)
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(stop, int(last) + 1) if last else stop
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(self.content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        cls.requests += 1
        if stop - start > 10_000 and cls.cuts:
            cls.cuts -= 1
            self.wfile.write(self.content[start:start + (stop - start) // 2])
            self.wfile.flush()
            self.connection.close()
            return
        self.wfile.write(self.content[start:stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A local server with network failures; retries of the libraries and of our code do not wait."""
    import datasets

    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 1)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    monkeypatch.setattr(hub, "RETRY_SECONDS", 0.0)
    content = as_jsonl([f"document {i} " + "x" * 80 for i in range(4000)])
    handler = type("Handler", (InterruptedHandler,), {"content": content})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{server.server_port}/x.jsonl"
        server.shutdown()


def test_reading_continues_where_the_network_failed(server):
    handler, url = server
    partitions = hub_partitions("json", data_files=url)
    handler.cuts = 2
    texts, _ = hub_texts(partitions)
    assert [t.split()[1] for _, t in texts] == [str(i) for i in range(4000)] and handler.cuts == 0


class FailingDataset:
    """A streamed dataset of four rows. Reading fails `failures` times before every row, and before the end."""

    def __init__(self, failures):
        self.failures, self.remaining, self.position = failures, failures, 0

    def shard(self, count, index):
        return self

    def state_dict(self):
        return self.position

    def load_state_dict(self, state):
        self.position = state

    def __iter__(self):
        return self

    def __next__(self):
        if self.remaining:
            self.remaining -= 1
            raise ConnectionError("reset by peer")
        self.remaining = self.failures
        if self.position == 4:
            raise StopIteration
        self.position += 1
        return {"text": f"row {self.position}"}


@pytest.mark.parametrize("more", [-1, 0])
def test_only_failures_in_a_row_count(monkeypatch, more):
    dataset, waits = FailingDataset(hub.ATTEMPTS + more), []
    monkeypatch.setattr(hub, "hub_dataset", lambda arguments: dataset)
    monkeypatch.setattr(hub.time, "sleep", waits.append)
    partition = hub.HubPartition((("path", "x"),), "text", 0, 1)
    if more < 0:
        assert [text for _, text in hub_texts([partition])[0]] == [f"row {i}" for i in range(1, 5)]
        assert waits == [2.0, 4.0, 8.0, 16.0] * 5
    else:
        assert "ConnectionError: reset by peer" in refusal(hub_texts, [partition])
        assert waits == [2.0, 4.0, 8.0, 16.0]


def test_a_permanent_network_failure_is_a_one_line_error(server):
    handler, url = server
    partitions = hub_partitions("json", data_files=url)
    handler.cuts = 10**6
    message = refusal(hub_texts, partitions)
    assert message.startswith("json train: cannot be read any further: ")


def test_an_unreachable_hub_dataset_is_a_one_line_error(tmp_path):
    assert re.search("cannot be opened: .*--source", refusal(hub_partitions, f"{tmp_path}/nothing"))
