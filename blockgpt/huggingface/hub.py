"""Where a checkpoint in the format of transformers is: a folder, or a name on the Hugging Face hub.

    hf:path/to/dir      a folder
    hf:Org/Name         the hub's newest revision; hf:Org/Name@REVISION another

The hub is read by the package huggingface_hub: its cache, its token, its offline mode (HF_HUB_OFFLINE=1).
"""

import re
from pathlib import Path

from blockgpt.errors import UserError, first_line, require_package
from blockgpt.files import is_dir, list_dir

PREFIX = "hf:"  # of the values of init_from and --run that name such a checkpoint
HUB_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?")  # Org/Name, gpt2, either with @REVISION
SMALL_FILES = ("*.json", "*.model", "*.tiktoken", "*.jinja", "*.txt")


def is_checkpoint_name(value: str) -> bool:
    """Whether a value of init_from or --run names a checkpoint in the format of transformers."""
    return value.startswith(PREFIX)


def checkpoint_directory(value: str, weights: bool = False) -> Path:
    """The folder of a checkpoint, which is downloaded if it is on the hub and not in its cache.

    Args:
        value: hf:…; the prefix may be missing.
        weights: the weights, too; without them config.json and the tokenizer alone.

    Raises:
        UserError: there is no such checkpoint, or it cannot be downloaded.
    """
    name = value.removeprefix(PREFIX)
    path = Path(name).expanduser()
    if is_dir(path):
        return path
    match = HUB_NAME.fullmatch(name)
    if match is None or name.startswith((".", "/", "~")):
        raise UserError(f"{value}: there is no folder {name}, and it is no name on the Hugging Face hub (Org/Name)")
    return download_checkpoint(match[1], match[2], weights)


def download_checkpoint(name: str, revision: str | None, weights: bool) -> Path:
    """The folder of a revision in the hub's cache, complete as `weights` says."""
    hub = require_package("huggingface_hub")
    patterns, skipped = list(SMALL_FILES), ["*/*", "consolidated*"]  # the same weights in other formats
    try:
        if weights:
            # Many names have pickles, too: they are asked for only where there are no safetensors.
            patterns.append("*.safetensors")
            folder = Path(hub.snapshot_download(name, revision=revision, allow_patterns=patterns,
                                                ignore_patterns=skipped))
            if list_dir(folder, "*.safetensors"):
                return folder
            patterns.append("pytorch_model*.bin")
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=skipped))
    except Exception as error:  # offline, no such name, gated, no space: the library raises many types
        label = name if revision is None else f"{name}@{revision}"
        raise UserError(f"{PREFIX}{label}: cannot be had from the Hugging Face hub: {type(error).__name__}: "
                        f"{first_line(error)} (huggingface-cli login for a gated name; a folder works offline: "
                        "hf:path/to/dir)") from None
