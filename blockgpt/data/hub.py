"""Datasets on the Hugging Face hub, streamed by the package `datasets`, as partitions: one per file of the dataset."""

import hashlib
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockgpt.data.losses import Skipped
from blockgpt.data.readers import no_column
from blockgpt.errors import DataError, UserError, first_line, require_package
from blockgpt.files import below, exists, find

ATTEMPTS = 5  # network failures in a row before an error
RETRY_SECONDS = 2.0  # the wait before the first retry; it doubles before each further one


@dataclass(frozen=True)
class HubPartition:
    """One shard of a dataset that the package `datasets` streams.

    Attributes:
        arguments: of datasets.load_dataset, as (key, value) pairs.
        text_key: the column that contains the text.
        index, count: this shard and the number of shards.
        into: the split for which the documents are, or None.
        version: what tells two versions of the dataset apart.
    """

    arguments: tuple[tuple[str, Any], ...]
    text_key: str
    index: int
    count: int
    into: str | None = None
    version: str = ""

    def identity(self) -> list[Any]:
        arguments = [list(pair) for pair in self.arguments]
        return [arguments, self.text_key, self.index, self.count, self.into, self.version]

    def documents(self, skipped: Skipped) -> Iterator[tuple[str | None, str]]:
        """Yield the documents; after a network failure, continue where it stopped.

        Raises:
            DataError: after ATTEMPTS failures in a row.
        """
        name, n, before = f"{hub_name(self.arguments)} shard {self.index}", 0, skipped.begin()
        for i, row in enumerate(self.rows(), 1):
            skipped.position = (name, "row", i)
            text = row.get(self.text_key)
            if type(text) is str:
                n += 1
                if text:
                    yield self.into, text
                else:
                    skipped["empty"] += 1
            elif self.text_key not in row:
                raise no_column(hub_name(self.arguments), self.text_key, row)
            else:
                skipped.lose(f"no_{self.text_key}", f"{self.text_key} is of type {type(text).__name__}, not text")
        skipped.check(before, n, name)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the shard, with retries."""
        state: dict[str, Any] | None = None
        rows: Iterator[dict[str, Any]] | None = None
        failures = 0
        while True:
            try:
                if rows is None:
                    shard = hub_dataset(self.arguments).shard(self.count, self.index)
                    if state is not None:
                        shard.load_state_dict(state)
                    rows = iter(shard)
                row = next(rows, None)
                state = shard.state_dict()
            except Exception as error:  # the libraries below raise many types for a broken connection
                failures, rows = failures + 1, None
                if failures == ATTEMPTS:
                    raise DataError(f"{hub_name(self.arguments)}: cannot be read any further: {type(error).__name__}: "
                                    f"{first_line(error)}") from None
                time.sleep(RETRY_SECONDS * 2 ** (failures - 1))
                continue
            failures = 0
            if row is None:
                return
            yield row


def hub_partitions(path: str, name: str | None = None, split: str = "train", text_key: str = "text",
                   into: str | None = None, **more: Any) -> list[HubPartition]:
    """The partitions of a dataset on the Hugging Face hub, one per file.

    Args:
        path, name, split, more: arguments of datasets.load_dataset. Local files: path="json", data_files=...
        text_key: the column that contains the text.
        into: the split for which the documents are; None: decided for each document by its hash.

    Raises:
        DataError: the dataset cannot be opened.
        UserError: a part of a local copy cannot be read, which `datasets` would leave out.
    """
    data_files = more.get("data_files", ())
    data_files = (data_files,) if type(data_files) is str else tuple(data_files)
    try:
        revision = None if "data_files" in more else hub_revision(path, more.get("revision"))
        version = local_version((path, *data_files) if revision is None else ())
        if revision:
            more["revision"] = revision
        arguments = tuple(sorted({"path": path, "name": name, "split": split, **more}.items()))
        count = hub_dataset(arguments).num_shards
    except UserError:
        raise
    except Exception as error:  # no network, no such dataset, another file layout: the library raises many types
        problem = f"{type(error).__name__}: {first_line(error)}"
        words = " ".join(filter(None, (path, name, split)))
        raise DataError(f"{words}: cannot be opened: {problem} (--source accepts a local copy too)") from None
    return [HubPartition(arguments, text_key, i, count, into, version) for i in range(count)]


def hub_revision(path: str, revision: str | None) -> str | None:
    """The commit of a dataset on the hub that is its newest, or that `revision` names; None for local files.

    All processes, and the same command after an interruption, then read the same commit or know that it is another.
    """
    if exists(path):
        return None
    return require_package("huggingface_hub").HfApi().dataset_info(path, revision=revision).sha


def local_version(paths: Iterable[str]) -> str:
    """A digest of size and time of the local files and of those in the local folders; others are left out.

    Raises:
        UserError: a file or folder cannot be read.
    """
    files = sorted({p for path in paths for p in (Path(path), *below(Path(path)))})
    found = [(p, status) for p in files if (status := find(p)) is not None and stat.S_ISREG(status.st_mode)]
    stats = [(str(p), status.st_size, status.st_mtime_ns) for p, status in found]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16] if stats else ""


def hub_dataset(arguments: Iterable[tuple[str, Any]]) -> Any:
    """The streamed datasets.IterableDataset. Raises what the library raises."""
    keywords = {k: list(v) if type(v) is tuple else v for k, v in arguments}
    return require_package("datasets").load_dataset(**keywords, streaming=True)


def hub_name(arguments: Iterable[tuple[str, Any]]) -> str:
    """The dataset's path, name and split, for an error message."""
    keywords = dict(arguments)
    return " ".join(str(keywords[k]) for k in ("path", "name", "split") if keywords.get(k))
