"""Each family against transformers: every tensor random, float64, logits, gradients, cached decoding, and back."""

import dataclasses
import json

import pytest
import tiny_checkpoints as tiny
import torch
import torch.nn.functional as F
import transformers

from blockgpt.errors import UserError
from blockgpt.huggingface import read, rules, write
from blockgpt.huggingface.families import FAMILIES
from tools.convert_hf import effective_keys

FIRST = [(family, next(iter(checkpoints))) for family, checkpoints in tiny.CHECKPOINTS.items()]
# The first checkpoint of each family is in `make test`, the others are in `make test-long`.
ALL = [pytest.param(*name, marks=() if name in FIRST else pytest.mark.long, id=f"{name[0]}: {name[1]}")
       for name in tiny.NAMES]


@pytest.fixture
def in_float64():
    with tiny.in_float64():
        yield


def saved_names(family, parameters):
    """{name in the file: tensor} of transformers' parameters; GPT-NeoX's head has another name in files."""
    return {name.replace("lm_head", "embed_out") if family == "gpt_neox" else name: p for name, p in parameters.items()}


@pytest.mark.parametrize("family, name", ALL)
def test_a_checkpoint_is_the_same_model_here_and_back(tmp_path, in_float64, family, name):
    reference = tiny.reference_model(family, name)
    model, weights = tiny.load(tiny.save(reference, tmp_path / "source"))
    batch, tolerance = tiny.tokens(), tiny.TOLERANCE[family]
    logits, expected = model(batch), reference(batch).logits
    assert tiny.difference(logits, expected) < tolerance
    assert model.config.block_size == (2048 if family == "bloom" else tiny.CONTEXT)

    # The gradients of every parameter, through the same rules.
    F.cross_entropy(expected.flatten(0, 1), batch.roll(-1, 1).flatten()).backward()
    F.cross_entropy(logits.flatten(0, 1), batch.roll(-1, 1).flatten()).backward()
    theirs = saved_names(family, dict(reference.named_parameters()))
    for parameter, p in model.named_parameters():
        target = weights.target_of[parameter]
        split = target.rule.layout.split(theirs[target.name].grad, target.shapes, weights.keys)
        grad = split[target.ours.index(parameter)]
        scale = grad.abs().max()
        if parameter.endswith("k_proj.bias") and model.config.position_encoding != "rope":
            scale = 1.0  # it adds the same to all scores of a query: its gradient is 0, and these are rounding errors
        assert torch.isfinite(p.grad).all() and (p.grad - grad).abs().max() <= 10 * tolerance * scale, parameter

    # Token by token with a cache.
    caches = [block.attn.new_cache() for block in model.blocks]
    with torch.no_grad():
        steps = [model(chunk, caches=caches) for chunk in batch.split([5, *[1] * (tiny.CONTEXT - 5)], dim=1)]
    assert tiny.difference(torch.cat(steps, 1), expected) < tolerance

    # Back: the same file, bit for bit, and a config.json from which the same model is read.
    keys = effective_keys(model.infer_config())
    native, config = write.native_config(keys, lambda found: effective_keys(type(model.config)(**found)), family)
    assert native.model_type == family
    state = dict(model.named_parameters())
    tensors = write.native_tensors(native, keys, {n: p.shape for n, p in state.items()})
    write.write_checkpoint(tmp_path / "out", write.native_json(native, config), tensors, keys,
                           lambda n: state[n].detach(), lambda n: state[n].dtype, {})
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "source/model.safetensors").read_bytes()
    again = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_config(again, attn_implementation="eager").double().eval()
    again.load_state_dict(reference.state_dict())
    assert tiny.difference(again(batch).logits, expected) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family):
    cls = type(transformers.AutoConfig.for_model(family))
    fields = {f.name: f.default for f in dataclasses.fields(cls)}
    table = FAMILIES[family].defaults
    assert {k: v for k, v in table.items() if k in fields} == {k: fields[k] for k in table if k in fields}
    unread = fields.keys() - table.keys() - rules.IGNORED_KEYS - rules.REFUSED_KEYS.keys()
    assert not unread  # every key of the class is read, ignored or refused


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "falcon"])
def test_training_loses_as_much_as_that_of_transformers(tmp_path, in_float64, family):
    reference = tiny.reference_model(family, next(iter(tiny.CHECKPOINTS[family])))
    model, _ = tiny.load(tiny.save(reference, tmp_path))
    losses = []
    for trained, forward in ((model, lambda x: model(x)), (reference, lambda x: reference(x).logits)):
        optimizer, found = torch.optim.AdamW(trained.parameters(), lr=1e-3), []
        for step in range(20):
            batch = tiny.tokens(step % 2)
            loss = F.cross_entropy(forward(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-2] < losses[0][0] and losses[0][-1] < losses[0][1]


# ---------------------------------------------------------------- one mutation for each rule


def mutations_of_tensors(family):
    """(what is wrong, family) for each rule of tensors: its layout forgotten, its place exchanged with another's."""
    for i, rule in enumerate(family.tensors):
        def changed(*changes):
            tensors = list(family.tensors)
            for at, new in changes:
                tensors[at] = new
            return dataclasses.replace(family, tensors=tuple(tensors))

        plain = rules.Stacked() if isinstance(rule.layout, rules.Grouped) else rules.Layout()
        if type(rule.layout) is not rules.Layout and getattr(rule.layout, "offset", 1):  # 0: all rows, as they are
            yield f"{rule.theirs} without its layout", changed((i, rule._replace(layout=plain)))
        if len(rule.ours) > 1:
            yield (f"{rule.theirs} in another order",
                   changed((i, rule._replace(ours=(rule.ours[1], rule.ours[0], *rule.ours[2:])))))
        else:
            indices = [*range(i + 1, len(family.tensors)), *range(i)]
            indices.sort(key=lambda j, when=rule.when: family.tensors[j].when != when)  # one that the same models have
            other = next(j for j in indices if len(family.tensors[j].ours) == 1 and family.tensors[j].ours != rule.ours)
            swapped = family.tensors[other]
            yield (f"{rule.theirs} and {swapped.theirs} exchanged",
                   changed((i, rule._replace(ours=swapped.ours)), (other, swapped._replace(ours=rule.ours))))


def mutations_of_keys(family):
    """(key, family in which a rule reads the key's default whatever config.json says)."""
    for i, rule in enumerate(family.keys):
        for key, default in rule.defaults.items():
            def read(t, rule=rule, key=key, default=default):
                return rule.read({**t, key: default})

            keys = (*family.keys[:i], dataclasses.replace(rule, read=read), *family.keys[i + 1:])
            yield key, dataclasses.replace(family, keys=keys)


# Keys that change nothing with the values that transformers itself accepts.
WITHOUT_EFFECT = {
    ("bloom", "seq_length"): "the context of the file; BLOOM has no largest position",
    ("phi3", "original_max_position_embeddings"): "read only for a scaling of RoPE, and Phi 3's is refused",
    **{(family, "max_window_layers"): "transformers 5 writes layer_types, which list the layers with a window"
       for family in ("qwen2", "qwen3", "smollm3")},
}


class Sources:
    """The checkpoints of a family, saved once, with their logits."""

    def __init__(self, family, folder):
        self.entries = []
        for i, name in enumerate(tiny.CHECKPOINTS[family]):
            model = tiny.reference_model(family, name)
            with torch.no_grad():
                logits = model(tiny.tokens()).logits
            self.entries.append((tiny.save(model, folder / str(i)), logits, model.config.max_position_embeddings
                                 if family not in ("bloom",) else 2048))

    def catches(self):
        """Whether one of them is refused or is another model, with the rules as they are now."""
        for directory, logits, context in self.entries:
            try:
                model, _ = tiny.load(directory)
                with torch.no_grad():
                    if model.config.block_size != context or tiny.difference(model(tiny.tokens()), logits) > 1e-7:
                        return True
            except (UserError, RuntimeError, IndexError, ValueError, TypeError):
                return True
        return False


def with_value(directory, folder, **keys):
    """A folder whose config.json has other values, and nothing that transformers 5 derives from such keys."""
    folder.mkdir()
    config = json.loads((directory / "config.json").read_text())
    derived = ("rope_parameters", "layer_types", "_sliding_window_pattern")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in derived} | keys))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rule_that_is_broken_is_caught(tmp_path, in_float64, monkeypatch, family):
    sources = Sources(family, tmp_path)
    assert not sources.catches()
    original, survivors = FAMILIES[family], []
    for what, mutant in mutations_of_tensors(original):
        monkeypatch.setitem(FAMILIES, family, mutant)
        if not sources.catches():
            survivors.append(what)
    for n, (key, mutant) in enumerate(mutations_of_keys(original)):
        monkeypatch.setitem(FAMILIES, family, mutant)
        if sources.catches() or (family, key) in WITHOUT_EFFECT:
            continue
        # No valid checkpoint has another value: then another value must be refused, or be another model.
        monkeypatch.setitem(FAMILIES, family, original)
        default = original.defaults[key]
        wrong = (not default if isinstance(default, bool) else "nonsense" if not isinstance(default, (int, float))
                 else 2 if default == 1 else 1)
        source = sources.entries[0][0]
        before = read.architecture(with_value(source, tmp_path / f"before{n}"))[0]
        try:
            if read.architecture(with_value(source, tmp_path / f"wrong{n}", **{key: wrong}))[0] == before:
                survivors.append(f"{key}={wrong}")
        except UserError:
            pass
    assert not survivors
