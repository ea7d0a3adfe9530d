"""What a rule is: keys of config.json against keys of this project, tensors of a file against parameters.

A family (families.py) is a table of `KeyRule`s and `TensorRule`s. Each is read forwards to import a checkpoint and
backwards to export a model. Keys are plain dicts, tensors come one at a time: nothing here knows a model's classes.
To add a layout of tensors: a subclass of `Layout` with `split` and `join`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from blockgpt.errors import UserError, nearest, short_repr

if TYPE_CHECKING:  # a config.json is read before torch loads
    import torch

Keys = Mapping[str, Any]


class Unsupported(UserError):
    """A checkpoint, or a model, that has something which cannot be represented on the other side."""


# ---------------------------------------------------------------- keys


@dataclass(frozen=True)
class KeyRule:
    """Keys of config.json, and the keys of this project that they stand for.

    Attributes:
        defaults: {key of config.json: the value that transformers takes where the file has none}.
        read: {key of config.json: value}, complete with all defaults of the family -> {key here: value}.
        write: {key here: value} -> {key of config.json: value}. It need not check that nothing is lost: what is
            written is read again and compared.
    """

    defaults: Keys
    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[Keys], dict[str, Any]]


def same(theirs: str, ours: str, default: Any) -> KeyRule:
    """A key that has the same values in both."""
    return KeyRule({theirs: default}, lambda t: {ours: t[theirs]}, lambda o: {theirs: o[ours]})


def derived(theirs: str, ours: str, default: Any, of: Callable[[Keys], Any]) -> KeyRule:
    """The same, where None stands for `of` {key of config.json: value}."""
    return KeyRule({theirs: default}, lambda t: {ours: of(t) if t[theirs] is None else t[theirs]},
                   lambda o: {theirs: o[ours]})


def converted(theirs: str, ours: str, default: Any, read: Callable[[Any], Any], write: Callable[[Any], Any]) -> KeyRule:
    """A key whose value is computed from the other's."""
    return KeyRule({theirs: default}, lambda t: {ours: read(t[theirs])}, lambda o: {theirs: write(o[ours])})


def choice(theirs: str, default: Any, values: Mapping[Any, Keys]) -> KeyRule:
    """A key each of whose values stands for some keys here; another value is refused.

    Backwards the first value counts whose keys are those of the model.
    """
    def read(t: Keys) -> dict[str, Any]:
        value = t[theirs]
        if isinstance(value, (list, dict)) or value not in values:
            raise Unsupported(f"{theirs}: {short_repr(value)} is not supported (only {options(values)})")
        return dict(values[value])

    def write(o: Keys) -> dict[str, Any]:
        found = [value for value, keys in values.items() if all(o[k] == v for k, v in keys.items())]
        if not found:
            names = next(iter(values.values()))
            raise Unsupported(f"{theirs} has no value for {', '.join(f'{k}={o[k]}' for k in names)}")
        return {theirs: found[0]}

    return KeyRule({theirs: default}, read, write)


def options(values: Mapping[Any, Any] | Sequence[Any]) -> str:
    """The values of a key, as an error lists them."""
    return ", ".join(short_repr(value) if not isinstance(value, str) else value for value in values)


def required(theirs: str, default: Any, *values: Any) -> KeyRule:
    """A key that must have its default, or one of `values`; nothing here stands for it."""
    allowed: dict[Any, Keys] = {value: {} for value in (default, *values)}
    return choice(theirs, default, allowed)


def off(theirs: str, default: Any = None) -> KeyRule:
    """A key that must be None, False or 0: a mechanism that no model here has."""
    def read(t: Keys) -> dict[str, Any]:
        if t[theirs]:
            raise Unsupported(f"{theirs}: {short_repr(t[theirs])} is not supported (only {short_repr(default)})")
        return {}

    return KeyRule({theirs: default}, read, lambda o: {theirs: default})


# ---------------------------------------------------------------- tensors


class Layout:
    """How one tensor of a file is related to parameters here. The base: one parameter, the same tensor."""

    def split(self, tensor: "torch.Tensor", shapes: Sequence[Sequence[int]], keys: Keys) -> list["torch.Tensor"]:
        """The parameters, of `shapes`, in a tensor of the file; views of it where that is possible."""
        return [tensor]

    def join(self, tensors: Sequence["torch.Tensor"], keys: Keys) -> "torch.Tensor":
        """The inverse of `split`."""
        return tensors[0]

    def accepts(self, found: Sequence[int], expected: Sequence[int]) -> bool:
        """Whether a tensor of shape `found` holds parameters whose `join` has the shape `expected`."""
        return tuple(found) == tuple(expected)


class Transposed(Layout):
    """GPT-2's matrices, stored (in, out)."""

    def split(self, tensor: "torch.Tensor", shapes: Sequence[Sequence[int]], keys: Keys) -> list["torch.Tensor"]:
        return [tensor.t()]  # of a vector: itself

    def join(self, tensors: Sequence["torch.Tensor"], keys: Keys) -> "torch.Tensor":
        return tensors[0].t()


class Stacked(Layout):
    """Several matrices, or their biases, one below the other: all queries, then keys, then values."""

    def split(self, tensor: "torch.Tensor", shapes: Sequence[Sequence[int]], keys: Keys) -> list["torch.Tensor"]:
        return list(tensor.split([shape[0] for shape in shapes]))

    def join(self, tensors: Sequence["torch.Tensor"], keys: Keys) -> "torch.Tensor":
        import torch

        return torch.cat(list(tensors))


class StackedTransposed(Stacked):
    """The same, stored (in, out): GPT-2's c_attn."""

    def split(self, tensor: "torch.Tensor", shapes: Sequence[Sequence[int]], keys: Keys) -> list["torch.Tensor"]:
        return super().split(tensor.t(), shapes, keys)

    def join(self, tensors: Sequence["torch.Tensor"], keys: Keys) -> "torch.Tensor":
        return super().join(tensors, keys).t()


class Grouped(Layout):
    """Queries, keys and values by key/value head: its queries, the key, the value, then those of the next one.

    With as many key/value heads as heads it is GPT-NeoX's and BLOOM's order, with one it is Falcon-7B's.
    """

    def split(self, tensor: "torch.Tensor", shapes: Sequence[Sequence[int]], keys: Keys) -> list["torch.Tensor"]:
        groups, queries = keys["n_kv_head"], keys["n_head"] // keys["n_kv_head"]
        heads = tensor.unflatten(0, (groups, queries + 2, keys["head_dim"]))  # (G, H/G + 2, D, …)
        return [heads[:, :queries].flatten(0, 2), heads[:, queries].flatten(0, 1), heads[:, queries + 1].flatten(0, 1)]

    def join(self, tensors: Sequence["torch.Tensor"], keys: Keys) -> "torch.Tensor":
        import torch

        return torch.cat([t.unflatten(0, (keys["n_kv_head"], -1, keys["head_dim"])) for t in tensors], 1).flatten(0, 2)


class Interleaved(Layout):
    """Queries or keys whose pairs for RoPE are neighbours, (x_0, x_1), where here they are (x_0, x_{R/2})."""

    def split(self, tensor: "torch.Tensor", shapes: Sequence[Sequence[int]], keys: Keys) -> list["torch.Tensor"]:
        return [tensor.unflatten(0, (-1, keys["head_dim"] // 2, 2)).transpose(1, 2).flatten(0, 2)]

    def join(self, tensors: Sequence["torch.Tensor"], keys: Keys) -> "torch.Tensor":
        return tensors[0].unflatten(0, (-1, 2, keys["head_dim"] // 2)).transpose(1, 2).flatten(0, 2)


class Rows(Layout):
    """A table that may be longer than block_size, whose first `offset` rows are not read: OPT's positions."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset

    def split(self, tensor: "torch.Tensor", shapes: Sequence[Sequence[int]], keys: Keys) -> list["torch.Tensor"]:
        return [tensor[self.offset:self.offset + shapes[0][0]]]

    def join(self, tensors: Sequence["torch.Tensor"], keys: Keys) -> "torch.Tensor":
        import torch

        return torch.cat([tensors[0].new_zeros(self.offset, *tensors[0].shape[1:]), tensors[0]])

    def accepts(self, found: Sequence[int], expected: Sequence[int]) -> bool:
        return len(found) == len(expected) and found[0] >= expected[0] and tuple(found[1:]) == tuple(expected[1:])


SAME = Layout()


class TensorRule(NamedTuple):
    """A module of the checkpoint, and the modules here whose parameters its tensors hold.

    Attributes:
        theirs: the module's name in the checkpoint; {i} is the layer.
        ours: the names here.
        layout: how weight and bias are stored.
        when: the keys of the models that have this rule, of those that the family can have.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout = SAME
    when: Keys = MappingProxyType({})


@dataclass(frozen=True)
class Family:
    """An architecture of transformers.

    Attributes:
        model_type: of config.json.
        architecture: the class of its language model.
        members: released models, for tables.
        prefix: of every tensor but the head's; checkpoints of the base model lack it.
        components: the keys here that all its models have.
        keys: the rules of config.json.
        tensors: the rules of the tensors.
        dropouts: {key of config.json: its default} of dropouts.
        every_dropout: whether these are on embeddings, attention weights and sublayer outputs, as the dropout here.
        aliases: {another name of a key: the name in `keys`}.
        buffers: regular expression of tensors that are constants, not weights.
        unread: {key: value} that released checkpoints have, and the class does not read; another value is refused.
    """

    model_type: str
    architecture: str
    members: str
    prefix: str
    components: Keys
    keys: tuple[KeyRule, ...]
    tensors: tuple[TensorRule, ...]
    dropouts: Keys = field(default_factory=lambda: {"attention_dropout": 0.0})
    every_dropout: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    buffers: str = r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$"
    unread: Keys = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """{key of config.json: its default} of all rules."""
        return {**self.dropouts, **{name: value for rule in self.keys for name, value in rule.defaults.items()}}

    def rules_for(self, keys: Keys) -> list[TensorRule]:
        """The tensor rules of a model with these keys."""
        return [rule for rule in self.tensors if all(keys.get(k) == v for k, v in rule.when.items())]


# Keys of config.json that cannot change what the model computes, or only how it was made, saved or generates.
IGNORED_KEYS = frozenset(re.findall(r"\S+", """
    _name_or_path _commit_hash _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled architectures
    auto_map attn_implementation base_model_tp_plan cache_implementation chunk_size_feed_forward dtype
    finetuning_task gradient_checkpointing id2label initializer_range init_std is_decoder label2id
    max_window_layers model_name model_type n_ctx name_or_path num_labels output_attentions output_hidden_states
    pretraining_tp problem_type return_dict return_dict_in_generate seq_length slow_but_exact summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj task_specific_params
    tokenizer_class torch_dtype torchscript transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache
    use_return_dict vocab_file bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id prefix suppress_tokens begin_suppress_tokens bad_words_ids
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty temperature top_k top_p typical_p
    tf_legacy_loss skip_bias_add skip_bias_add_qkv bias_dropout_fusion masked_softmax_fusion offset_alibi
    attention_softmax_in_fp32 classifier_dropout reorder_and_upcast_attn language activation_dropout mlp_hidden_act
    scale_attention_softmax_in_fp32 max_sequence_length model_max_length neftune_noise_alpha is_causal
    transformers.js_config
    """))
# Keys that say why a checkpoint cannot be represented, whatever its model_type; a value that is not empty refuses it.
REFUSED_KEYS = {
    "is_encoder_decoder": "an encoder-decoder; no objective here trains one",
    "quantization_config": "quantised weights (use the checkpoint that they were made from)",
    "num_experts": "a mixture of experts", "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts", "moe_intermediate_size": "a mixture of experts",
    "kv_lora_rank": "multi-head latent attention", "vision_config": "a vision encoder",
    "audio_config": "an audio encoder",
    "add_cross_attention": "cross-attention", "pruned_heads": "pruned heads", "text_config": "a composite of models",
}


def read_keys(family: Family, config: Keys) -> tuple[dict[str, Any], list[str]]:
    """The keys here of a config.json of `family`, without those that have their default; and notes, a line each.

    Raises:
        Unsupported: a key changes what the model computes and is not known, or has a value that cannot be represented.
    """
    theirs = dict(family.defaults)
    for name, value in config.items():
        name = family.aliases.get(name, name)
        if name in theirs:
            theirs[name] = value
        elif name not in IGNORED_KEYS and value not in (None, False, [], {}, "", family.unread.get(name)):
            near = nearest(name, theirs, 0.6)
            hint = f"did you mean {near}?" if near else "delete it from config.json if it does not"
            raise Unsupported(f"{name}: {short_repr(value)} is not known for {family.model_type}: it may change what "
                              f"the model computes ({hint})")
    ours = dict(family.components)
    for rule in family.keys:
        try:
            ours |= rule.read(theirs)
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, OverflowError) as error:
            raise Unsupported(f"{', '.join(rule.defaults)}: cannot be read ({type(error).__name__})") from None
    for name in family.dropouts:
        if not isinstance(theirs[name] or 0.0, (int, float)):
            raise Unsupported(f"{name}: {short_repr(theirs[name])} is not a number")
    values = {theirs[name] or 0.0 for name in family.dropouts}
    ours["dropout"] = values.pop() if family.every_dropout and len(values) == 1 else 0.0
    if any(values):
        named = ", ".join(f"{name}={theirs[name]}" for name in family.dropouts)
        return ours, [f"dropout is 0, not {named}: here one dropout is on embeddings, attention weights and outputs"]
    return ours, []


def write_keys(family: Family, ours: Keys) -> dict[str, Any]:
    """The config.json of `family` for the keys here; `Unsupported` if a rule has no value for them."""
    theirs: dict[str, Any] = {}
    for rule in family.keys:
        theirs |= rule.write(ours)
    return theirs | dict.fromkeys(family.dropouts, ours["dropout"] if family.every_dropout else 0.0)


# ---------------------------------------------------------------- the tensors of one model


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
        name: in the file.
        ours: the parameters in it.
        shapes: theirs.
        rule: the rule.
        shape: of the tensor.
    """

    name: str
    ours: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    rule: TensorRule
    shape: tuple[int, ...]


def plan_tensors(rules: Sequence[TensorRule], keys: Keys, shapes: Mapping[str, Sequence[int]]) -> list[StoredTensor]:
    """The tensors of a checkpoint that hold the parameters `shapes` {name: shape}, in the order of the parameters.

    Args:
        rules: of the family.
        keys: n_head, n_kv_head, head_dim of the model.
        shapes: of all parameters of the model.

    Raises:
        Unsupported: a parameter has no rule, or the parameters of a rule have some, but not all, of weight and bias.
    """
    import torch

    by_module = {module: rule for rule in rules for module in rule.ours}
    targets: dict[str, StoredTensor] = {}
    for parameter in shapes:
        module, _, suffix = parameter.rpartition(".")
        match = re.search(r"\d+", module)
        layer = match[0] if match else ""
        rule = by_module.get(module.replace(f".{layer}.", ".{i}.", 1) if layer else module)
        if rule is None:
            raise Unsupported(f"{parameter} has no place in it")
        name = f"{rule.theirs.format(i=layer)}.{suffix}"
        if name in targets:
            continue
        ours = tuple(f"{m.format(i=layer)}.{suffix}" for m in rule.ours)
        if missing := [p for p in ours if p not in shapes]:
            raise Unsupported(f"{missing[0]} is missing beside {parameter}")
        own = tuple(tuple(shapes[p]) for p in ours)
        empty = [torch.empty(shape, device="meta") for shape in own]
        targets[name] = StoredTensor(name, ours, own, rule, tuple(rule.layout.join(empty, keys).shape))
    return list(targets.values())
