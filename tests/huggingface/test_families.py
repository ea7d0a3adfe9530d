"""Each family against transformers: every tensor random, float64, logits, gradients, cached decoding, and back."""

import dataclasses

import pytest
import tiny_checkpoints as tiny
import torch
import torch.nn.functional as F
import transformers

from blockgpt.huggingface import rules, write
from blockgpt.huggingface.families import FAMILIES
from tools.convert_hf import effective_keys

FIRST = [(family, next(iter(checkpoints))) for family, checkpoints in tiny.CHECKPOINTS.items()]
SHORT = [*FIRST, ("olmo3", "scaled global layers")]  # its base is not the default of transformers
# The first checkpoint of each family is in `make test`, the others are in `make test-long`.
ALL = [pytest.param(*name, marks=() if name in SHORT else pytest.mark.long, id=f"{name[0]}: {name[1]}")
       for name in tiny.NAMES]


@pytest.fixture
def in_float64():
    with tiny.in_float64():
        yield


def saved_names(family, parameters):
    """{name in the file: tensor} of transformers' parameters; GPT-NeoX's head has another name in files."""
    return {name.replace("lm_head", "embed_out") if family == "gpt_neox" else name: p for name, p in parameters.items()}


def has_rope(config, layer):
    return config.position_encoding == "rope" and config.rope_letters()[layer] == "R"


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
        if parameter.endswith("k_proj.bias") and not has_rope(model.config, int(parameter.split(".")[1])):
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
