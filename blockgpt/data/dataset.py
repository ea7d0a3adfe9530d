"""A dataset on disk: directory, meta.json and shards. The modules that write datasets and those that read them use it.

    <data_dir>/<dataset>/meta.json                        written last: a dataset without it is not complete
    <data_dir>/<dataset>/train*.bin, val*.bin             shards: token ids, one after the other, little-endian

`open_dataset` checks the files against meta.json and memory-maps them. Two .bin files without a meta.json, as nanoGPT's
prepare.py writes them, are "bare"; they can be opened if the tokenizer or the vocabulary size is given.
To add a field to meta.json: a line in `META`, and a new `SCHEMA_VERSION` if older datasets do not have it.
"""

import hashlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blockgpt.console import echo, script_path
from blockgpt.data.formats import read_file
from blockgpt.data.token_files import (
    check_bare_file,
    check_bare_ids,
    check_token_ids,
    madvise,
    memory_map,
    sha256_of_ends,
)
from blockgpt.data.tokenizer import UNNAMED, Tokenizer, describe_tokenizer, load_tokenizer
from blockgpt.errors import DataError, did_you_mean
from blockgpt.files import exists, list_dir, sha256_of, user_path

ROOT = Path(__file__).resolve().parents[2]  # the project's folder, which has data/<dataset>/prepare.py
EMBEDDED = "pycode"  # the dataset that needs no download: its text is Python's standard library
SPLITS = ("train", "val")
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
VERIFY_BYTES = 2**30  # larger datasets are checked by file size only: their digests would take seconds at each start
SAMPLE_TOKENS = 2**22  # of a bare file, decoded to count the bytes per token

# The schema of meta.json: {field: accepted types}.
SCHEMA_VERSION = 1
META: dict[str, tuple[type, ...]] = {
    "schema_version": (int,), "tokenizer": (dict,), "vocab_size": (int,), "eot": (int, type(None)), "dtype": (str,),
    "source": (str,), "splits": (dict,), "skipped": (dict,)}
SPLIT_FIELDS: dict[str, tuple[type, ...]] = {"tokens": (int,), "bytes": (int,), "documents": (int,), "files": (dict,)}
FILE_FIELDS: dict[str, tuple[type, ...]] = {"sha256": (str,), "size": (int,)}


@dataclass(frozen=True)
class Dataset:
    """An open dataset, whose files match its meta.json.

    Attributes:
        shards: {split: 1-d read-only arrays of token ids, in the order of the file names}.
        hint: how to repair a shard that is found to be damaged later; the end of an error message.
    """

    name: str
    directory: Path
    meta: dict[str, Any]
    shards: dict[str, list[np.ndarray]]
    hint: str = ""

    @property
    def vocab_size(self) -> int:
        return self.meta["vocab_size"]

    @property
    def fingerprint(self) -> str:
        """Hex digest of what the batches depend on: the digest of every shard, the dtype, the vocabulary size."""
        shards = {s: [f["sha256"] for _, f in sorted(self.meta["splits"][s]["files"].items())] for s in SPLITS}
        return hashlib.sha256(json.dumps([self.meta["dtype"], self.vocab_size, shards]).encode()).hexdigest()

    def tokens(self, split: str) -> int:
        """Tokens in a split, end-of-text tokens included."""
        return self.meta["splits"][split]["tokens"]

    def bytes_per_token(self, split: str) -> float | None:
        """UTF-8 bytes of text in the split / tokens in the split; bits per byte = bits per token / this.

        None if the bytes are not known, as for bare files without a tokenizer.
        """
        text_bytes = self.meta["splits"][split]["bytes"]
        return None if text_bytes is None else text_bytes / self.tokens(split)


# The directory


def dataset_dir(dataset: str, data_dir: str | Path | None = None) -> Path:
    """The directory of a dataset; data_dir None: data/ in the project's folder."""
    return user_path(data_dir or ROOT / "data") / dataset


def prepare_command(dataset: str, data_dir: str | Path | None = None) -> str:
    """The command that prepares a dataset, to be typed here."""
    out_dir = ["--out_dir", str(dataset_dir(dataset, data_dir))] if data_dir else []
    return shlex.join(["python", script_path(f"data/{dataset}/prepare.py"), *out_dir])


def prepare_again(dataset: str, data_dir: str | Path | None = None) -> str:
    """What to do with a damaged dataset whose meta.json does not say which command made it."""
    if exists(ROOT / "data" / dataset / "prepare.py"):
        return f"(run {prepare_command(dataset, data_dir)} again)"
    return "(make it again, or copy it again from where it is whole)"


def not_prepared(dataset: str, data_dir: str | Path | None = None) -> DataError:
    """The `DataError` for a dataset that has no meta.json."""
    if exists(ROOT / "data" / dataset / "prepare.py"):
        return DataError(f"dataset {dataset!r} is not prepared: run {prepare_command(dataset, data_dir)}")
    names = {path.name for folder in (ROOT / "data", data_dir or ROOT / "data") for path in list_dir(folder)}
    return DataError(f"dataset {dataset!r} does not exist: no {dataset_dir(dataset, data_dir)}/meta.json"
                     + did_you_mean(dataset, sorted(names - {dataset, "__pycache__"})))


def is_bare(directory: Path) -> bool:
    """Whether a directory has a train.bin and a val.bin but no meta.json, as nanoGPT's prepare.py leaves it.

    A killed `prepare` leaves the same two files, but also its work directory.
    """
    return (all(exists(directory / f"{split}.bin") for split in SPLITS) and not exists(directory / "meta.json")
            and not list_dir(directory, ".parts.*.tmp"))


def ensure_prepared(dataset: str, data_dir: str | Path | None = None) -> None:
    """Prepare the embedded dataset if it does not exist yet. Only one process of a run calls this; the others wait.

    Raises:
        DataError: any other dataset does not exist, or prepare.py failed.
    """
    directory = dataset_dir(dataset, data_dir)
    if exists(directory / "meta.json"):
        return
    if dataset != EMBEDDED:
        if is_bare(directory):
            return  # `open_dataset` checks that the tokenizer or the vocabulary size is given
        raise not_prepared(dataset, data_dir)
    echo(f"preparing {dataset} in {directory}: once, a few seconds")
    command = [sys.executable, str(ROOT / "data" / dataset / "prepare.py"), "--out_dir", str(directory)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        last_line = (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-1]
        raise DataError(f"dataset {dataset!r} could not be prepared: {last_line.removeprefix('error: ')}")


# Opening


def open_dataset(dataset: str, data_dir: str | Path | None = None, tokenizer: str | None = None,
                 vocab_size: int | None = None) -> Dataset:
    """Open `<data_dir>/<dataset>` and check it. Datasets over VERIFY_BYTES are checked by file size only.

    Args:
        data_dir: None: data/ in the project's folder.
        tokenizer: a name or a file, as `load_tokenizer` takes it. Bare files need it or vocab_size; if a dataset with
            a meta.json was made with another tokenizer, it is an error.
        vocab_size: of bare files without a tokenizer; ignored for other datasets.

    Raises:
        DataError: a file is missing, has another size or digest than meta.json says, or has token ids beyond the
            vocabulary; meta.json is invalid; the tokenizer is another one.
    """
    directory, hint = dataset_dir(dataset, data_dir), prepare_again(dataset, data_dir)
    if is_bare(directory):
        return open_bare(dataset, directory, load_tokenizer(tokenizer) if tokenizer else None, vocab_size)
    if not exists(directory / "meta.json"):
        raise not_prepared(dataset, data_dir)
    try:
        meta = read_meta(directory / "meta.json")
        if type(meta.get("command")) is str:  # data/files/prepare.py records it
            hint = f"(run {meta['command']} again)"
        files = [(split, name, entry) for split in SPLITS for name, entry in meta["splits"][split]["files"].items()]
        verify = sum(entry["size"] for _, _, entry in files) <= VERIFY_BYTES
        shards: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        for split, name, entry in sorted(files, key=lambda file: file[1]):
            shards[split].append(open_shard(directory / name, entry, DTYPES[meta["dtype"]], meta["vocab_size"], verify))
    except DataError as error:
        closed = ": cannot be read: " in str(error) and "No such file" not in str(error)  # the file may be good
        raise DataError(str(error) if closed else f"{error} {hint}") from None
    if tokenizer and not same_tokenizer(load_tokenizer(tokenizer).to_meta(), meta["tokenizer"]):
        raise DataError(f"dataset {dataset!r} was made with the tokenizer {describe_tokenizer(meta['tokenizer'])}, "
                        f"not with {tokenizer} (drop --tokenizer, or choose another folder)")
    return Dataset(dataset, directory, meta, shards, hint)


def same_tokenizer(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two entries of meta.json are one tokenizer; --eot may have chosen another token to end documents."""
    return {**a, "eot": None} == {**b, "eot": None}


def open_bare(dataset: str, directory: Path, tokenizer: Tokenizer | None = None,
              vocab_size: int | None = None) -> Dataset:
    """Open a train.bin and a val.bin that have no meta.json, as nanoGPT's prepare.py writes them.

    With a tokenizer the bytes of the text are counted by decoding the first SAMPLE_TOKENS tokens of each split, and
    extrapolated to the rest.

    Raises:
        DataError: neither tokenizer nor vocab_size is given, or the files do not fit them.
    """
    if tokenizer:
        vocab_size = tokenizer.vocab_size
    elif vocab_size is None:
        raise DataError(f"{directory}: has train.bin and val.bin and no meta.json: give --tokenizer=gpt2 "
                        "or --vocab_size=N (python " + shlex.join([script_path("tools/convert_nanogpt_meta.py"),
                                                                   str(directory)]) + " writes meta.json)")
    assert vocab_size is not None
    dtype, hint = DTYPES[dtype_for(vocab_size)], "(another --tokenizer or --vocab_size?)"
    shards, splits = {}, {}
    for split in SPLITS:
        path = directory / f"{split}.bin"
        check_bare_file(path, dtype)
        size = path.stat().st_size
        if not size or size % dtype.itemsize:
            raise DataError(f"{path}: has {size} bytes, which is not a whole number of {dtype.name} tokens, "
                            "at least one")
        entry = {"size": size, "sha256": sha256_of(path) if size <= VERIFY_BYTES else sha256_of_ends(path)}
        shard = open_shard(path, entry, dtype, vocab_size, verify=False)
        if size <= VERIFY_BYTES:
            check_bare_ids(shard, vocab_size, path)
        text_bytes = None
        if tokenizer:
            sample = shard[:SAMPLE_TOKENS]
            text_bytes = round(len(tokenizer.decode(sample.tolist()).encode()) * len(shard) / len(sample))
        shards[split] = [shard]
        splits[split] = {"tokens": len(shard), "bytes": text_bytes, "documents": 1, "files": {path.name: entry}}
    meta = {"schema_version": SCHEMA_VERSION, "tokenizer": tokenizer.to_meta() if tokenizer else {"name": UNNAMED},
            "vocab_size": vocab_size, "eot": tokenizer.eot if tokenizer else None, "dtype": dtype_for(vocab_size),
            "source": "token files without a meta.json", "splits": splits, "skipped": {}}
    return Dataset(dataset, directory, meta, shards, hint)


# meta.json


def read_meta(path: Path) -> dict[str, Any]:
    """The content of a meta.json. `DataError` if a field is missing, has another type, or contradicts another field."""
    try:
        meta = json.loads(read_file(path))
    except DataError:
        raise
    except (ValueError, RecursionError):
        raise DataError(f"{path}: is not JSON") from None
    version = meta.get("schema_version") if type(meta) is dict else SCHEMA_VERSION
    if type(version) is int and version != SCHEMA_VERSION:
        raise DataError(f"{path}: schema_version is {version}, this program reads {SCHEMA_VERSION}")
    check_meta_fields(path, "", meta, META)
    if meta["dtype"] not in DTYPES:
        raise DataError(f"{path}: dtype is {meta['dtype']!r}, not one of {', '.join(DTYPES)}")
    if meta["vocab_size"] < 1:
        raise DataError(f"{path}: vocab_size is {meta['vocab_size']}, must be at least 1")
    for split in SPLITS:
        check_split(path, split, meta["splits"].get(split), meta["dtype"])
    return meta


def check_split(path: Path, split: str, entry: Any, dtype: str) -> None:
    """`DataError` unless `entry` is a valid entry of meta.json's "splits"."""
    where = f"splits.{split}."
    check_meta_fields(path, where, entry, SPLIT_FIELDS)
    for field in ("tokens", "bytes"):
        if entry[field] < 1:
            raise DataError(f"{path}: {where}{field} is {entry[field]}: the split is empty")
    itemsize = DTYPES[dtype].itemsize
    for name, file in entry["files"].items():
        if not re.fullmatch(rf"{split}[\w.-]*\.bin", name):
            raise DataError(f"{path}: {where}files: {name!r} is not the name of a {split}*.bin in the same folder")
        check_meta_fields(path, f"{where}files.{name}.", file, FILE_FIELDS)
        if file["size"] % itemsize:
            raise DataError(f"{path}: {where}files.{name}.size is {file['size']}, which is not a whole number of "
                            f"{dtype} tokens")
    tokens = sum(file["size"] for file in entry["files"].values()) // itemsize
    if tokens != entry["tokens"]:
        raise DataError(f"{path}: {where}tokens is {entry['tokens']}, but its files hold {tokens} {dtype} tokens")


def check_meta_fields(path: Path, where: str, value: Any, fields: dict[str, tuple[type, ...]]) -> None:
    """`DataError` unless `value` is an object that has every field of `fields` with one of its types."""
    if type(value) is not dict:
        raise DataError(f"{path}: {where.rstrip('.') or 'the whole'} is not an object")
    for name, types in fields.items():
        if name not in value:
            raise DataError(f"{path}: {where}{name} is missing")
        if type(value[name]) not in types:
            raise DataError(f"{path}: {where}{name} is {value[name]!r:.80}, not of type {types[0].__name__}")


# Shards


def dtype_for(vocab_size: int) -> str:
    """The key of `DTYPES` for a vocabulary: the smallest dtype that holds its ids."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def open_shard(path: Path, entry: dict[str, Any], dtype: np.dtype, vocab_size: int, verify: bool) -> np.ndarray:
    """Memory-map a shard and check it against its entry in meta.json: 1-d read-only array.

    Args:
        entry: {"sha256", "size"} of the file in meta.json.
        verify: check the digest and the token ids too, which reads the whole file.
    """
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            raise DataError(f"{path}: has {size} bytes, meta.json says {entry['size']}")
        if verify and sha256_of(path) != entry["sha256"]:
            raise DataError(f"{path}: is damaged: its sha256 is not the one in meta.json")
        tokens = memory_map(path, dtype)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if verify:
        check_token_ids(tokens, vocab_size, path)
    else:
        madvise(tokens, "MADV_RANDOM")
    return tokens
