"""The prompt of a checkpoint as token ids, by its own tokenizer and chat template, and the ids that end a text."""

import datetime
import json
from pathlib import Path
from typing import Any

from blockgpt.data.tokenizer import Tokenizer
from blockgpt.errors import UserError, first_line, require_package
from blockgpt.files import exists


def read_optional(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    try:
        value = json.loads(path.read_bytes()) if exists(path) else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__})") from None
    return value if isinstance(value, dict) else {}


def chat_template(directory: Path) -> str | None:
    """The chat template of a checkpoint, or None."""
    path = directory / "chat_template.jinja"
    if exists(path):
        return path.read_text(encoding="utf-8")
    template = read_optional(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def render_chat(directory: Path, text: str) -> str:
    """The text of a user's message and the beginning of the answer, by the checkpoint's chat template.

    Raises:
        UserError: the checkpoint has no template, or it fails.
    """
    template = chat_template(directory)
    if template is None:
        raise UserError(f"--chat: {directory} has no chat template (drop --chat)")
    sandbox = require_package("jinja2.sandbox").ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message: str) -> None:
        raise UserError(f"--chat: the template of {directory} refuses: {message}")

    sandbox.globals["raise_exception"] = refuse
    sandbox.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    config = read_optional(directory / "tokenizer_config.json")
    tokens = {name: content(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    try:
        rendered: str = sandbox.from_string(template).render(
            messages=[{"role": "user", "content": text}], add_generation_prompt=True, **tokens)
    except UserError:
        raise
    except Exception as error:  # jinja2's errors have many types, and a template can raise any
        raise UserError(f"--chat: the template of {directory} fails: {first_line(error)}") from None
    return rendered


def content(token: Any) -> str:
    """The text of a token of tokenizer_config.json, which is a string or an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else token or ""


def prompt_ids(directory: Path, tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    """The ids of a prompt by the checkpoint's own tokenizer: with its first token, special tokens parsed."""
    if chat:
        text = render_chat(directory, text)
    file = directory / "tokenizer.json"
    if exists(file):
        parser = require_package("tokenizers").Tokenizer.from_file(str(file))
        ids: list[int] = parser.encode(text, add_special_tokens=not chat).ids
        if ids and not chat and ids[-1] in stop_ids(directory, tokenizer):
            ids = ids[:-1]  # a tokenizer that ends every text: this one goes on
        return ids
    if chat:
        raise UserError(f"--chat: {directory} has no tokenizer.json, which parses the template's special tokens")
    processor = getattr(tokenizer, "processor", None)  # SentencePiece's
    config = read_optional(directory / "tokenizer_config.json")
    first = [processor.bos_id()] if processor is not None and config.get("add_bos_token", True) else []
    return [*(i for i in first if i >= 0), *tokenizer.encode(text)]


def token_ids(directory: Path) -> dict[str, Any]:
    """{bos_token_id, eos_token_id, pad_token_id: id, or list of ids} that a checkpoint names.

    Those of generation_config.json come before those of config.json.
    """
    found = [read_optional(directory / name) for name in ("generation_config.json", "config.json")]
    return {name: next((file[name] for file in found if file.get(name) is not None), None)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def stop_ids(directory: Path, tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text: those that the checkpoint names, and the tokenizer's own."""
    eos = token_ids(directory)["eos_token_id"]
    listed = eos if isinstance(eos, list) else [eos]
    own = [] if tokenizer.eot is None else [tokenizer.eot]
    return list(dict.fromkeys([i for i in listed if type(i) is int] + own))
