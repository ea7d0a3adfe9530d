# PYTHON_ARGCOMPLETE_OK
"""Text from a trained model: `python sample.py --run=runs/NAME --prompt="def main("`.

--run=hf:NAME is a checkpoint of transformers, a folder or a name on the hub; with --chat its chat template is used.
"""

import argparse
import hashlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.console import ArgumentParser, check_ranges, script_path
from blockgpt.errors import CheckpointError, DataError, UserError, exit_on_user_error
from blockgpt.files import exists, is_dir, user_path
from blockgpt.huggingface.hub import is_checkpoint_name

if TYPE_CHECKING:  # torch is imported after the flags are checked
    import torch

    from blockgpt.data.tokenizer import Tokenizer
    from model_builder import GPT
    from model_config import ModelConfig

CACHE_BYTES = 2**30  # of the samples that are generated at once


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The parsed command line; `UserError` for a value out of range."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=os.path.expanduser, required=True,
                        help="run directory, or hf:FOLDER, hf:Org/Name, hf:Org/Name@REVISION")
    parser.add_argument("--checkpoint", choices=("best", "latest"), default="best",
                        help="best: the best evaluation of those that were saved; latest: the newest")
    parser.add_argument("--prompt", default="\n", help="text to continue")
    parser.add_argument("--chat", action="store_true", help="for hf:NAME: the prompt is a message in the checkpoint's "
                        "chat template, and the answer is printed")
    parser.add_argument("--stream", action="store_true", help="print the text while it grows; for one sample")
    parser.add_argument("--num_samples", type=int, default=1, help="independent continuations")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="maximum number of tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top_k", type=int, help="only the k likeliest tokens")
    parser.add_argument("--top_p", type=float, help="only the likeliest tokens that together have this probability")
    parser.add_argument("--seed", type=int, default=1337, help="the same seed gives the same text")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="of weights and activations; auto: bfloat16 on CUDA devices that support it, else float32")
    args = parser.parse_args(argv)
    if args.chat and not is_checkpoint_name(args.run):
        raise UserError(f"--chat: {args.run} has no chat template (it is for --run=hf:NAME)")
    if args.stream and args.num_samples != 1:
        raise UserError(f"--stream: shows one sample, not {args.num_samples} (drop one of the two flags)")
    check_ranges(args, {
        "num_samples": (args.num_samples >= 1, "at least 1"),
        "max_new_tokens": (args.max_new_tokens >= 0, "at least 0"),
        "temperature": (args.temperature == 0 or 1e-3 <= args.temperature <= 1e6, "0, or from 0.001 to 1e6"),
        "top_k": (args.top_k is None or args.top_k >= 1, "at least 1"),
        "top_p": (args.top_p is None or 0 < args.top_p <= 1, "in (0, 1]"),
        "seed": (0 <= args.seed < 2**63, "from 0 to 2**63 - 1")})
    return args


def load_model(run_dir: Path, which: str, device: "torch.device") -> "tuple[GPT, Tokenizer]":
    """(model on `device`, tokenizer) of a run, from its best or newest checkpoint, verified.

    If no checkpoint is usable (they may have been deleted to free disk space): the weights exported at the end.

    Args:
        run_dir: the run directory; the run may be running, finished or failed.
        which: "best" or "latest".
        device: of the model.

    Raises:
        UserError: run_dir is not a run directory.
        CheckpointError: there is no usable checkpoint and no export, or it was written by another version.
    """
    from blockgpt.checkpoints import checkpoint
    from blockgpt.data.tokenizer import from_meta
    from model_builder import build_model, load_weights
    from model_config import ModelConfig

    if not is_dir(run_dir):
        is_default = run_dir.parent == Path("runs") or not is_dir(run_dir.parent)
        out_dir = [] if is_default else [f"--out_dir={run_dir.parent}"]
        words = ["python", script_path("compare_architectures.py"), *out_dir]
        raise UserError(f"--run: {run_dir} is not a run directory ({shlex.join(words)} lists them)")
    try:
        source = checkpoint.find_best(run_dir) if which == "best" else checkpoint.find_newest(run_dir)
        tensors = checkpoint.read_weights(source)
        description = checkpoint.read_state(source)["description"]
    except CheckpointError:
        source = run_dir / "model.safetensors"
        if not exists(source):
            raise
        tensors, description = checkpoint.read_export(run_dir)
        if description.get("step") is not None:  # else an imported checkpoint, which never had another
            print(f"note: no usable checkpoint: these are the weights exported at step {description['step']}",
                  file=sys.stderr)
        elif description.get("tokenizer") is None:
            raise UserError(f"--run: {run_dir} was imported without a tokenizer") from None
    try:
        config, tokenizer = ModelConfig(**description["model"]), from_meta(description["tokenizer"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source}: was written by another version of this program ({error})") from None
    model = build_model(config, device=device)
    load_weights(model, tensors, source)
    return model.eval(), tokenizer


def load_checkpoint(name: str, device: "torch.device") -> "tuple[GPT, Tokenizer, Path]":
    """(model on `device`, tokenizer, folder) of a checkpoint of transformers; `UserError` if there is none."""
    import torch

    from blockgpt.huggingface.hub import checkpoint_directory
    from blockgpt.huggingface.read import Weights, architecture, find_family, read_config
    from blockgpt.huggingface.source import checkpoint_tokenizer
    from model_builder import build_model
    from model_config import ModelConfig

    directory = checkpoint_directory(name, weights=True)
    tokenizer = checkpoint_tokenizer(directory)
    if tokenizer is None:
        raise UserError(f"--run: {directory} has no tokenizer")
    config = ModelConfig(**architecture(directory)[0])
    model = build_model(config, device=device)
    weights = Weights(directory, find_family(read_config(directory)), model.config.flat(),
                      {name: p.shape for name, p in model.named_parameters()})
    weights.echo_notes()
    with torch.no_grad():
        for parameter, p in model.named_parameters():
            weights.read_into(parameter, p, [0] * p.dim())
    return model.eval(), tokenizer, directory


def sample_seed(seed: int, i: int) -> int:
    """The seed of sample `i`. It does not depend on the number of samples."""
    digest = hashlib.sha256(f"{seed}:{i}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1 if i else seed


def samples_at_once(config: "ModelConfig", tokens: int, bytes_per_value: int) -> int:
    """How many samples of `tokens` tokens have key/value caches of `CACHE_BYTES` together; at least 1."""
    full = config.resolve()
    assert full.n_kv_head is not None and full.head_dim is not None  # resolved
    values_per_token = 2 * full.n_layer * full.n_kv_head * full.head_dim
    return max(1, CACHE_BYTES // (values_per_token * min(tokens, full.block_size) * bytes_per_value))


def text_of(tokenizer: "Tokenizer", ids: list[int], prompt_length: int, stops: Sequence[int] | None = None) -> str:
    """The text of a prompt and its continuation, up to the first token of the continuation that ends a text.

    stops: the tokens that end one; None: the tokenizer's own.
    """
    stops = [tokenizer.eot] if stops is None and tokenizer.eot is not None else stops or []
    end = next((i for i in range(prompt_length, len(ids)) if ids[i] in stops), len(ids))
    return tokenizer.decode(ids[:end])


class TextStream:
    """Prints a text while it grows: whole characters only."""

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int], stops: Sequence[int]) -> None:
        self.tokenizer, self.ids, self.stops, self.printed = tokenizer, list(prompt), stops, 0

    def add(self, tokens: Sequence[int]) -> None:
        """Print what `tokens` add to the text."""
        self.ids += [token for token in tokens if token not in self.stops]
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\ufffd"):  # else half of a character
            print(text[self.printed:], end="", flush=True)
            self.printed = len(text)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    import torch

    from blockgpt.training.device import choose_device, choose_dtype

    device = choose_device(args.device, local_rank=0)
    dtype = choose_dtype(args.dtype, device)
    if is_checkpoint_name(args.run):
        from blockgpt.huggingface.prompts import prompt_ids, stop_ids

        model, tokenizer, directory = load_checkpoint(args.run, device)
        ids, stops = prompt_ids(directory, tokenizer, args.prompt, args.chat), stop_ids(directory, tokenizer)
    else:
        model, tokenizer = load_model(user_path(args.run), args.checkpoint, device)
        stops = [] if tokenizer.eot is None else [tokenizer.eot]
        try:
            ids = list(tokenizer.encode(args.prompt))
        except DataError as error:
            raise UserError(f"--prompt: {error}") from None
    model.to(dtype)
    if not ids:
        raise UserError("--prompt: is empty (give at least one character)")
    batch_size = samples_at_once(model.config, len(ids) + args.max_new_tokens, dtype.itemsize)
    stream = TextStream(tokenizer, [] if args.chat else ids, stops) if args.stream else None
    if stream is not None:
        stream.add([])
    for first in range(0, args.num_samples, batch_size):
        samples = range(first, min(first + batch_size, args.num_samples))
        generators = [torch.Generator(device).manual_seed(sample_seed(args.seed, i)) for i in samples]
        out = model.generate(torch.tensor([ids] * len(samples), device=device), args.max_new_tokens, args.temperature,
                             args.top_k, args.top_p, vocab_size=tokenizer.vocab_size, stop=stops,
                             generator=generators,
                             on_token=None if stream is None else lambda token: stream.add(token[:, 0].tolist()))
        if stream is not None:
            print(flush=True)
            break
        for i, row in zip(samples, out.tolist(), strict=True):
            printed_ids, prompt_length = (row[len(ids):], 0) if args.chat else (row, len(ids))
            print(("-" * 80 + "\n" if i else "") + text_of(tokenizer, printed_ids, prompt_length, stops), flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
