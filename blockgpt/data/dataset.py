"""A dataset on disk: its directory, meta.json and shards; whether it is complete. Used by readers and writers alike."""

import hashlib
import json
import mmap
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blockgpt.data.tokenizer import UNNAMED, describe_tokenizer, load_tokenizer
from blockgpt.errors import DataError, did_you_mean
from blockgpt.files import sha256_of

SPLITS = ("train", "val")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def dtype_for(vocab_size):
    return "uint16" if vocab_size <= 2**16 else "uint32"
ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = "pycode"  # the corpus that needs no download: every Python brings it
SCHEMA_VERSION = 1


def dataset_dir(dataset, data_dir=None):
    """Where a dataset stands; data_dir None: data/ beside this file."""
    return Path(data_dir or ROOT / "data") / dataset


def prepare_command(dataset, data_dir=None):
    """The command, as typed in the project's folder, that makes a dataset."""
    elsewhere = f" --out_dir {shlex.quote(str(dataset_dir(dataset, data_dir)))}" if data_dir else ""
    return f"python data/{dataset}/prepare.py{elsewhere}"


def not_prepared(dataset, data_dir=None):
    """The `DataError` for a dataset that has no meta.json."""
    scripts = {p.parent.name for p in ROOT.glob("data/*/prepare.py")}
    if dataset in scripts:
        return DataError(f"dataset {dataset!r} is not prepared: run {prepare_command(dataset, data_dir)}")
    prepared = {p.parent.name for p in Path(data_dir or ROOT / "data").glob("*/meta.json")}
    return DataError(f"dataset {dataset!r} does not exist: no {dataset_dir(dataset, data_dir)}/meta.json"
                     + did_you_mean(dataset, sorted(scripts | prepared)))


def is_bare(directory):
    """Whether a dataset is two files of tokens that nothing describes, as nanoGPT leaves them.

    What a killed `prepare` leaves may look so too, but for its work directory.
    """
    return (all((directory / f"{split}.bin").exists() for split in SPLITS) and not (directory / "meta.json").exists()
            and not any(directory.glob(".parts.*.tmp")))


def ensure_prepared(dataset, data_dir=None):
    """Make the embedded corpus if it is asked for and not there yet; `DataError` for any other dataset not there.

    Of the processes of one run, let one call this and the others wait.
    """
    directory = dataset_dir(dataset, data_dir)
    if (directory / "meta.json").exists():
        return
    if dataset != EMBEDDED:
        if is_bare(directory):
            return  # `open_dataset` asks what the files hold
        raise not_prepared(dataset, data_dir)
    print(f"preparing {dataset} in {directory}: once, a few seconds", flush=True)
    command = [sys.executable, ROOT / "data" / dataset / "prepare.py", "--out_dir", directory]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise DataError(f"dataset {dataset!r} could not be prepared: {last.removeprefix('error: ')}")
VERIFY_BYTES = 2**30  # larger datasets are opened by size alone: their digests would take seconds at every start
COUNTED_TOKENS = 2**22  # of bare files, to learn the bytes of a token
META = {"schema_version": (int,), "tokenizer": (dict,), "vocab_size": (int,), "eot": (int, type(None)),
        "dtype": (str,), "source": (str,), "splits": (dict,), "skipped": (dict,)}
SPLIT = {"tokens": (int,), "bytes": (int,), "documents": (int,), "files": (dict,)}
FILE = {"sha256": (str,), "size": (int,)}


@dataclass(frozen=True)
class Dataset:
    """A dataset whose files are what its meta.json says.

    shards: {split: [1-d arrays of token ids, read-only]}. remedy: what to do if they turn out damaged after all.
    """

    name: str
    directory: Path
    meta: dict
    shards: dict
    remedy: str = ""

    @property
    def vocab_size(self):
        return self.meta["vocab_size"]

    @property
    def fingerprint(self):
        """Hex digest of what the batches depend on: every shard, the dtype, the vocabulary's size."""
        shards = {s: [f["sha256"] for _, f in sorted(self.meta["splits"][s]["files"].items())] for s in SPLITS}
        return hashlib.sha256(json.dumps([self.meta["dtype"], self.vocab_size, shards]).encode()).hexdigest()

    def tokens(self, split):
        """Tokens in a split, end-of-text tokens included."""
        return self.meta["splits"][split]["tokens"]

    def bytes_per_token(self, split):
        """UTF-8 bytes of text per token of the split, on average; bits per byte = bits per token / this.

        None where nobody counted them, as for bare token files.
        """
        held = self.meta["splits"][split]["bytes"]
        return None if held is None else held / self.tokens(split)


def open_dataset(dataset, data_dir=None, tokenizer=None, vocab_size=None):
    """Open `<data_dir>/<dataset>`, checked: a `Dataset`. data_dir None: data/ beside this file.

    tokenizer (as `load_tokenizer` takes it), vocab_size: what a folder of bare token files needs, of which the one or
    the other is enough; of other datasets the tokenizer must be the one that is named.
    `DataError` names the file at fault: absent, of another size or digest than meta.json says (the digests of a
    dataset up to VERIFY_BYTES), or with token ids beyond the vocabulary.
    """
    directory, remedy = dataset_dir(dataset, data_dir), f"(run {prepare_command(dataset, data_dir)} again)"
    if is_bare(directory):
        return open_bare(dataset, directory, load_tokenizer(tokenizer) if tokenizer else None, vocab_size)
    if not (directory / "meta.json").exists():
        raise not_prepared(dataset, data_dir)
    try:
        meta = read_meta(directory / "meta.json")
        if type(meta.get("command")) is str:  # of a dataset without a script of its own
            remedy = f"(run {meta['command']} again)"
        files = [(split, name, entry) for split in SPLITS for name, entry in meta["splits"][split]["files"].items()]
        verify = sum(entry["size"] for _, _, entry in files) <= VERIFY_BYTES
        shards = {split: [] for split in SPLITS}
        for split, name, entry in sorted(files, key=lambda file: file[1]):
            shards[split].append(open_shard(directory / name, entry, DTYPES[meta["dtype"]], meta["vocab_size"], verify))
    except DataError as error:
        raise DataError(f"{error} {remedy}") from None
    if tokenizer and load_tokenizer(tokenizer).to_meta() != meta["tokenizer"]:
        raise DataError(f"dataset {dataset!r} was made with the tokenizer {describe_tokenizer(meta['tokenizer'])}, not with "
                        f"{tokenizer} (drop --tokenizer, or prepare it again)")
    return Dataset(dataset, directory, meta, shards, remedy)


def open_bare(dataset, directory, tokenizer=None, vocab_size=None):
    """The `Dataset` of a train.bin and val.bin without a meta.json, as nanoGPT's prepare.py leaves them.

    Where the tokenizer is known its bytes are counted by decoding, or, beyond COUNTED_TOKENS, estimated from those.
    """
    if tokenizer is None and vocab_size is None:
        raise DataError(f"{directory}: has train.bin and val.bin and no meta.json: say what they hold, "
                        "--tokenizer=gpt2 or --vocab_size=N (python -m tools.convert_nanogpt_meta writes it down)")
    vocab_size = tokenizer.vocab_size if tokenizer else vocab_size
    dtype = DTYPES[dtype_for(vocab_size)]
    shards, splits = {}, {}
    for split in SPLITS:
        path = directory / f"{split}.bin"
        size = path.stat().st_size
        if not size or size % dtype.itemsize:
            raise DataError(f"{path}: has {size} bytes, which is no whole number of {dtype.name} tokens, at least one")
        entry = {"size": size, "sha256": sha256_of(path) if size <= VERIFY_BYTES else sha256_of_ends(path)}
        shards[split] = [open_shard(path, entry, dtype, vocab_size, verify=False)]
        if size <= VERIFY_BYTES:
            check_token_ids(shards[split][0], vocab_size, path, "(another --tokenizer or --vocab_size?)")
        splits[split] = {"tokens": size // dtype.itemsize, "bytes": None, "documents": 1,
                         "files": {path.name: entry}}
        if tokenizer:
            sample = shards[split][0][:COUNTED_TOKENS]
            held = len(tokenizer.decode(sample.tolist()).encode())
            splits[split]["bytes"] = round(held * splits[split]["tokens"] / len(sample))
    meta = {"schema_version": SCHEMA_VERSION, "tokenizer": tokenizer.to_meta() if tokenizer else {"name": UNNAMED},
            "vocab_size": vocab_size, "eot": tokenizer.eot if tokenizer else None, "dtype": dtype_for(vocab_size),
            "source": "token files without a meta.json", "splits": splits, "skipped": {}}
    return Dataset(dataset, directory, meta, shards, "(another --tokenizer or --vocab_size?)")


def sha256_of_ends(path, n=2**20):
    """Hex digest of a large file's size and first and last n bytes: what can be told of it at once."""
    with open(path, "rb") as file:
        size, head = file.seek(0, 2), file.seek(0) or file.read(n)
        file.seek(-n, 2)
        return hashlib.sha256(str(size).encode() + head + file.read(n)).hexdigest()


def read_meta(path):
    """The content of a meta.json; `DataError` if a field is absent or cannot be, alone or beside another."""
    try:
        meta = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: is not JSON") from None
    version = meta.get("schema_version") if type(meta) is dict else SCHEMA_VERSION
    if type(version) is int and version != SCHEMA_VERSION:
        raise DataError(f"{path}: schema_version is {version}, this program reads {SCHEMA_VERSION}")
    check_meta_fields(path, "", meta, META)
    if meta["dtype"] not in DTYPES:
        raise DataError(f"{path}: dtype is {meta['dtype']!r}, not one of {', '.join(DTYPES)}")
    itemsize = DTYPES[meta["dtype"]].itemsize
    if meta["vocab_size"] < 1:
        raise DataError(f"{path}: vocab_size is {meta['vocab_size']}, must be at least 1")
    for split in SPLITS:
        where, entries = f"splits.{split}.", meta["splits"].get(split)
        check_meta_fields(path, where, entries, SPLIT)
        for field in ("tokens", "bytes"):
            if entries[field] < 1:
                raise DataError(f"{path}: {where}{field} is {entries[field]}: the split is empty")
        for name, entry in entries["files"].items():
            if not re.fullmatch(rf"{split}[\w.-]*\.bin", name):
                raise DataError(f"{path}: {where}files: {name!r} is not the name of a {split}*.bin beside it")
            check_meta_fields(path, f"{where}files.{name}.", entry, FILE)
            if entry["size"] % itemsize:
                raise DataError(f"{path}: {where}files.{name}.size is {entry['size']}, which is no whole number of "
                                f"{meta['dtype']} tokens")
        held = sum(entry["size"] for entry in entries["files"].values()) // itemsize
        if held != entries["tokens"]:
            raise DataError(f"{path}: {where}tokens is {entries['tokens']}, but its files hold {held} {meta['dtype']} "
                            "tokens")
    return meta


def check_meta_fields(path, where, value, fields):
    """`DataError` unless `value` is an object that has every field of `fields` with one of its types."""
    if type(value) is not dict:
        raise DataError(f"{path}: {where.rstrip('.') or 'the whole'} is not an object")
    for name, types in fields.items():
        if name not in value:
            raise DataError(f"{path}: {where}{name} is missing")
        if type(value[name]) not in types:
            raise DataError(f"{path}: {where}{name} is {value[name]!r:.80}, not of type {types[0].__name__}")


def open_shard(path, entry, dtype, vocab_size, verify):
    """Memory-map one file of tokens after checking it against its entry in meta.json: 1-d array, read-only.

    verify: its digest and its ids too, which reads it.
    """
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            raise DataError(f"{path}: has {size} bytes, meta.json says {entry['size']}")
        if verify and sha256_of(path) != entry["sha256"]:
            raise DataError(f"{path}: is damaged: its sha256 is not the one in meta.json")
        tokens = memory_map(path, dtype) if size else np.empty(0, dtype)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if verify:
        check_token_ids(tokens, vocab_size, path)
    else:
        madvise(tokens, "MADV_RANDOM")
    return tokens


def memory_map(path, dtype):
    """A file as a 1-d array, read-only, of which only what is looked at is read."""
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)


def madvise(tokens, pattern):
    """Tell the system, if it can be told, how a mapped file will be read.

    It reads ahead of what is looked at, which a window at a random place in a large file pays for a hundredfold.
    """
    mapping = getattr(tokens.base, "obj", None)  # numpy keeps a memoryview of it
    if isinstance(mapping, mmap.mmap) and hasattr(mmap, pattern):
        mapping.madvise(getattr(mmap, pattern))


def check_token_ids(ids, vocab_size, where, remedy=""):
    """`DataError` if a token id lies beyond the vocabulary: an embedding would fail on it far from the cause."""
    if ids.size and ids.max() >= vocab_size:
        raise DataError(f"{where}: has the token id {ids.max()}, beyond vocab_size={vocab_size} {remedy}".rstrip())
