"""A dataset is opened if its files are what meta.json says, and refused in one line otherwise."""

import hashlib
import json

import numpy as np
import pytest
from dataset_helpers import equal, refusal, set_meta, write_shards

from blockgpt.data import dataset as dataset_module
from blockgpt.data.dataset import dtype_for, ensure_prepared, open_dataset
from blockgpt.data.loader import TrainBatches
from blockgpt.data.token_files import memory_map
from blockgpt.data.tokenizer import from_meta
from blockgpt.errors import DataError

SHARDS = {"train_1.bin": range(40, 60), "train_0.bin": range(40), "val.bin": range(60, 99)}


def test_shards_are_opened_in_the_order_of_their_names(tmp_path):
    write_shards(tmp_path / "x", SHARDS)
    d = open_dataset("x", tmp_path)
    assert [s.tolist() for s in d.shards["train"]] == [list(range(40)), list(range(40, 60))]
    assert d.tokens("train") == 60 and d.bytes_per_token("train") == 5 and d.vocab_size == 100
    assert not d.shards["val"][0].flags.writeable
    x = TrainBatches(d, 0, 4, 9 + 4).micro_batch(0)["tokens"]
    assert sorted(x[:, 0].tolist()) == [*range(0, 36, 4), *range(40, 56, 4)]


def test_an_empty_shard_among_others_is_accepted(tmp_path):
    write_shards(tmp_path / "x", {**SHARDS, "train_2.bin": []})
    assert TrainBatches(open_dataset("x", tmp_path), 0, 4, 1).n_sequences == 13


def test_memory_map_of_a_file_empty_or_not_is_a_read_only_array(tmp_path):
    row = np.dtype([("digest", "<u8", 2), ("split", "u1")])
    for dtype, content in (("<u2", np.arange(5, dtype="<u2")), (row, np.zeros(3, row))):
        for array in (content, content[:0]):
            array.tofile(tmp_path / "x")
            mapped = memory_map(tmp_path / "x", dtype)
            assert mapped.dtype == dtype and np.array_equal(mapped, array) and not mapped.flags.writeable


def test_the_dtype_holds_every_id_of_the_vocabulary():
    for vocab_size, dtype in ((2, "<u2"), (2**16, "<u2"), (2**16 + 1, "<u4"), (2**32, "<u4")):
        assert dataset_module.DTYPES[dtype_for(vocab_size)] == dtype
        assert np.array([vocab_size - 1]).astype(dtype)[0] == vocab_size - 1


def test_the_fingerprint_changes_with_the_tokens(tmp_path):
    variants = [{}, {"dtype": "uint32"}, {"vocab_size": 101}, {"shards": {**SHARDS, "val.bin": range(60, 98)}},
                {"shards": {**SHARDS, "train_0.bin": range(40, 60), "train_1.bin": range(40)}}]
    fingerprints = []
    for i, variant in enumerate(variants):
        write_shards(tmp_path / f"x{i}", **{"shards": SHARDS, **variant})
        fingerprints.append(open_dataset(f"x{i}", tmp_path).fingerprint)
    write_shards(tmp_path / "again", SHARDS)
    assert len(set(fingerprints)) == len(variants)
    assert open_dataset("again", tmp_path).fingerprint == fingerprints[0]


def test_a_dataset_is_refused_if_another_tokenizer_is_named(tmp_path, gpt2):
    write_shards(tmp_path / "x", SHARDS)
    assert open_dataset("x", tmp_path, tokenizer="byte").vocab_size == 100
    assert "made with the tokenizer byte, not with gpt2" in refusal(open_dataset, "x", tmp_path, tokenizer="gpt2")


def test_a_dataset_that_does_not_exist_is_one_line(tmp_path):
    assert "did you mean pycode?" in refusal(open_dataset, "pycod", tmp_path)
    assert "run python data/pycode/prepare.py" in refusal(open_dataset, "pycode", tmp_path)


def test_token_ids_of_a_large_dataset_are_checked_in_the_batches(tmp_path, monkeypatch):
    write_shards(tmp_path / "x", {"train.bin": [*range(39), 100], "val.bin": range(9)})
    assert "token id 100" in refusal(open_dataset, "x", tmp_path)
    monkeypatch.setattr(dataset_module, "VERIFY_BYTES", 20)
    batches = TrainBatches(open_dataset("x", tmp_path), 0, 39, 2)
    message = refusal(batches.micro_batch, 0)
    assert "train: has the token id 100" in message and "make it again" in message


# Damaged datasets


def meta_field(*path, value):
    """A damage: one field of meta.json has another value, or with KeyError none."""
    return lambda directory: set_meta(directory, *path, value=value)


def file_content(name, change, update_meta=False):
    """A damage: a file has other bytes; with update_meta, its entry in meta.json matches them."""
    def damage(directory):
        content = change((directory / name).read_bytes())
        (directory / name).write_bytes(content)
        if update_meta:
            entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            set_meta(directory, "splits", name.partition(".")[0].partition("_")[0], "files", name, value=entry)
    return damage


def meta_text(text):
    return lambda directory: (directory / "meta.json").write_text(text)


def file_name(name):
    return meta_field("splits", "train", "files", value={name: {"sha256": "", "size": 1}})


DAMAGES = {  # name: (damage, the file that the message names, words of the message)
    "missing file": (lambda d: (d / "val.bin").unlink(), "val.bin", "cannot be read"),
    "truncated": (file_content("train_1.bin", lambda b: b[:-2]), "train_1.bin", "has 38 bytes, meta.json says 40"),
    "padded": (file_content("train_1.bin", lambda b: b + b"\0\0"), "train_1.bin", "has 42 bytes"),
    "emptied": (file_content("val.bin", lambda b: b""), "val.bin", "has 0 bytes"),
    "half a token": (file_content("val.bin", lambda b: b + b"\0", update_meta=True), "meta.json",
                     "val.bin.size is 79, which is not a whole number of uint16"),
    "flipped byte": (file_content("train_0.bin", lambda b: bytes([b[0] ^ 1]) + b[1:]), "train_0.bin", "sha256"),
    "shards exchanged": (lambda d: (d / "val.bin").replace(d / "train_1.bin"), "train_1.bin", "has 78 bytes"),
    "token beyond": (file_content("val.bin", lambda b: b[:-2] + b"\x64\0", update_meta=True), "val.bin",
                     "token id 100"),
    "a folder": (lambda d: ((d / "val.bin").unlink(), (d / "val.bin").mkdir()), "val.bin", ""),
    "wrong dtype": (meta_field("dtype", value="uint32"), "meta.json", "tokens is 60, but its files hold 30 uint32"),
    "unknown dtype": (meta_field("dtype", value="float16"), "meta.json", "dtype is 'float16'"),
    "wrong count": (meta_field("splits", "val", "tokens", value=40), "meta.json",
                    "tokens is 40, but its files hold 39"),
    "not JSON": (meta_text("{"), "meta.json", "not JSON"),
    "not UTF-8": (lambda d: (d / "meta.json").write_bytes(b"\xff"), "meta.json", "not JSON"),
    "empty JSON": (meta_text(""), "meta.json", "not JSON"),
    "deep JSON": (meta_text("[" * 200_000), "meta.json", "not JSON"),
    "a list": (meta_text("[]"), "meta.json", "not an object"),
    "newer schema": (meta_field("schema_version", value=2), "meta.json", "schema_version is 2, this program reads 1"),
    "boolean vocabulary": (meta_field("vocab_size", value=True), "meta.json", "vocab_size is True"),
    "no vocabulary": (meta_field("vocab_size", value=0), "meta.json", "vocab_size is 0"),
    "eot of text": (meta_field("eot", value="end"), "meta.json", "eot is 'end'"),
    "no val": (meta_field("splits", "val", value=KeyError), "meta.json", "splits.val is not an object"),
    "null val": (meta_field("splits", "val", value=None), "meta.json", "splits.val is not an object"),
    "empty split": (meta_field("splits", "val", "tokens", value=0), "meta.json", "tokens is 0: the split is empty"),
    "no files": (meta_field("splits", "val", "files", value={}), "meta.json", "tokens is 39, but its files hold 0"),
    "no text": (meta_field("splits", "train", "bytes", value=0), "meta.json", "splits.train.bytes is 0"),
    "fraction of a token": (meta_field("splits", "val", "tokens", value=39.0), "meta.json", "39.0, not of type int"),
    "no digest": (meta_field("splits", "val", "files", "val.bin", "sha256", value=KeyError), "meta.json",
                  "splits.val.files.val.bin.sha256 is missing"),
    "another folder": (file_name("train/../../secret.bin"), "meta.json", "not the name"),
    "no file name": (file_name("train\0.bin"), "meta.json", "not the name"),
    "the other split": (file_name("val.bin"), "meta.json", "not the name"),
}
for field in dataset_module.META:
    DAMAGES[f"no {field}"] = (meta_field(field, value=KeyError), "meta.json", f"{field} is missing")
    DAMAGES[f"{field} of another type"] = (meta_field(field, value=[1]), "meta.json", f"{field} is [1], not of type")


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_dataset_is_refused_in_one_line(tmp_path, name):
    damage, file, words = DAMAGES[name]
    write_shards(tmp_path / "x", SHARDS)
    open_dataset("x", tmp_path)
    damage(tmp_path / "x")
    message = refusal(open_dataset, "x", tmp_path)
    assert str(tmp_path / "x" / file) in message and words in message
    assert message.endswith("(make it again, or copy it again from where it is whole)")  # there is no data/x/prepare.py


def test_a_damaged_dataset_of_a_script_is_prepared_again_and_a_closed_file_is_not(tmp_path):
    write_shards(tmp_path / "a b/pycode", SHARDS)
    (tmp_path / "a b/pycode/val.bin").unlink()
    message = refusal(open_dataset, "pycode", tmp_path / "a b")
    assert message.endswith(f"(run python data/pycode/prepare.py --out_dir '{tmp_path}/a b/pycode' again)")
    (tmp_path / "a b/pycode/meta.json").unlink()
    (tmp_path / "a b/pycode/meta.json").mkdir()  # as of mode 000: what it has is not known
    assert "cannot be read" in refusal(open_dataset, "pycode", tmp_path / "a b")
    assert "again" not in refusal(open_dataset, "pycode", tmp_path / "a b")


def test_the_hint_is_the_command_that_meta_json_records(tmp_path):
    write_shards(tmp_path / "x", SHARDS)
    set_meta(tmp_path / "x", "command", value="python data/files/prepare.py --name x")
    assert open_dataset("x", tmp_path).hint == "(run python data/files/prepare.py --name x again)"
    (tmp_path / "x/val.bin").unlink()
    assert refusal(open_dataset, "x", tmp_path).endswith("(run python data/files/prepare.py --name x again)")


# Token files without a meta.json


def write_bare(directory, train, val, dtype="<u2"):
    directory.mkdir()
    for name, ids in (("train", train), ("val", val)):
        np.array(ids, dtype).tofile(directory / f"{name}.bin")


def test_bare_token_files_need_a_tokenizer_or_a_vocabulary_size(tmp_path):
    text = "Żółw and more. " * 20
    write_bare(tmp_path / "x", list(text.encode()) * 3, list(text.encode()))
    message = refusal(open_dataset, "x", tmp_path)
    assert "--tokenizer=gpt2 or --vocab_size=N" in message and "convert_nanogpt_meta" in message
    d = open_dataset("x", tmp_path, tokenizer="byte")
    assert (d.vocab_size, d.meta["eot"], d.tokens("val")) == (257, 256, len(text.encode()))
    assert d.bytes_per_token("val") == d.bytes_per_token("train") == 1
    unnamed = open_dataset("x", tmp_path, vocab_size=256)
    assert unnamed.vocab_size == 256 and unnamed.bytes_per_token("val") is None
    assert equal(TrainBatches(unnamed, 0, 8, 4).micro_batch(3), TrainBatches(d, 0, 8, 4).micro_batch(3))
    assert unnamed.fingerprint != d.fingerprint
    with pytest.raises(DataError):
        from_meta(unnamed.meta["tokenizer"])


def test_bare_token_files_are_described_by_the_schema_of_meta_json(tmp_path):
    write_bare(tmp_path / "x", [1, 2], [3, 4])
    meta = open_dataset("x", tmp_path, tokenizer="byte").meta
    (tmp_path / "x/meta.json").write_text(json.dumps(meta))
    assert open_dataset("x", tmp_path).meta == meta


def test_the_bytes_of_a_large_bare_file_are_extrapolated_from_its_first_tokens(tmp_path, monkeypatch):
    write_bare(tmp_path / "x", [*[256] * 5, *[97] * 15], [97] * 4)  # 256 is the end of text, which has no bytes
    monkeypatch.setattr(dataset_module, "SAMPLE_TOKENS", 10)
    assert open_dataset("x", tmp_path, tokenizer="byte").meta["splits"]["train"]["bytes"] == 10


def test_a_large_bare_file_is_digested_by_its_size_and_its_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "VERIFY_BYTES", 2**20)
    zeros, fingerprints = np.zeros(3 * 2**19, "<u2"), []  # three times what is digested at each end
    write_bare(tmp_path / "x", [1], [1])
    for ids in (zeros, np.append(zeros, 0), np.append(zeros[1:], 1), np.append(1, zeros[1:])):
        ids.astype("<u2").tofile(tmp_path / "x/train.bin")
        fingerprints.append(open_dataset("x", tmp_path, vocab_size=9).fingerprint)
    assert len(set(fingerprints)) == 4


@pytest.mark.parametrize("train, vocab_size, words", [
    (b"abc", 100, "train.bin: has 3 bytes, which is not a whole number of uint16 tokens"), (b"", 100, "has 0 bytes"),
    (b"\x64\0", 100, "train.bin: has the token id 100, beyond vocab_size=100 (another --tokenizer or --vocab_size?)"),
    (b"abcdef", 10**5, "has 6 bytes, which is not a whole number of uint32 tokens"),
])
def test_bare_token_files_that_do_not_fit_are_one_line(tmp_path, train, vocab_size, words):
    write_bare(tmp_path / "x", [], [1, 2])
    (tmp_path / "x/train.bin").write_bytes(train)
    assert words in refusal(open_dataset, "x", tmp_path, vocab_size=vocab_size)


def test_the_files_of_a_killed_preparation_are_not_taken_for_bare_token_files(tmp_path):
    write_bare(tmp_path / "x", [1, 2], [1, 2])
    (tmp_path / "x/.parts.1a2b.tmp").mkdir()
    assert "does not exist" in refusal(open_dataset, "x", tmp_path, vocab_size=9)


# ---- the embedded corpus

@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder whose data/pycode/prepare.py writes its arguments to meta.json, or fails if FAIL is set."""
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


def test_the_embedded_corpus_is_prepared_once(project, capfd):
    ensure_prepared("pycode")
    meta = project / "data/pycode/meta.json"
    assert "--out_dir" in meta.read_text()
    assert capfd.readouterr().out.count("\n") == 1
    meta.write_text("unchanged")
    ensure_prepared("pycode")
    assert meta.read_text() == "unchanged" and capfd.readouterr().out == ""


def test_the_embedded_corpus_is_prepared_into_another_data_dir(project, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    ensure_prepared("pycode", str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere/pycode/meta.json").exists() and not (project / "data/pycode/meta.json").exists()


def test_a_failed_preparation_is_reported_with_its_error(project, monkeypatch):
    monkeypatch.setenv("FAIL", "1")
    message = refusal(ensure_prepared, "pycode")
    assert message.endswith("/x: disk full") and "error:" not in message


def test_the_command_or_the_existing_datasets_are_named(project, tmp_path):
    assert "run python data/shakespeare_char/prepare.py" in refusal(ensure_prepared, "shakespeare_char")
    assert f"--out_dir {tmp_path}/shakespeare_char" in refusal(ensure_prepared, "shakespeare_char", tmp_path)
    assert "did you mean shakespeare_char?" in refusal(ensure_prepared, "shakespear")
    write_shards(tmp_path / "own", SHARDS)
    ensure_prepared("own", tmp_path)
    assert "one of own, project, pycode, shakespeare_char" in refusal(ensure_prepared, "qqq", tmp_path)
