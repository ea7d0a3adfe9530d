"""A checkpoint in the format of transformers: its config.json, its tensors, its tokenizer.

`find_family` names the rules; `Weights` translates the tensors, one at a time, and reads a rank's chunk of each.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockgpt.console import echo
from blockgpt.errors import CheckpointError, UserError, first_line, short_repr
from blockgpt.files import exists, list_dir
from blockgpt.huggingface.families import FAMILIES
from blockgpt.huggingface.rules import REFUSED_KEYS, Family, StoredTensor, Unsupported, plan_tensors, read_keys

if TYPE_CHECKING:  # a config.json is read before torch loads
    import torch

    from blockgpt.checkpoints.files import Index

FLOATS = ("F64", "F32", "F16", "BF16")  # narrower ones have scales elsewhere
ENCODER_DECODER = "an encoder-decoder; no objective here trains one"
ENCODER = "a bidirectional encoder; no objective here trains one"
# {model_type: what it is}: of those that are recognised and cannot be represented, whatever their config.json says.
REFUSED_TYPES = {
    **dict.fromkeys(("t5", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "led", "longt5", "m2m_100",
                     "blenderbot", "prophetnet", "whisper", "t5gemma", "t5gemma2"), ENCODER_DECODER),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "deberta", "deberta-v2",
                     "modernbert", "camembert", "mpnet", "nomic_bert", "eurobert"),
                    ENCODER),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "granitemoeshared", "dbrx",
                     "jamba", "llama4", "llama4_text", "gpt_oss", "glm4_moe", "flex_olmo"), "a mixture of experts"),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3", "kimi_k2"), "multi-head latent attention"),
    **dict.fromkeys(("mamba", "mamba2", "rwkv", "falcon_mamba", "recurrent_gemma", "qwen3_next", "granitemoehybrid",
                     "falcon_h1"), "recurrent layers"),
    **dict.fromkeys(("gemma3", "gemma3n", "mistral3", "paligemma", "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
                     "mllama"), "a vision encoder (only the text models of the family work)"),
}


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a checkpoint; `UserError` if there is none that can be read."""
    path = directory / "config.json"
    if not exists(path):
        raise UserError(f"{directory}: has no config.json, so it is no checkpoint in the format of transformers")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {first_line(error)})") from None
    if type(config) is not dict:
        raise UserError(f"{path}: is not an object")
    return config


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        Unsupported: a model that cannot be represented; the message names what it is and lists what works.
    """
    name = config.get("model_type")
    works = f"(supported: {', '.join(FAMILIES)})"
    if isinstance(name, str) and name in REFUSED_TYPES:
        raise Unsupported(f"{name} is {REFUSED_TYPES[name]} {works}")
    for key, reason in REFUSED_KEYS.items():
        if config.get(key):
            raise Unsupported(f"{key} is set: {reason} {works}")
    if not isinstance(name, str) or name not in FAMILIES:
        raise Unsupported(f"model_type {short_repr(name)} is not supported {works}")
    if not config.get("is_causal", True):
        raise Unsupported(f"is_causal is {config['is_causal']}: {ENCODER} {works}")
    heads = config.get("architectures")
    if isinstance(heads, list) and any(isinstance(head, str) and "MaskedLM" in head for head in heads):
        raise Unsupported(f"{heads[0]} is {ENCODER} {works}")
    return FAMILIES[name]


def architecture(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """({key here: value} of a checkpoint, notes); `UserError` if it cannot be represented."""
    config = read_config(directory)
    try:
        return read_keys(find_family(config), config)
    except Unsupported as error:
        raise UserError(f"{directory}/config.json: {error}") from None


# ---------------------------------------------------------------- tensors


class TensorFiles:
    """The tensors of a checkpoint by name: safetensors, sharded or not, else pytorch_model.bin.

    Attributes:
        names: of all tensors.
        warnings: a line each.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.warnings = directory, list[str]()
        self.opened: dict[str, Any] = {}
        self.file_of: dict[str, str] = {}
        files = self._safetensors()
        self.pickled = not files
        if self.pickled:
            files = self._listed("pytorch_model.bin")
            if not files:
                raise UserError(f"{directory}: has no *.safetensors (and no pytorch_model.bin)")
            self.warnings.append(f"{files[0]}, a pickle, is read by torch's weights-only loader (safetensors are safer "
                                 "and faster)")
        for file in files:
            for name in self._open(file).keys():  # noqa: SIM118 (safetensors' is not a dict)
                if name in self.file_of:
                    raise CheckpointError(f"{directory}: {name} is in {self.file_of[name]} and in {file}")
                self.file_of[name] = file

    @property
    def names(self) -> list[str]:
        return list(self.file_of)

    def _safetensors(self) -> list[str]:
        listed = self._listed("model.safetensors")
        return listed or [p.name for p in list_dir(self.directory, "*.safetensors")][:1]

    def _listed(self, name: str) -> list[str]:
        """The files that an index lists, or the one file `name`; none if there is neither."""
        index = self.directory / f"{name}.index.json"
        if exists(index):
            try:
                files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
                missing = [file for file in files if Path(file).name != file or not exists(self.directory / file)]
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(f"{index}: cannot be read ({type(error).__name__})") from None
            if missing:
                raise CheckpointError(f"{index}: lists {short_repr(missing[0])}, which is not in the folder")
            return files
        return [name] if exists(self.directory / name) else []

    def _open(self, file: str) -> Any:
        """The file's tensors by name: keys(), and get_tensor or an item."""
        if file not in self.opened:
            from blockgpt.checkpoints.files import safetensors_errors

            path = self.directory / file
            if self.pickled:
                import torch

                try:
                    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                except Exception as error:  # pickle's errors have many types
                    raise CheckpointError(f"{path}: torch's weights-only loader refuses it: "
                                          f"{first_line(error)}") from None
                if type(content) is not dict and not hasattr(content, "keys"):
                    raise CheckpointError(f"{path}: is not a dict of tensors")
                self.opened[file] = content
            else:
                from safetensors import safe_open

                with safetensors_errors(path):
                    self.opened[file] = safe_open(path, "pt")
        return self.opened[file]

    def read(self, name: str) -> "torch.Tensor":
        """A tensor, on the CPU."""
        from blockgpt.checkpoints.files import safetensors_errors

        file = self.file_of[name]
        with safetensors_errors(self.directory / file):
            opened = self._open(file)
            return opened[name] if self.pickled else opened.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        file = self._open(self.file_of[name])
        return tuple(file[name].shape if self.pickled else file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's dtype, as safetensors calls it."""
        from blockgpt.checkpoints.files import SAFETENSORS_DTYPES

        file = self._open(self.file_of[name])
        if self.pickled:
            return SAFETENSORS_DTYPES.get(file[name].dtype, str(file[name].dtype))
        return str(file.get_slice(name).get_dtype())


class Weights:
    """The parameters of a model here, read from a checkpoint by the rules of its family.

    Everything is checked before the first tensor is read: each parameter has its tensor, each tensor is used or is a
    constant, all shapes fit, none is quantised.

    Args:
        directory: of the checkpoint.
        family: its rules.
        keys: of the model: n_head, n_kv_head, head_dim, and those in the rules' conditions; derived ones filled in.
        shapes: {name: shape} of all parameters of the model.

    Attributes:
        unused: the tensors that hold no weight of the model, with the reason.

    Raises:
        UserError: the tensors are not those of the model.
    """

    def __init__(self, directory: Path, family: Family, keys: Mapping[str, Any],
                 shapes: Mapping[str, Sequence[int]]) -> None:
        self.directory, self.family, self.keys = directory, family, keys
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.files = TensorFiles(directory)
        self.unused: dict[str, str] = {}
        self.file_names = self._file_names()
        targets = plan_tensors(family.rules_for(keys), keys, self.shapes)
        self.target_of: dict[str, StoredTensor] = {parameter: target for target in targets for parameter in target.ours}
        self.last: tuple[str, list[torch.Tensor]] | None = None
        self._check(targets)

    def _file_names(self) -> dict[str, str]:
        """{name in the rules: name in the file}; a checkpoint of the base model lacks the prefix."""
        names, prefix = self.files.names, self.family.prefix
        if any(name.startswith(prefix) for name in names):
            return {name: name for name in names}
        heads = {rule.theirs for rule in self.family.tensors if rule.ours == ("lm_head",)}
        return {name if name.rpartition(".")[0] in heads else prefix + name: name for name in names}

    def _check(self, targets: Sequence[StoredTensor]) -> None:
        for target in targets:
            if target.name not in self.file_names:
                raise UserError(f"{self.directory}: has no tensor {target.name}, which {self.family.model_type} has")
            found = self.files.shape(self.file_names[target.name])
            if not target.rule.layout.accepts(found, target.shape):
                raise UserError(f"{self.directory}: {target.name} has shape {found}, by config.json it has "
                                f"{target.shape}")
            dtype = self.files.dtype(self.file_names[target.name])
            if dtype not in FLOATS:
                raise UserError(f"{self.directory}: {target.name} is of {dtype}: quantised weights (use the checkpoint "
                                "that they were made from)")
            if found[:1] != target.shape[:1]:
                self.unused[target.name] = f"rows {target.shape[0]} to {found[0] - 1}: beyond block_size"
        used = {target.name for target in targets}
        for name in self.file_names.keys() - used:
            if re.search(self.family.buffers, name):
                self.unused[name] = "a constant"
            elif "lm_head.weight" not in self.shapes and name == self._head_name():
                self._check_tied(name)
            else:
                raise UserError(f"{self.directory}: has the tensor {name}, for which the model has no place "
                                f"({self.family.model_type} has none)")

    def _head_name(self) -> str:
        return next(f"{rule.theirs}.weight" for rule in self.family.tensors if rule.ours == ("lm_head",))

    def _check_tied(self, head: str) -> None:
        """`UserError` unless the head in the file equals the embedding to which config.json ties it."""
        import torch

        embedding = self.target_of["token_embedding.weight"].name
        if not torch.equal(self.files.read(self.file_names[head]), self.files.read(self.file_names[embedding])):
            raise UserError(f"{self.directory}: {head} differs from {embedding}, to which config.json ties it "
                            "(set tie_word_embeddings to false there if they are two matrices)")
        self.unused[head] = f"equals {embedding}, to which it is tied"

    def notes(self) -> list[str]:
        """What was not read, and how it was read, a line each; a tensor that all layers have is one line."""
        layers = Counter((re.sub(r"\.\d+\.", ".{i}.", name), reason) for name, reason in self.unused.items())
        return [*self.files.warnings, *(f"{name}: not read ({reason}{f'; {n} layers' if n > 1 else ''})"
                                        for (name, reason), n in sorted(layers.items()))]

    def echo_notes(self) -> None:
        """Print the notes to stderr."""
        for note in self.notes():
            echo(f"note: {self.directory}: {note}", sys.stderr)

    def index(self) -> "Index":
        """The parameters, as the index of a checkpoint here."""
        from blockgpt.checkpoints.files import TORCH_DTYPES, Index, TensorEntry

        index = Index(self.directory, {})
        for name, shape in self.shapes.items():
            dtype = TORCH_DTYPES[self.files.dtype(self.file_names[self.target_of[name].name])]
            index.entries[name] = TensorEntry(dtype, shape, [])
        index.read_into = lambda key, local, offsets: self.read_into(key, local, offsets)  # type: ignore[method-assign]
        return index

    def read(self, name: str) -> "torch.Tensor":
        """A parameter, on the CPU, in the dtype of the file."""
        target = self.target_of[name]
        if self.last is None or self.last[0] != target.name:  # the parameters of one tensor follow each other
            tensor = self.files.read(self.file_names[target.name])
            self.last = (target.name, target.rule.layout.split(tensor, target.shapes, self.keys))
        return self.last[1][target.ours.index(name)]

    def read_into(self, name: str, local: "torch.Tensor", offsets: Sequence[int]) -> None:
        """Fill `local`, the chunk of a parameter at `offsets`."""
        chunk = tuple(slice(offset, offset + n) for offset, n in zip(offsets, local.shape, strict=True))
        local.copy_(self.read(name)[chunk])
