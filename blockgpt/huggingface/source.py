"""A checkpoint of transformers as the beginning of a run: which keys are its own, which may change, its tokenizer.

No torch. The weights are read by blockgpt/checkpoints/initial_weights.py.
"""

import hashlib
import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blockgpt.console import echo
from blockgpt.data.dataset import dataset_dir, prepare_command, read_meta
from blockgpt.data.tokenizer import UNNAMED, Tokenizer, describe_tokenizer, from_meta, load_tokenizer, tokenizer_file
from blockgpt.errors import ConfigError, DataError
from blockgpt.files import exists, list_dir, sha256_of
from blockgpt.huggingface.hub import checkpoint_directory
from blockgpt.huggingface.prompts import chat_template, token_ids
from blockgpt.huggingface.read import architecture, read_config

# The keys of the architecture that a run may set to another value than the checkpoint's. block_size may be smaller.
CHANGEABLE = ("arch_preset", "attention_backend", "block_size", "dropout", "ffn_multiple_of", "mask_documents")
SAMPLE_TEXT = "The quick brown fox, 0123456789 times:\n\tdef f(x): return x**2  # naïve café — 你好 🙂\n"
SAMPLE_IDS = 4096  # of a vocabulary, compared by their texts


def check_unchanged(name: str, given: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Mapping[str, Any],
                    preset: Mapping[str, Any]) -> None:
    """Refuse keys that contradict a checkpoint.

    Args:
        name: the value of init_from.
        given: {key: value} of the keys that are set.
        now: all keys of the model that they would give, derived ones filled in.
        checkpoint: the same of the checkpoint's model.
        preset: the components of the arch_preset that is set; empty without one.

    Raises:
        ConfigError: a key that contradicts it.
    """
    contradictions = [f"{k} {v} (the checkpoint: {checkpoint[k]})" for k, v in preset.items()
                      if k not in CHANGEABLE and v != checkpoint[k]]
    if contradictions:
        raise ConfigError("arch_preset", f"{given['arch_preset']!r} is not the architecture of {name}: "
                                         f"{', '.join(contradictions)} (drop the key)")
    for key in given.keys() & checkpoint.keys():
        if key not in CHANGEABLE and now[key] != checkpoint[key]:
            raise ConfigError(key, f"{now[key]} is not the checkpoint's {checkpoint[key]}, which {name} decides (drop "
                                   f"the key; only {', '.join(CHANGEABLE[1:4])} and mask_documents can be set)")
    reaches = now["position_encoding"] in ("none", "alibi", "sinusoidal")  # have no largest position
    if now["block_size"] > checkpoint["block_size"] and not reaches:
        raise ConfigError("block_size", f"{now['block_size']} is beyond the {checkpoint['block_size']} positions of "
                                        f"{name} (lower it)")


def checkpoint_notes(name: str) -> tuple[str, ...]:
    """What a user may not expect of the keys that are read from a checkpoint, one line each."""
    return tuple(f"{name}: {note}" for note in architecture(checkpoint_directory(name))[1])


def describe_source(directory: Path) -> dict[str, Any]:
    """What run.json records of a checkpoint: its path, a digest of its files, and what generation needs."""
    config = read_config(directory)
    files = [path for pattern in ("config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
             for path in list_dir(directory, pattern)]
    digest = hashlib.sha256(json.dumps([[path.name, sha256_of(path)] for path in files]).encode()).hexdigest()
    return {"path": str(directory), "step": None, "sha256": digest, "tokenizer": None,
            "model_type": config.get("model_type"), "chat_template": chat_template(directory),
            "token_ids": token_ids(directory)}


# ---------------------------------------------------------------- the tokenizer


def checkpoint_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint; None if it has no file of one."""
    try:
        tokenizer_file(str(directory.absolute()))
    except DataError:
        return None
    return load_tokenizer(str(directory.absolute()))  # a folder may be called gpt2, as a tokenizer of tiktoken is


def check_tokenizer(name: str, directory: Path, meta: Mapping[str, Any], datasets: Iterable[str],
                    data_dir: str | None) -> None:
    """`ConfigError` if datasets were prepared with another vocabulary than the checkpoint's.

    Args:
        name: the value of init_from.
        directory: of the checkpoint.
        meta: the tokenizer's entry of the datasets' meta.json.
        datasets: their names.
        data_dir: where they are; None: the default.
    """
    theirs = checkpoint_tokenizer(directory)
    if theirs is None:
        echo(f"warning: {directory} has no tokenizer: whether the ids of {', '.join(datasets)} mean the same is not "
             "known", sys.stderr)
        return
    if meta.get("name") == UNNAMED or is_same_vocabulary(theirs, from_meta(dict(meta))):
        return
    commands = "; ".join(command_with_tokenizer(dataset, data_dir, directory) for dataset in datasets)
    raise ConfigError("init_from", f"{name} has another vocabulary ({describe_tokenizer(theirs.to_meta())}) than "
                                   f"{', '.join(datasets)} ({describe_tokenizer(dict(meta))}): prepare the data with "
                                   f"it ({commands})")


def command_with_tokenizer(dataset: str, data_dir: str | None, directory: Path) -> str:
    """The command that prepares a dataset again, with the tokenizer of a checkpoint."""
    path = dataset_dir(dataset, data_dir) / "meta.json"
    recorded = read_meta(path).get("command") if exists(path) else None  # data/files/prepare.py's
    words = shlex.split(recorded if isinstance(recorded, str) else prepare_command(dataset, data_dir))
    if "--tokenizer" in words:
        at = words.index("--tokenizer")
        words = words[:at] + words[at + 2:]
    return shlex.join([*(word for word in words if not word.startswith("--tokenizer=")), "--tokenizer",
                       str(directory.absolute())])


def is_same_vocabulary(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers give the same ids to text, and ids the same text.

    They may be two formats of one vocabulary, as GPT-2's are, and may end documents with different tokens.
    """
    if {**a.to_meta(), "eot": None} == {**b.to_meta(), "eot": None}:
        return True
    try:
        if a.encode(SAMPLE_TEXT) != b.encode(SAMPLE_TEXT):
            return False
    except DataError:  # one of them cannot encode it
        return False
    ids = range(0, min(a.vocab_size, b.vocab_size), max(1, a.vocab_size // SAMPLE_IDS))
    return all(a.decode([i]) == b.decode([i]) for i in ids if i not in (a.eot, b.eot))
