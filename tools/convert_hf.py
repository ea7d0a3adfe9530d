"""Convert between this project's runs and checkpoints in the format of transformers.

    python -m tools.convert_hf import Qwen/Qwen3-0.6B --out checkpoints/qwen3     a folder or a name on the hub
    python -m tools.convert_hf export runs/NAME --out hf/NAME                     the best checkpoint of a run
    python -m tools.convert_hf table --measure       the supported families, each compared with transformers

What is imported is used as a run: --init_from=checkpoints/qwen3, sample.py --run=checkpoints/qwen3. A model that is
one of transformers' families is exported as that; any other with its own modeling file, for trust_remote_code=True.
Where transformers is installed, both sides are compared: logits, and greedy tokens with cache.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.console import ArgumentParser, human_bytes
from blockgpt.errors import CheckpointError, UserError, error_text, exit_on_user_error
from blockgpt.files import FolderLock, exists, is_dir, list_dir, user_path
from blockgpt.huggingface.families import FAMILIES
from blockgpt.huggingface.hub import checkpoint_directory
from blockgpt.huggingface.read import Weights, architecture, find_family, read_config
from blockgpt.huggingface.rules import Family, read_keys, write_keys
from blockgpt.huggingface.source import checkpoint_tokenizer, describe_source
from model_config import INIT, ModelConfig

if TYPE_CHECKING:  # torch is imported after the flags are checked
    from blockgpt.huggingface.parity import Parity
    from model_builder import GPT

# Keys that do not change what a built model computes for one document.
NO_FUNCTION = ("arch_preset", "attention_backend", "ffn_multiple_of", "init", "init_std", "zero_init_residual",
               "mup_base_width", "dropout", "mask_documents")


def effective_keys(config: ModelConfig) -> dict[str, Any]:
    """{key: value} of what a model computes: two models are the same function of their weights if these are equal.

    Scales are numbers, muP's among them; the window of each layer has its letter; a key that is not read is None.
    """
    full = config.resolve()
    init = INIT[full.init].load_class()(full)
    keys = {name: value for name, value in full.flat().items() if name not in NO_FUNCTION}
    keys["attn_scale"] = full.attn_scale or init.attention_scale()
    keys["logit_scale"] = full.logit_scale * init.logit_scale
    keys["embedding_scale"] = full.n_embd**0.5 if full.embedding_scale == "sqrt" else float(full.embedding_scale)
    letters = "".join("L" if full.window(i) is None else "S" for i in range(full.n_layer))
    keys |= dict.fromkeys(full.unused_keys().keys() & keys.keys())
    keys["window_pattern"] = letters
    keys["sliding_window"] = full.sliding_window if "S" in letters else None
    if full.position_encoding != "rope":
        return keys
    keys["rope_pattern"] = full.rope_letters()
    rotated = {letter for letter, rope in zip(letters, keys["rope_pattern"], strict=True) if rope == "R"}
    if "S" in rotated and full.rope_scaling == "none":
        keys["rope_theta_local"] = full.rope_theta_local or full.rope_theta
        if "L" not in rotated:  # the base of the layers without a window is not read
            keys["rope_theta"] = keys["rope_theta_local"]
    return keys


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    read = commands.add_parser("import", help="a checkpoint of transformers as one of this project")
    read.add_argument("source", type=os.path.expanduser,
                      help="a folder, or a name on the hub: Org/Name, Org/Name@REVISION")
    write = commands.add_parser("export", help="a run as a checkpoint of transformers")
    write.add_argument("source", type=user_path, help="a run, or what import wrote")
    write.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the tensors; None: the source's")
    write.add_argument("--custom", action="store_true", help="with its own modeling file, even if it is of a family")
    for command in (read, write):
        command.add_argument("--out", type=user_path, required=True, help="the folder to write, without a checkpoint")
        command.add_argument("--verify", action=argparse.BooleanOptionalAction, default=None,
                             help="compare both sides; None: where transformers is installed")
    families = commands.add_parser("table", help="the supported families")
    families.add_argument("--measure", action="store_true", help="compare a tiny model of each with transformers")
    args = parser.parse_args(argv)
    if args.command != "table" and args.verify is None:
        args.verify = importlib.util.find_spec("transformers") is not None
        if not args.verify:
            print("note: transformers is not installed, so that the result is not compared with the source",
                  file=sys.stderr)
    return args


# ---------------------------------------------------------------- import


def import_checkpoint(source: str, out: Path, verify: bool) -> None:
    """Write a checkpoint of transformers as an export of this project: model.safetensors and config.json."""
    directory = checkpoint_directory(source, weights=True)
    keys, notes = architecture(directory)  # what cannot be represented is refused before torch loads
    config = ModelConfig(**keys).resolve()
    from blockgpt.checkpoints import checkpoint

    shapes = parameter_shapes(config)
    weights = Weights(directory, find_family(read_config(directory)), config.flat(), shapes)
    tokenizer = checkpoint_tokenizer(directory)
    description = {"model": config.flat(), "step": None, "source": {**describe_source(directory), "name": source},
                   "tokenizer": None if tokenizer is None else tokenizer.to_meta()}
    for note in notes:
        print(f"note: {directory}: {note}", file=sys.stderr)
    weights.echo_notes()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FolderLock(out, "converts a checkpoint into it"):
            if exists(out / "run.json") or list_dir(out, "*.safetensors") or list_dir(out, "*.bin"):
                raise UserError(f"{out}: has a checkpoint (choose another folder for --out)")
            checkpoint.write_export(out, weights.index(), description)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error_text(error)}") from None
    print(f"{out}: {config.arch_name()}, {len(shapes)} tensors")
    if verify:
        from blockgpt.huggingface.parity import check_parity

        outcome = compare_with_transformers(open_source(out)[0], config, directory)
        print(f"{source} against {out}: {outcome}")
        check_parity(outcome, str(out))


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the parameters of a model; no weight is allocated."""
    import torch

    from model_builder import build_model

    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in build_model(config).named_parameters()}


# ---------------------------------------------------------------- export


def open_source(path: Path) -> tuple[Any, dict[str, Any]]:
    """(index of the tensors, description) of a run's best checkpoint, or of its export if it has none."""
    from blockgpt.checkpoints import checkpoint
    from blockgpt.checkpoints.initial_weights import export_source

    if not is_dir(path):
        raise UserError(f"{path}: is not a folder")
    if checkpoint.list_checkpoints(path):
        directory = checkpoint.find_best(path)
        state = checkpoint.read_state(directory)
        description = {**state["description"], "step": state["step"], "source": state.get("initial_weights")}
        return checkpoint.read_index(directory), description
    if not exists(path / "model.safetensors"):
        raise CheckpointError(f"{path}: has no checkpoint and no model.safetensors")
    return export_source(path, checkpoint.SINGLE_PROCESS)[0], checkpoint.verify_export(path)


def export_checkpoint(source: Path, out: Path, dtype_name: str | None, custom: bool, verify: bool) -> None:
    """Write a run as a checkpoint of transformers."""
    import torch

    from blockgpt.huggingface import write
    from blockgpt.huggingface.tokenizer_files import tokenizer_files

    index, description = open_source(source)
    try:
        config = ModelConfig(**description["model"]).resolve()
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source}: was written by another version of this program ({error})") from None
    keys, origin = effective_keys(config), description.get("source") or {}
    write.refuse_not_causal(keys)
    shapes = parameter_shapes(config)
    native = None if custom else write.native_config(
        keys, lambda found: effective_keys(ModelConfig(**found)), origin.get("model_type"))
    dtype = getattr(torch, dtype_name) if dtype_name else None
    stored = str(dtype or index.entries["token_embedding.weight"].dtype).removeprefix("torch.")
    files, ids, warnings = ({}, {}, ["no tokenizer is written: the source has none"]) if not description.get(
        "tokenizer") else tokenizer_files(description["tokenizer"], config.block_size, origin.get("chat_template"))
    if native is None:
        hf_config = write.custom_config({**keys, "dropout": config.dropout})
        tensors = write.custom_tensors(shapes)
        files[write.MODELING_FILE.name] = write.MODELING_FILE.read_bytes()
    else:
        family, theirs = native
        hf_config = write.native_json(family, theirs)
        tensors = write.native_tensors(family, keys, shapes)
    ids |= {name: value for name, value in (origin.get("token_ids") or {}).items() if value is not None}
    hf_config |= {**ids, "torch_dtype": stored, "use_cache": True}
    run = json.loads((source / "run.json").read_bytes()) if exists(source / "run.json") else {
        "arch_name": config.arch_name(), "initial_weights": origin}
    files["generation_config.json"] = write.json_bytes(ids or {"eos_token_id": None})
    files["README.md"] = write.model_card(source.name, hf_config, keys, sum(map(numel, shapes.values())), run,
                                          [] if native else write.serving_limits(keys))
    write.write_checkpoint(out, hf_config, tensors, keys, index.read,
                           lambda name: dtype or index.entries[name].dtype, files)
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    size = sum(path.stat().st_size for path in list_dir(out, "*.safetensors"))
    print(f"{out}: {hf_config['architectures'][0]}, {len(tensors)} tensors, {stored}, {human_bytes(size)}")
    if verify:
        from blockgpt.huggingface.parity import check_parity

        outcome = compare_with_transformers(index, config, out, trust_remote_code=native is None)
        print(f"{source} against {out}: {outcome}")
        check_parity(outcome, str(out))


def numel(shape: Sequence[int]) -> int:
    """The number of elements."""
    n = 1
    for size in shape:
        n *= size
    return n


def compare_with_transformers(index: Any, config: ModelConfig, directory: Path,
                              trust_remote_code: bool = False) -> "Parity":
    """Compare the model whose tensors are in `index` with a checkpoint of transformers, in float32 on the CPU."""
    import torch

    from blockgpt.huggingface.parity import compare_models, open_reference

    model = filled_model(index, config)
    reference = open_reference(directory, torch.float32, trust_remote_code)
    return compare_models(model, reference, lambda prompt, n: model.generate(prompt, n, temperature=0.0),
                          config.vocab_size, config.block_size)


def filled_model(index: Any, config: ModelConfig) -> "GPT":
    """The model with the weights of an index, in float32 on the CPU, in eval mode."""
    import torch

    from model_builder import build_model

    model = build_model(config, device="cpu").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(index.read(name))
    return model


# ---------------------------------------------------------------- the families


def family_table(measure: bool) -> list[str]:
    """The supported families, as lines of Markdown; with `measure` what `measure_family` finds."""
    columns = ["model_type", "models", "class", *(["logits", "greedy tokens", "tensors back"] if measure else [])]
    lines = ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for family in FAMILIES.values():
        cells = [family.model_type, family.members, family.architecture, *(measure_family(family) if measure else [])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines[1:]


def tiny_config(family: Family) -> ModelConfig:
    """A tiny model of a family: its defaults at a small size."""
    keys, _ = read_keys(family, {})
    full = ModelConfig(**keys).resolve()
    heads = 1 if full.n_kv_head == 1 else 4 if full.n_kv_head == full.n_head else 2
    return ModelConfig(**{**keys, "n_layer": 2, "n_head": 4, "n_kv_head": heads, "n_embd": 64, "d_ff": 256,
                          "head_dim": 16, "block_size": 64, "vocab_size": 61, "init_std": 0.2}).resolve()


def measure_family(family: Family) -> list[str]:
    """The largest difference of logits from transformers, equal greedy tokens, and whether the tensors come back.

    A tiny model with random weights, norms and biases is exported, compared in float32, and read again.
    """
    import tempfile

    import torch

    from blockgpt.huggingface import write
    from model_builder import build_model

    config = tiny_config(family)
    model = build_model(config, device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    state = {name: p.detach() for name, p in model.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in state.items()}
    keys = effective_keys(config)
    tensors = write.native_tensors(family, keys, shapes)
    with tempfile.TemporaryDirectory() as folder:
        theirs = write.native_json(family, write_keys(family, {**keys, "dropout": 0.0}))
        write.write_checkpoint(Path(folder), theirs, tensors, keys, state.__getitem__, lambda name: torch.float32, {})
        weights = Weights(Path(folder), family, config.flat(), shapes)
        outcome = compare_with_transformers(weights, config, Path(folder))
        equal = all(torch.equal(weights.read(name), tensor) for name, tensor in state.items())
    return [f"{outcome.difference:.0e}", f"{outcome.same_tokens} of 32", "bit for bit" if equal else "differ"]


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    if args.command == "table":
        print("\n".join(family_table(args.measure)))
    elif args.command == "import":
        import_checkpoint(args.source, args.out, args.verify)
    else:
        export_checkpoint(args.source, args.out, args.dtype, args.custom, args.verify)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
