"""The dataset of the negative control: the tokens of every training document in random order.

A model that learns more than the frequencies of tokens must lose on it. Validation is the original's, file by file, so
both are evaluated on the same windows.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from blockgpt.data.dataset import DTYPES, Dataset
from blockgpt.errors import UserError, error_text
from blockgpt.files import FolderLock, exists, sha256_of, write_bytes, write_json

SHUFFLE_SEED = 0
DOCUMENT_TOKENS = 4096  # of a dataset whose documents are not separated


def write_shuffled(dataset: Dataset, directory: Path) -> None:
    """Write the dataset with the tokens of each training document shuffled, unless it is there already.

    An end-of-text token stays where it is. Without one, blocks of DOCUMENT_TOKENS count as documents.

    Raises:
        UserError: the directory cannot be written.
    """
    record = {"of": dataset.fingerprint, "seed": SHUFFLE_SEED}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FolderLock(directory, "prepares it", wait=600):
            if exists(directory / "meta.json"):
                if json.loads((directory / "meta.json").read_bytes()).get("shuffled") == record:
                    return
                (directory / "meta.json").unlink()
            write_json(directory / "meta.json", {**shuffled_files(dataset, directory), "shuffled": record})
    except OSError as error:
        raise UserError(f"{directory}: cannot be written: {error_text(error)}") from None


def shuffled_files(dataset: Dataset, directory: Path) -> dict[str, Any]:
    """Write the shards; returns the content of meta.json."""
    meta: dict[str, Any] = json.loads(json.dumps(dataset.meta))
    generator = np.random.default_rng(SHUFFLE_SEED)
    for name in meta["splits"]["val"]["files"]:
        shutil.copyfile(dataset.directory / name, directory / name)
    names = sorted(meta["splits"]["train"]["files"])
    for name, shard in zip(names, dataset.shards["train"], strict=True):
        ids = shuffle_documents(np.array(shard), meta["eot"], generator)
        write_bytes(directory / name, ids.astype(DTYPES[meta["dtype"]]).tobytes())
        meta["splits"]["train"]["files"][name]["sha256"] = sha256_of(directory / name)
    return meta


def shuffle_documents(ids: np.ndarray, eot: int | None, generator: np.random.Generator) -> np.ndarray:
    """Token ids (n,) with those of each document in random order; end-of-text tokens stay in their places."""
    shuffled = ids.copy()
    ends = np.flatnonzero(ids == eot) if eot is not None else np.arange(DOCUMENT_TOKENS, len(ids), DOCUMENT_TOKENS)
    start = 0
    for end in [*ends.tolist(), len(ids)]:
        generator.shuffle(shuffled[start:end])
        start = end + (eot is not None)
    return shuffled
