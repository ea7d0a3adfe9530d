"""Small datasets for tests, in memory or on disk, and functions that tests of several modules use with them.

Not named `datasets`, since that would hide Hugging Face's package.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blockgpt.data.dataset import Dataset
from blockgpt.data.loader import Batch
from blockgpt.errors import DataError, UserError
from blockgpt.training.launch import Runtime


def counting_dataset(train: Sequence[int], val: Sequence[int] = (50,)) -> Dataset:
    """A dataset in memory with shards of these lengths, where each token's id is its position in the split."""
    shards = {}
    for split, lengths in (("train", train), ("val", val)):
        ends = np.cumsum(lengths)
        shards[split] = [np.arange(e - n, e, dtype="<u4") for n, e in zip(lengths, ends, strict=True)]
    meta = {"vocab_size": 10**6, "dtype": "uint32",
            "splits": {s: {"tokens": sum(map(len, shards[s])), "bytes": 1} for s in shards}}
    return Dataset("x", Path("data/x"), meta, shards)


def write_shards(directory: Path, shards: Mapping[str, Iterable[int]], dtype: str = "uint16",
                 vocab_size: int = 100) -> None:
    """Write {file name: ids} and the meta.json, without any code of the writing side."""
    directory.mkdir(parents=True)
    splits = {}
    for split in ("train", "val"):
        files = {name: np.array(list(ids), np.dtype(dtype).newbyteorder("<")).tobytes()
                 for name, ids in shards.items() if name.startswith(split)}
        for name, content in files.items():
            (directory / name).write_bytes(content)
        splits[split] = {"tokens": sum(map(len, files.values())) // np.dtype(dtype).itemsize, "bytes": 300,
                         "documents": 1, "files": {name: {"sha256": hashlib.sha256(content).hexdigest(),
                                                          "size": len(content)} for name, content in files.items()}}
    meta = {"schema_version": 1, "tokenizer": {"name": "byte"}, "vocab_size": vocab_size, "eot": None, "dtype": dtype,
            "source": "a test", "splits": splits, "skipped": {}}
    (directory / "meta.json").write_text(json.dumps(meta))


def set_meta(directory: Path, *path: str, value: Any) -> None:
    """Set one field of a meta.json; KeyError as the value deletes it."""
    meta = json.loads((directory / "meta.json").read_text())
    entry = meta
    for name in path[:-1]:
        entry = entry[name]
    if value is KeyError:
        del entry[path[-1]]
    else:
        entry[path[-1]] = value
    (directory / "meta.json").write_text(json.dumps(meta))


def equal(a: Batch, b: Batch) -> bool:
    """Whether two batches have the same tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def concatenate(batches: Iterable[Batch]) -> Batch:
    """One batch of the rows of all."""
    batches = list(batches)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def pair(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs and targets of a batch."""
    return batch["tokens"], batch["targets"]


def refusal(action: Callable, *args: Any, error: type[UserError] = DataError, **kwargs: Any) -> str:
    """The message of the error that the action raises, which has one line."""
    with pytest.raises(error) as raised:
        action(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def single_process() -> Runtime:
    """The `Runtime` of a run of one process on the CPU."""
    return Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float32, tf32=False,
                   compile=False)


def exact_losses(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of every token in float64, by the definition: (B, T)."""
    from model_builder import build_model

    double = build_model(model.config).double()
    double.load_state_dict(model.state_dict())
    with torch.no_grad():
        return -double.eval()(x).log_softmax(-1).gather(-1, y[..., None])[..., 0]
