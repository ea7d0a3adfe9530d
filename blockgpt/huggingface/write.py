"""A model of this project as a checkpoint of transformers: its family, config.json, safetensors.

`native_config` finds the family from the keys of what was built; a model that is of no family is written with its own
modeling file (modeling_blockgpt.py). A checkpoint is written whole or not at all: config.json comes last.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from blockgpt.checkpoints.files import TensorFile
from blockgpt.console import human_bytes
from blockgpt.errors import UserError, error_text
from blockgpt.files import FolderLock, exists, fsync_path, is_dir, list_dir, write_bytes, write_json
from blockgpt.huggingface.families import FAMILIES
from blockgpt.huggingface.rules import (
    SAME,
    Family,
    StoredTensor,
    TensorRule,
    Unsupported,
    plan_tensors,
    read_keys,
    write_keys,
)

SHARD_BYTES = 5 * 10**9  # of tensors in one file
TEMPORARY = ".convert.tmp"  # in the folder of the checkpoint, until it is complete
TOKEN_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
MODELING_FILE = Path(__file__).with_name("modeling_blockgpt.py")


def native_config(keys: Mapping[str, Any], effective: Callable[[Mapping[str, Any]], dict[str, Any]],
                  prefer: str | None = None) -> tuple[Family, dict[str, Any]] | None:
    """The family that a model is, and its keys of config.json; None if it is of none.

    A family fits if the keys that it writes are read again as the same model.

    Args:
        keys: {key: value} of everything that decides what the model computes.
        effective: {key here: value} -> the same of another model, comparable with `keys`.
        prefer: the model_type to try first: several families may fit.
    """
    for family in sorted(FAMILIES.values(), key=lambda family: family.model_type != prefer):
        try:
            theirs = write_keys(family, {**keys, "dropout": 0.0})
            again = effective(read_keys(family, theirs)[0])
        except (UserError, TypeError, ValueError, KeyError, ArithmeticError):  # the family has no such model
            continue
        if not differing_keys(keys, again):
            return family, theirs
    return None


def native_json(family: Family, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model of `family`; without the ids of tokens, which have no default that fits."""
    return {"architectures": [family.architecture], "model_type": family.model_type, **theirs, **TOKEN_IDS}


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ by more than the rounding of a float."""
    def same(x: Any, y: Any) -> bool:
        are_numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (x, y))
        return math.isclose(x, y, rel_tol=1e-12) if are_numbers else x == y

    return sorted(name for name in a.keys() | b.keys() if not same(a.get(name), b.get(name)))


def custom_config(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json for modeling_blockgpt.py. transformers has its own format for the key rope_scaling."""
    classes = {"AutoConfig": "BlockGPTConfig", "AutoModel": "BlockGPTModel",
               "AutoModelForCausalLM": "BlockGPTForCausalLM"}
    return {"architectures": ["BlockGPTForCausalLM"], "model_type": "blockgpt",
            "auto_map": {auto: f"{MODELING_FILE.stem}.{name}" for auto, name in classes.items()},
            **{"rope_scaling_type" if name == "rope_scaling" else name: value for name, value in keys.items()
               if value is not None}, "tie_word_embeddings": keys["weight_tying"], **TOKEN_IDS}


def custom_tensors(shapes: Mapping[str, Sequence[int]]) -> list[StoredTensor]:
    """The tensors of such a checkpoint: the parameters, those of the body below `model.`."""
    return [StoredTensor(name if name.startswith("lm_head.") else f"model.{name}", (name,), (tuple(shape),),
                         TensorRule("", (), SAME), tuple(shape)) for name, shape in shapes.items()]


def native_tensors(family: Family, keys: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> list[StoredTensor]:
    """The tensors of a checkpoint of `family`."""
    return plan_tensors(family.rules_for(keys), keys, shapes)


# ---------------------------------------------------------------- files


def shards_of(sizes: Mapping[str, int], limit: int = SHARD_BYTES) -> list[list[str]]:
    """The names of `sizes` {name: bytes} in files of at most `limit` bytes, one tensor at least in each."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_checkpoint(out: Path, config: Mapping[str, Any], tensors: Sequence[StoredTensor], keys: Mapping[str, Any],
                     read: Callable[[str], torch.Tensor], dtype_of: Callable[[str], torch.dtype],
                     files: Mapping[str, bytes], shard_bytes: int = SHARD_BYTES) -> None:
    """Write a checkpoint into the folder `out`, which has none; one tensor is in memory at a time.

    Args:
        out: created if it does not exist.
        config: of config.json.
        tensors: see `native_tensors`.
        keys: of the model.
        read: the parameter of a name, on the CPU.
        dtype_of: its dtype in the file.
        files: {name: content} of the other files.
        shard_bytes: the largest size of a file of several tensors.

    Raises:
        UserError: there is a checkpoint in it, another process writes into it, or it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FolderLock(out, "converts a checkpoint into it"):
            check_empty(out)
            temporary = out / TEMPORARY
            shutil.rmtree(temporary, ignore_errors=True)  # of a conversion that was killed
            try:
                temporary.mkdir()
                write_tensors(temporary, tensors, keys, read, dtype_of, shard_bytes)
                for name, content in files.items():
                    write_bytes(temporary / name, content)
                fsync_path(temporary)
                for path in list_dir(temporary):
                    os.replace(path, out / path.name)
                write_json(out / "config.json", config, indent=2)  # the last: without it nothing loads
                fsync_path(out)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error_text(error)}") from None


def check_empty(out: Path) -> None:
    """`UserError` if a folder has a checkpoint. Files of a conversion that was killed are removed."""
    if exists(out / "config.json"):
        raise UserError(f"{out}: has a checkpoint (choose another folder for --out)")
    for path in [*list_dir(out, "*.safetensors"), *list_dir(out, "*.safetensors.index.json")]:
        path.unlink()


def write_tensors(folder: Path, tensors: Sequence[StoredTensor], keys: Mapping[str, Any],
                  read: Callable[[str], torch.Tensor], dtype_of: Callable[[str], torch.dtype],
                  shard_bytes: int) -> None:
    """Write model.safetensors, or the shards and their index."""
    by_name = {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.name)}
    layout = {name: (dtype_of(tensor.ours[0]), tensor.shape) for name, tensor in by_name.items()}
    sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in layout.items()}
    shards = shards_of(sizes, shard_bytes)

    def stored(name: str) -> torch.Tensor:
        tensor = by_name[name]
        joined = tensor.rule.layout.join([read(parameter) for parameter in tensor.ours], keys)
        return joined.to(layout[name][0])

    names = (["model.safetensors"] if len(shards) == 1 else
             [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)])
    for file_name, shard in zip(names, shards, strict=True):
        with TensorFile(folder / file_name, {name: layout[name] for name in shard}, {"format": "pt"}) as file:
            file.write_tensors(stored)
    if len(shards) > 1:
        weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}, indent=2)


def json_bytes(value: Any) -> bytes:
    """A JSON file's content."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# ---------------------------------------------------------------- the model card


def model_card(name: str, config: Mapping[str, Any], keys: Mapping[str, Any], parameters: int, run: Mapping[str, Any],
               limits: Sequence[str]) -> bytes:
    """README.md of a checkpoint: what the run's own record says; what is not known is left out.

    Args:
        name: the title.
        config: of config.json.
        keys: of the model.
        parameters: their number.
        run: the content of run.json, or {}.
        limits: what other programs cannot do with it, a line each.
    """
    results, data, source = (run.get(key) or {} for key in ("results", "data", "initial_weights"))
    rows = [("architecture", run.get("arch_name")), ("class", config["architectures"][0]),
            ("parameters", f"{parameters:,} ({human_bytes(4 * parameters)} in float32)"),
            ("context", f"{keys['block_size']:,} tokens"), ("vocabulary", f"{keys['vocab_size']:,} ids"),
            ("data", data.get("dataset")),
            ("trained on", f"{results['tokens']:,} tokens in {results['step']:,} steps" if "step" in results else None),
            ("validation loss", f"{results['val_loss']:.4f} nats per token" if "val_loss" in results else None),
            ("bits per byte", f"{results['val_bpb']:.4f}" if results.get("val_bpb") else None),
            ("started from", source.get("name") or source.get("path"))]
    table = [f"| {label} | {value} |" for label, value in rows if value]
    remote_code = ", trust_remote_code=True" if "auto_map" in config else ""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", "", f"# {name}", "",
             "Trained with blockGPT. License: to be chosen by whoever publishes this model.", "",
             "| | |", "|---|---|", *table, "", "```python",
             "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
             f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{remote_code})',
             'tokenizer = AutoTokenizer.from_pretrained("FOLDER")', "```", ""]
    if limits:
        lines += ["## What other programs can do with it", "", *(f"- {line}" for line in limits), ""]
    return "\n".join(lines).encode()


def serving_limits(keys: Mapping[str, Any]) -> list[str]:
    """What vLLM's transformers backend can serve of a model with its own modeling file, and what it cannot."""
    cannot = {"attention scores that fall with distance (ALiBi)": keys["position_encoding"] == "alibi",
              "a softcap of the attention scores, except with kernels that take one": keys["attn_softcap"] is not None,
              "value embeddings and the mixing in of the first embeddings, under pipeline parallelism":
                  bool(keys["value_embeddings"] or keys["x0_mix"])}
    limits = [f"vLLM's transformers backend does not support {what}." for what, has in cannot.items() if has]
    if not limits:
        limits = ["Attention goes through transformers' attention interface, as vLLM's transformers backend asks; it "
                  "was not run there."]
    return ["It is opened by transformers with trust_remote_code=True: read modeling_blockgpt.py before.", *limits,
            "llama.cpp cannot convert it: it is none of the architectures that it knows."]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has a checkpoint of transformers."""
    return is_dir(folder) and exists(folder / "config.json")


def refuse_not_causal(keys: Mapping[str, Any]) -> None:
    """`Unsupported` for a model whose tokens see later ones."""
    if not keys["causal"]:
        raise Unsupported("causal=False: a model whose tokens see later ones is no language model of transformers")
