"""What people bring: each kind of file is read, or refused by name; nothing is taken for text that is none."""

import asyncio
import base64
import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import re
import resource
import shutil
import struct
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
from dataset_helpers import refusal
from hypothesis import given
from hypothesis import strategies as st
from prepare_helpers import MemoryPartition, run_prepare
from test_sources import read, write_csv
from test_tokenizer import hf_json
from unprivileged import run_unprivileged

from blockgpt.data import filters, readers
from blockgpt.data.commands import add_input, command_parser
from blockgpt.data.dataset import open_dataset
from blockgpt.data.filters import parse_filters
from blockgpt.data.formats import COMPRESSIONS, SIGNATURES, UnknownFormat, recognize
from blockgpt.data.hub import hub_partitions
from blockgpt.data.losses import Skipped
from blockgpt.data.sources import file_partitions, read_or_download
from blockgpt.data.token_files import memory_map
from blockgpt.data.tokenizer import HFTokenizer, load_tokenizer, pack_bytes
from blockgpt.errors import DataError, UserError

TEXTS = ["first, with a comma", "second\nof two lines", "żółw 🐢"]
OBJECTS = [{"text": t, "id": i} for i, t in enumerate(TEXTS)]
LINES = "".join(json.dumps(o) + "\n" for o in OBJECTS)
JSON = {"lines": LINES, "array": json.dumps(OBJECTS), "indented": json.dumps(OBJECTS, indent=2),
        "strings": json.dumps(TEXTS), "objects": "\n".join(json.dumps(o, indent=1) for o in OBJECTS)}
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


# Formats


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name, content", [*((f"{kind}.json", text) for kind, text in JSON.items()),
                                           *((f"x{s}", LINES) for s in (".jsonl", ".jsonlines", ".jl", ".ndjson")),
                                           ("0f9a8b", LINES), ("part-00000", LINES), ("x.txt", LINES),
                                           ("x.bak", LINES), ("x.ldjson", LINES), ("x.geojson", JSON["array"]),
                                           ("x.txt", JSON["indented"])])
def test_json_is_read_whatever_its_form(tmp_path, name, content, compression):
    (tmp_path / (name + compression)).write_bytes(COMPRESS[compression](content.encode()))
    assert read([tmp_path]) == (TEXTS, {})


@given(values=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)),
       indent=st.sampled_from([None, 2]))
def test_a_json_array_gives_each_text(tmp_path_factory, values, indent):
    path = tmp_path_factory.mktemp("json") / "x.json"
    path.write_text(json.dumps([{"text": v, "n": {"text": 1}} for v in values], indent=indent, ensure_ascii=False))
    assert read([path]) == (values, {})


@pytest.mark.parametrize("content, words", [
    ('[{"text": "a"}, {"text": "b"', "is not json after 1 records"),
    ('[{"text": "a"} {"text": "b"}]', "after 1 records"),
    ('[{"text": "a"}] more', "after its array of 1 elements"), ('[{"text": "a", "text": "b"}]', "two fields 'text'"),
    ('{"data": [1]}', "no field 'text' but 'data'"), ('[' * 9999, "json"), ("not json", "is not json after 0 records")])
def test_damaged_json_is_a_one_line_error_that_names_file_and_record(tmp_path, content, words):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError) as raised:
        list(file_partitions([str(tmp_path)])[0].documents(Skipped()))
    assert words in str(raised.value) and "x.json" in str(raised.value) and "\n" not in str(raised.value)


def archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("a.txt", "text " * 999)
    return file.getvalue()


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tar_header(content):
    return (b"a.txt".ljust(257, b"\0") + b"ustar\0" + b"00").ljust(512, b"\0") + content


REFUSED = {"zip": archive(), "NumPy": saved(np.arange(99)), "pickle": pickle.dumps(["text"] * 9),
           "tar": tar_header(b"a" * 10**6), "SQLite": b"SQLite format 3\0" + b"text " * 9999,
           "PDF": b"%PDF-1.4\n1 0 obj\n" * 9, "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
           "UTF-16 text without a mark": "plain words\n".encode("utf-16-le") * 9,
           "UTF-16BE": "plain words\n".encode("utf-16-be") * 9, "UTF-32": "plain words\n".encode("utf-32-le") * 9,
           "no known format": bytes(range(256)) * 9}


@pytest.mark.parametrize("wrapped", [bytes, gzip.compress])
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("suffix", ["", ".txt", ".jsonl", ".csv"])
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name, suffix, wrapped):
    (tmp_path / f"x{suffix}").write_bytes(wrapped(REFUSED[name]))
    message = refusal(file_partitions, [str(tmp_path)])
    assert message.startswith(f"{tmp_path}/x{suffix}: is ") and name in message and "what can be read: text" in message


@pytest.mark.parametrize("first, offset, name, has_documents", SIGNATURES)
def test_every_signature_is_recognized(tmp_path, first, offset, name, has_documents):
    (tmp_path / "x").write_bytes((b"\1" * offset + first).ljust(600, b"\1"))
    if any(begin.match((tmp_path / "x").read_bytes()) for _, begin in COMPRESSIONS.values()):
        assert "x: cannot be read" in refusal(recognize, tmp_path / "x")  # compressed, but no more than a beginning
        return
    with pytest.raises(UnknownFormat) as raised:
        recognize(tmp_path / "x")
    assert raised.value.has_documents == has_documents


def test_images_and_programs_are_left_out_of_a_folder_with_a_warning_and_refused_if_named(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    assert read([tmp_path])[0] == ["text"]
    assert f"left out: {tmp_path}/0.png and 2 more files: an image" in capsys.readouterr().err
    assert "0.png: is an image" in refusal(file_partitions, [f"{tmp_path}/0.png"])


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=9))
def test_text_is_never_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "x.txt"
    path.write_bytes(text.encode())
    if not text.encode().startswith((b"%PDF-", b"%!PS", b"{\\rtf")):
        assert read([path])[0] == [text.removeprefix("\ufeff")]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["x.txt", "x.csv", "x.tsv", "x.json", "x.jsonl", "x.csv.gz"])
def test_a_mark_says_the_encoding_and_is_no_part_of_the_text(tmp_path, name, encoding):
    if "sv" in name:
        write_csv(tmp_path / "plain", TEXTS, "\t" if "tsv" in name else ",")
        content = (tmp_path / "plain").read_bytes().decode()
        (tmp_path / "plain").unlink()
    else:
        content = {"x.txt": TEXTS[1], "x.json": JSON["array"], "x.jsonl": LINES}[name]
    data = content.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read([tmp_path]) == (TEXTS if name != "x.txt" else [TEXTS[1]], {})


# Tables


TABLES = {  # name: (content, flags, texts or words of the error)
    "x.tsv opening quote": ('id\ttext\n1\ta\n2\t"b\n3\tc\n4\td\n', {},
                            "line 3: a quote opens a cell that does not end"),
    "x.tsv quote that ends later": ('id\ttext\n1\t"a\n2\tb\n3\tc"\n4\td\n', {}, "line 2: a quote takes in the rows"),
    "x.csv quote that ends later": ('id,text\n1,"a\n2,b\n3,c"\n4,d\n', {}, "line 2: a quote takes in the rows"),
    "x.tsv quote in another column": ('id\ttitle\ttext\n1\t"a\tA\n2\tb"\tB\n3\tc\tC\n', {},
                                      "line 2: a quote takes in the rows"),
    "x.csv quote in another column": ('id,title,text\n1,"a,A\n2,b",B\n3,c,C\n', {}, "line 2: a quote takes in the"),
    "x.tsv quote in the first column": ('text\tid\n"a\t1\nb\t2\nc"\t3\nd\t4\n', {}, "line 2: a quote takes in the"),
    "x.csv lines in another column": ('id,title,text\n1,"a\nb",A\n2,"c, d\n3",B\n', {}, ["A", "B"]),
    "x.tsv quotes": ('id\ttext\n1\ta\n2\t"b\n3\t"c"\n', {"quotes": False}, ["a", '"b', '"c"']),
    "x.csv two columns": ("text,text\na,b\n", {}, "has 2 columns 'text'"),
    "x.csv blank lines": ("\n\n\nid,text\n1,a\n\n2,b\n", {}, ["a", "b"]),
    "x.csv semicolons": ("id;text\n1;a, b\n2;c\n", {}, ["a, b", "c"]),
    "x.csv trailing commas": ("id,text\n1,a,\n2,b,,\n", {}, ["a", "b"]),
    "x.csv unquoted commas": ("id,text\n1,a, b\n2,c, d\n", {}, "2 of 2 records are lost, the first (cut_by_separator)"),
    "x.csv poem": ('id,text\n1,"Hello, world\nGoodbye, moon"\n', {}, ["Hello, world\nGoodbye, moon"]),
    "x.csv bad quotes": ('id,text\n1,"a"b\n2,c\n', {}, ["c"]),
    "x.csv not UTF-8": (b"id,text\n1,\xe9\n2,c\n", {}, ["c"])}


@pytest.mark.parametrize("name", TABLES)
def test_the_shape_of_a_table_is_checked(tmp_path, name):
    content, options, expected = TABLES[name]
    path = tmp_path / name.split()[0]
    path.write_bytes(content if type(content) is bytes else content.encode())

    def texts():
        return [t for p in file_partitions([str(path)], **options) for _, t in p.documents(Skipped())]
    if type(expected) is list:
        assert texts() == expected
    else:
        assert expected in refusal(texts)


def test_a_cell_larger_than_a_document_is_left_out_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT", 50)
    (tmp_path / "x.csv").write_text(f"id,text\n1,a\n2,{'x' * 60}\n3,b\n")
    assert read([tmp_path]) == (["a", "b"], {"too_long": 1})


@pytest.mark.parametrize("column, name", [([b"a"], "binary"), ([["a"]], "list<"), ([{"a": "b"}], "struct<"),
                                          ([1], "int64")])
def test_a_column_of_another_type_is_named(tmp_path, column, name):
    pyarrow.parquet.write_table(pyarrow.table({"text": column, "body": ["b"]}), tmp_path / "x.parquet")
    message = refusal(read, [tmp_path])
    assert f"column 'text' is of type {name}" in message and "columns of strings: body; --text_key" in message


# Losses


@pytest.mark.parametrize("lost, ended", [(4, False), (5, False), (6, True), (10, True)])
def test_a_file_that_is_mostly_lost_is_an_error_with_the_first_line(tmp_path, lost, ended, capsys):
    lines = ['{"broken'] * lost + [json.dumps({"text": f"text {i}"}) for i in range(10 - lost)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    partitions = file_partitions([str(tmp_path / "x.jsonl")])
    if ended:
        message = refusal(run_prepare, tmp_path / "out", partitions)
        assert f"{lost} of 10 records are lost" in message and "x.jsonl line 1: '{\"broken'" in message
        assert f"--max_loss={lost / 10:g}" in message
    else:
        run_prepare(tmp_path / "out", partitions, val_fraction=0.5)
        assert f"warning: {lost} lost (not_json), the first: {tmp_path}/x.jsonl line 1" in capsys.readouterr().err


def test_text_files_of_which_most_are_lost_name_the_first(tmp_path):
    for i in range(10):  # the last is not lost
        (tmp_path / f"{i}.txt").write_bytes(b"caf\xc3\xa9" if i in (0, 9) else b"caf\xe9")
    message = refusal(run_prepare, tmp_path / "out", file_partitions([str(tmp_path)]))
    assert "8 of 10 records are lost, the first (not_utf8) is " in message and "1.txt: byte 3 (line 1)" in message
    assert "iconv" in message


@pytest.mark.parametrize("empty, warns", [(10, False), (90, True)])
def test_a_file_whose_records_are_mostly_empty_is_a_warning(tmp_path, capsys, empty, warns):
    lines = [json.dumps({"text": f"text {i}" * (i >= empty)}) for i in range(100)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    run_prepare(tmp_path / "out", file_partitions([str(tmp_path / "x.jsonl")]), val_fraction=0.5)
    assert (f"x.jsonl: {empty} of its 100 records have no text" in capsys.readouterr().err) == warns


def test_the_fields_that_a_record_has_are_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"content": "a", "id": 1}\n')
    message = refusal(run_prepare, tmp_path / "out", file_partitions([str(tmp_path / "x.jsonl")]))
    assert "no field 'text' but 'content, id': --text_key" in message


def test_one_long_text_is_answered_with_by_position(tmp_path):
    assert "--by_position" in refusal(run_prepare, tmp_path / "out", [MemoryPartition(("a book",))])


def test_end_of_text_markers_in_text_are_counted(tmp_path, capsys):
    texts = [f"text {i}" + "<|endoftext|>" * (i % 4 == 0) for i in range(40)]
    run_prepare(tmp_path, [MemoryPartition(tuple(texts))])
    assert "warning: 10 documents contain an end-of-text marker" in capsys.readouterr().err


# Paths


def test_links_that_lead_back_end_and_give_each_file_once(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/x.txt").write_text("x")
    (tmp_path / "a/b/y.txt").write_text("y")
    for name in ("self", "up", "b/up", "b/up2"):
        (tmp_path / "a" / name).symlink_to(tmp_path / "a")
    (tmp_path / "a/z.txt").symlink_to("x.txt")
    for pattern in ("a", "a/**", "a/**/*.txt", "**/*.txt"):
        assert sorted(read([tmp_path / pattern])[0]) == ["x", "y"]


@pytest.mark.parametrize("make, words", [
    (lambda p: p.symlink_to("nowhere"), "is a link to nowhere, which cannot be read"),
    (lambda p: p.symlink_to(p.name), "which cannot be read: Too many levels"), (os.mkfifo, "is a pipe")])
@pytest.mark.parametrize("pattern", ["", "*", "**/*.txt", "odd.txt"])
def test_what_is_no_file_is_an_error_and_never_left_out(tmp_path, make, words, pattern):
    (tmp_path / "a.txt").write_text("a")
    make(tmp_path / "odd.txt")
    message = refusal(file_partitions, [str(tmp_path / pattern)])
    assert "odd.txt" in message and words in message


@pytest.mark.parametrize("read_it", [
    lambda path: load_tokenizer(f"{path}.json"), lambda path: read_or_download(path, "", ""),
    lambda path: open_dataset("d", path.parent)])
def test_no_pipe_is_waited_for(tmp_path, read_it):
    (tmp_path / "d").mkdir()
    for name in ("x", "x.json", "d/meta.json"):
        os.mkfifo(tmp_path / name)
    assert "is a pipe" in refusal(read_it, tmp_path / "x")


@pytest.mark.parametrize("closed, words", [
    (0o000, "sub: cannot be listed: Permission denied"), (0o444, "sub/deep: cannot be .*: Permission denied"),
    (0o111, "sub: cannot be listed: Permission denied"), ("/no/such/disk", "sub: is a link to /no/such/disk, which"),
    ("sub", "sub: is a link to sub, which cannot be read: Too many")])
@pytest.mark.parametrize("pattern", ["", "**", "**/*.txt", "*/*", "*/*/*.txt", "s*/**/*.txt"])
def test_a_folder_that_cannot_be_read_is_an_error_and_its_files_are_never_left_out(tmp_path, closed, words, pattern):
    """As soon as a pattern could match something below it, whatever its own name is."""
    for name in ("open/deep/a.txt", "sub/deep/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    if isinstance(closed, str):
        shutil.rmtree(tmp_path / "sub")
        (tmp_path / "sub").symlink_to(closed)
    else:
        (tmp_path / "sub").chmod(closed)
    message = run_unprivileged(lambda: file_partitions([str(tmp_path / pattern)]))
    assert message.startswith("DataError: ") and re.search(words, message), message


def test_a_dataset_is_no_input_of_itself_or_of_another(tmp_path, capsys):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    for out in (tmp_path / "out", tmp_path):  # below its input, and in the same folder
        metas = [run_prepare(out, file_partitions([str(tmp_path)])) for _ in range(2)]
        assert metas[0] == metas[1] and metas[0]["splits"]["train"]["documents"] < 20
    assert "contains a prepared dataset, whose files are left out" in capsys.readouterr().err


def test_a_hubs_cache_is_read_through_its_snapshots(tmp_path):
    for name, content in {"blobs/0a": LINES, "refs/main": "0a"}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    (tmp_path / "snapshots/1").mkdir(parents=True)
    (tmp_path / "snapshots/1/train.jsonl").symlink_to("../../blobs/0a")
    assert read([tmp_path]) == (TEXTS, {})


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "t.json").write_text(hf_json())
    assert read(["~/x.txt"])[0] == read(["~/*.txt"])[0] == ["x"]
    assert load_tokenizer("~/t.json").name == "hf"
    run_prepare(tmp_path / "d", [MemoryPartition(tuple(map(str, range(40))))])
    assert open_dataset("d", "~").vocab_size == 257


# Token files without a meta.json


IDS = np.arange(3, 2003) % 251
BARE = {"int32": IDS.astype("<i4").tobytes(), "int64": IDS.astype("<i8").tobytes(), "NumPy": saved(IDS.astype("<u2")),
        "text": b"To be, or not to be, that is the question. " * 9,
        "llm.c": struct.pack("<256i", 20240520, 1, *[0] * 254),
        "gzip": gzip.compress(b"text"), "zip": archive(), "a pickle": pickle.dumps(list(range(9999)), 4),
        "big-endian": IDS.astype(">u2").tobytes(),
        "big-endian int32": IDS.astype(">i4").tobytes(), "big-endian int64": IDS.astype(">i8").tobytes(),
        "pickle": pickle.dumps(list(range(9999)), 2), "is a pickle": pickle.dumps(IDS.astype("<u2"), 2),
        "is text": ("plus tard, très bien, " * 98).encode("latin-1"), "is text, ": ("words and " * 99).encode("utf-16"),
        "a header?": struct.pack("<128H", *[60000] * 128) + IDS.astype("<u2").tobytes()}


@pytest.mark.parametrize("name", BARE)
def test_what_is_no_file_of_token_ids_is_told_at_a_glance(tmp_path, name):
    (tmp_path / "x").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"x/{split}.bin").write_bytes(BARE[name])
    message = refusal(open_dataset, "x", tmp_path, vocab_size=257)
    assert "x/train.bin: " in message and name in message


def test_text_in_utf_16_is_no_file_of_token_ids_of_a_large_vocabulary(tmp_path):
    (tmp_path / "x").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"x/{split}.bin").write_bytes(b"To be, or not to be.\n".decode().encode("utf-16-le"))
    assert "train.bin: is text in UTF-16" in refusal(open_dataset, "x", tmp_path, vocab_size=50257)
    assert open_dataset("x", tmp_path, "byte").tokens("train") == 21  # the ids of bytes are the same


@given(st.lists(st.integers(0, 50256), min_size=1, max_size=300))
def test_token_ids_are_not_taken_for_another_format(tmp_path_factory, ids):
    folder = tmp_path_factory.mktemp("bare")
    (folder / "x").mkdir()
    for split in ("train", "val"):
        np.array(ids, "<u2").tofile(folder / f"x/{split}.bin")
    if len(ids) < 8 or len(set(ids)) > 9:  # hypothesis likes lists of zeros, and of one value
        assert open_dataset("x", folder, vocab_size=50257).tokens("train") == len(ids)


def test_any_number_of_files_is_mapped_with_few_descriptors(tmp_path):
    for i in range(300):
        np.full(9, i, "<u2").tofile(tmp_path / f"{i}.bin")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        arrays = [memory_map(tmp_path / f"{i}.bin", "<u2") for i in range(300)]
        assert [int(a[0]) for a in arrays] == list(range(300)) and not arrays[0].flags.writeable
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Tokenizers, filters, recipes


def ranks_file():
    """A small file of ranks in tiktoken's format, from tiktoken's own trainer."""
    from tiktoken._educational import bpe_train
    ranks = bpe_train("the quick brown fox jumps over the lazy dog " * 9, 280, r"\w+|\W+")
    return ranks, b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in sorted(ranks.items(), key=lambda i: i[1]))


def test_llama_3s_tokenizer_model_is_read(tmp_path):
    ranks, content = ranks_file()
    (tmp_path / "tokenizer.model").write_bytes(content)
    t = load_tokenizer(str(tmp_path))  # the folder
    assert (t.vocab_size, t.eot, t.eot_text) == (len(ranks) + 256, len(ranks) + 1, "<|end_of_text|>")
    text = "the quick  1234567 foxes<|end_of_text|>\n\n'll"
    reference = tiktoken.Encoding("x", pat_str=t.bpe._pat_str, mergeable_ranks=ranks, special_tokens={})
    assert t.encode(text) == reference.encode_ordinary(text) and t.decode([*t.encode(text), t.eot]) == text
    assert load_tokenizer(str(tmp_path / "tokenizer.model"), "<|eot_id|>").eot == len(ranks) + 9


def test_a_folder_is_a_tokenizer_if_it_has_one(tmp_path):
    assert "the folder has no tokenizer.json" in refusal(load_tokenizer, str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(hf_json())
    assert load_tokenizer(str(tmp_path)).name == "hf"


def test_documents_that_cannot_be_separated_are_an_error(tmp_path):
    def tokenizer(end, eot=None):
        return HFTokenizer(pack_bytes(hf_json().replace("<|endoftext|>", end).encode()), eot)
    assert tokenizer("<｜end▁of▁sentence｜>").eot == 0  # DeepSeek's
    unknown = tokenizer("<the end>")
    documents = [MemoryPartition(tuple(map(str, range(40))))]
    message = refusal(run_prepare, tmp_path / "x", documents, unknown)
    assert "--eot names one, such as <the end>" in message and "--no_separator" in message
    assert run_prepare(tmp_path / "x", documents, tokenizer("<the end>", "<the end>"))["eot"] == 0
    assert "is no special token" in refusal(tokenizer, "<x>", "d")  # of the vocabulary, but text contains it
    assert "is no special token" in refusal(tokenizer, "<x>", "")


class Choking:
    """A library or a function that fails on one document."""

    def __init__(self, error):
        self.error = error

    def __call__(self, text):
        if text == "7":
            raise self.error
        return True


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError


@pytest.mark.slow
@pytest.mark.parametrize("error, words", [
    (type("PanicException", (BaseException,), {})("two\nlines"), "PanicException: two"),  # of a library in Rust
    (asyncio.CancelledError(), "CancelledError"), (type("Stop", (BaseException,), {})("x"), "Stop: x"),
    (SystemExit(3), "SystemExit: 3"), (Unprintable(), "Unprintable: Unprintable"), (OSError(), "OSError"),
    *(pytest.param(error, words, marks=pytest.mark.long) for error, words in (
        (ValueError(), "ValueError"), (StopIteration(), "StopIteration"), (MemoryError(), "MemoryError"),
        (RecursionError("deep"), "RecursionError: deep"), (FileNotFoundError(2, "No such file"), "No such file")))])
def test_a_document_on_which_a_function_fails_is_counted_and_named(tmp_path, capsys, error, words):
    meta = run_prepare(tmp_path, [MemoryPartition(tuple(map(str, range(40))))], filters={"callable": Choking(error)})
    assert meta["skipped"]["filter_failed"] == 1 and f"fails on it: {words}" in capsys.readouterr().err


@pytest.mark.parametrize("source, words", [("raise RuntimeError('no')", "cannot be imported: RuntimeError: no"),
                                           ("import sys; sys.exit()", "cannot be imported: SystemExit"),
                                           ("raise BaseException('b')", "cannot be imported: BaseException: b"),
                                           ("f = 3", "3 is no function"), ("f(", "SyntaxError"),
                                           ("async def f(text): return False", "always true"),
                                           ("def f(text): yield False", "is always true")])
def test_a_module_that_fails_is_one_line(tmp_path, monkeypatch, source, words):
    name = f"user_{abs(hash(words))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert words in refusal(parse_filters, [f"callable={name}:f"], error=UserError)


@pytest.mark.parametrize("flags", [["min_chars=3", "min_chars=2"], ["callable=keyword:iskeyword"] * 2])
def test_a_repeated_filter_is_refused(flags):
    assert "is given twice" in refusal(parse_filters, flags, error=UserError)


USES = {  # {what a filter uses: (its source, {file that is edited: its content})}
    "itself": ("def f(text): return True", {}),
    "a function": ("from NAME_helper import keep\ndef f(text): return keep(text)", {"NAME_helper.py": "keep = len"}),
    "a constant": ("from NAME_helper import N\ndef f(text): return len(text) > N", {"NAME_helper.py": "N = 3"}),
    "all of a module": ("from NAME_helper import *\ndef f(text): return len(text) > N", {"NAME_helper.py": "N = 3"}),
    "a module's module": ("import NAME_a\ndef f(text): return NAME_a.N", {"NAME_a.py": "from NAME_b import N",
                                                                        "NAME_b.py": "N = 3"}),
    "an import in a function": ("def f(text):\n from NAME_helper import N\n return N", {"NAME_helper.py": "N = 3"}),
    "a name as text": ("import importlib\ndef f(text): return importlib.import_module('NAME_helper').N",
                       {"NAME_helper.py": "N = 3"}),
    "a folder without __init__": ("import NAME_p.helper\ndef f(text): return NAME_p.helper.N",
                                  {"NAME_p/helper.py": "N = 3"}),
    "a package": ("from NAME_p.helper import N\ndef f(text): return N",
                  {"NAME_p/__init__.py": "", "NAME_p/helper.py": "from .sizes import N", "NAME_p/sizes.py": "N = 3"}),
    "a file of words": ("def f(text): return text in open('NAME_words.txt').read()", {"NAME_words.txt": "a b"}),
    "a file next to it": ("from pathlib import Path\nW = (Path(__file__).parent / 'NAME_w.txt').read_text()\n"
                          "def f(text): return text in W", {"NAME_w.txt": "a b"})}


@pytest.mark.parametrize("name", USES)
def test_what_a_function_uses_is_part_of_the_recipe(tmp_path, monkeypatch, name):
    monkeypatch.syspath_prepend(tmp_path)
    module = "user_" + name.replace(" ", "_").replace("'", "")
    source, files = USES[name]
    files = {f"{module}.py": source + "\nimport json\n", **files}
    files = {path.replace("NAME", module): text.replace("NAME", module) + "\n" for path, text in files.items()}
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    settings = {"callable": f"{module}:f"}
    before = filters.source_digests(settings)
    assert filters.source_digests(settings) == before and not any("json" in key for key in before)
    for path in files:
        (tmp_path / path).write_text((tmp_path / path).read_text() + "# edited\n")
        after = filters.source_digests(settings)
        assert after != before, path
        before = after


def test_a_file_that_a_function_writes_is_no_part_of_the_recipe(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user_log.py").write_text("def f(text): print(text, file=open('log.txt', mode='a')); return True\n")
    digests = []
    for text in ("a", "b"):
        (tmp_path / "log.txt").write_text(text)
        digests.append(filters.source_digests({"callable": "user_log:f"}))
    assert digests[0] == digests[1]


def test_a_version_of_a_hub_dataset_is_part_of_its_identity(tmp_path):
    identities = []
    for text in ("a", "bb"):
        (tmp_path / "x.jsonl").write_text(json.dumps({"text": text}))
        identities.append(hub_partitions("json", data_files=f"{tmp_path}/x.jsonl")[0].identity())
    assert identities[0] != identities[1]


def test_a_repeated_flag_is_refused_or_adds_to_the_first(monkeypatch):
    parser = command_parser("a test", None)
    add_input(parser)
    assert parser.parse_args(["--input", "a", "--input", "b", "c"]).input == ["a", "b", "c"]
    for flags in (["--tokenizer=byte", "--tokenizer", "gpt2"], ["--workers=1", "--workers=1"]):
        assert "is given twice" in refusal(parser.parse_args, ["--input=a", *flags], error=UserError)
