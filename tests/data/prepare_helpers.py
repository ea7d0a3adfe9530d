"""Partitions in memory, and what a prepared dataset contains."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blockgpt.data.prepare import prepare
from blockgpt.data.tokenizer import ByteTokenizer, Tokenizer
from blockgpt.data.writer import Recipe


@dataclass(frozen=True)
class MemoryPartition:
    """A partition of documents in memory."""

    texts: tuple[str, ...]

    def identity(self) -> tuple[str, ...]:
        return self.texts

    def documents(self, skipped: Counter[str]) -> Iterator[tuple[None, str]]:
        return ((None, text) for text in self.texts)


def partitions_of(texts: Sequence[str], n: int = 7) -> list[MemoryPartition]:
    """The texts in partitions of n."""
    return [MemoryPartition(tuple(texts[i:i + n])) for i in range(0, len(texts), n)]


def run_prepare(out_dir: Path, partitions: Sequence[Any], tokenizer: Tokenizer | None = None, workers: int = 1,
                shard_tokens: int = 2**28, **recipe: Any) -> dict[str, Any]:
    """`prepare` with bytes as tokens and a fifth of the documents for validation, unless `recipe` differs."""
    return prepare(out_dir, tokenizer or ByteTokenizer(), partitions, source="a test",
                   recipe=Recipe(**{"val_fraction": 0.2, **recipe}), workers=workers, shard_tokens=shard_tokens)


def documents(directory: Path, split: str) -> list[str]:
    """The texts of a split whose tokens are bytes."""
    meta = json.loads((directory / "meta.json").read_text())
    ids = np.concatenate([np.fromfile(directory / f, "<u2") for f in sorted(meta["splits"][split]["files"])])
    return [bytes(d[d < 256].astype(np.uint8)).decode() for d in np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1]]


def contents(directory: Path) -> dict[str, bytes]:
    """{file name: content} of a folder."""
    return {p.name: p.read_bytes() for p in directory.iterdir()}
