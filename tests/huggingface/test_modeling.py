"""modeling_blockgpt.py: every mix of components, opened by transformers, against the model here."""

import json
import subprocess
import sys

import pytest
import tiny_checkpoints as tiny
import torch
import transformers
from architectures import SPACE, TINY, covering
from architectures import name as name_of
from conftest import environment

from blockgpt.huggingface import modeling_blockgpt as modeling
from blockgpt.huggingface import write
from model_builder import build_model
from model_config import ModelConfig
from tools.convert_hf import effective_keys

FIXED = dict(attention_backend=("manual",), causal=(True,), mask_documents=(False,), dropout=(0.0,))
MIXES, _ = covering({**SPACE, **FIXED})
EVERY = 12  # of the covering array, one in so many is in `make test`


def random_model(**keys):
    """A model here with random parameters, in float64."""
    model = build_model(ModelConfig(**TINY | keys)).double().eval()
    tiny.randomise(model)
    return model


def custom_model(model):
    """The same as transformers' model, through config.json and the names of the file."""
    keys = effective_keys(model.infer_config())
    config = json.loads(json.dumps(write.custom_config({**keys, "dropout": 0.0})))
    config = modeling.BlockGPTConfig.from_dict(config, attn_implementation="eager")
    reference = modeling.BlockGPTForCausalLM._from_config(config, attn_implementation="eager").double().eval()
    parameters = dict(model.named_parameters())
    tensors = write.custom_tensors({name: p.shape for name, p in parameters.items()})
    state = {tensor.name: parameters[tensor.ours[0]] for tensor in tensors}
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    if model.config.weight_tying:
        reference.tie_weights()
    return reference


@pytest.mark.parametrize("mix", [pytest.param(mix, id=name_of(mix), marks=[pytest.mark.long] if i % EVERY else [])
                                 for i, mix in enumerate(MIXES)])
def test_a_mix_is_the_same_model_in_transformers(mix):
    with tiny.in_float64():
        model = random_model(**mix)
        reference = custom_model(model)
        generator = torch.Generator().manual_seed(1)
        batch = torch.randint(0, TINY["vocab_size"], (2, TINY["block_size"]), generator=generator)
        with torch.no_grad():
            expected = model(batch)
            assert tiny.difference(reference(batch).logits, expected) < 1e-10
            text = reference.generate(batch[:, :3], max_new_tokens=8, min_new_tokens=8, do_sample=False,
                                      pad_token_id=0, eos_token_id=None)
        assert torch.equal(text, model.generate(batch[:, :3], 8, temperature=0.0))


def test_the_attention_interface_gives_the_same_with_padding_on_the_left():
    with tiny.in_float64():
        model = random_model(position_encoding="rope", normalization="dyt", n_kv_head=2, sliding_window=5,
                             window_pattern="SL")
        reference = custom_model(model)
        batch = torch.randint(0, TINY["vocab_size"], (1, 8), generator=torch.Generator().manual_seed(1))
        padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), batch), 1)
        mask = torch.tensor([[0, 0, 0, *[1] * 8]])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            for implementation in ("eager", "sdpa"):
                reference.set_attn_implementation(implementation)
                logits = reference(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
                assert tiny.difference(logits, model(batch)) < 1e-10


def test_a_loss_ignores_labels_of_minus_100_and_reaches_every_parameter():
    with tiny.in_float64():
        model = random_model(position_encoding="rope", ffn_type="swiglu", attn_gate="headwise", value_embeddings=1)
        reference = custom_model(model).train()
        batch = torch.arange(10)[None]
        labels = batch.clone()
        labels[:, :5] = -100
        loss = reference(batch, labels=labels).loss
        loss.backward()
        expected = torch.nn.functional.cross_entropy(model(batch)[0, 4:-1], batch[0, 5:])
        torch.testing.assert_close(loss, expected)
        assert all(p.grad is not None for p in reference.parameters())


@pytest.mark.slow
def test_a_fresh_process_without_this_project_opens_an_exported_mix(tmp_path):
    model = random_model(position_encoding="alibi", normalization="dyt", ffn_type="reglu", attn_gate="elementwise",
                         x0_mix=True).float()
    keys, state = effective_keys(model.infer_config()), dict(model.named_parameters())
    write.write_checkpoint(tmp_path / "out", write.custom_config({**keys, "dropout": 0.0}),
                           write.custom_tensors({name: p.shape for name, p in state.items()}), keys,
                           lambda name: state[name].detach(), lambda name: state[name].dtype,
                           {write.MODELING_FILE.name: write.MODELING_FILE.read_bytes()})
    program = (f"from transformers import AutoModelForCausalLM as A; import torch\n"
               f"m = A.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True)\n"
               "import sys; assert not any(name.startswith(('blockgpt.', 'model_')) for name in sys.modules)\n"
               "print(m(torch.arange(12)[None]).logits.double().sum().item())\n")
    env = environment(HF_MODULES_CACHE=str(tmp_path / "modules"), HF_HUB_OFFLINE="1")
    del env["PYTHONPATH"]
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert float(done.stdout) == pytest.approx(float(model(torch.arange(12)[None]).double().sum()), rel=1e-4)


def test_the_file_imports_nothing_of_this_project():
    text = write.MODELING_FILE.read_text()
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert imports and not any("blockgpt" in line or "model_" in line.split()[1] for line in imports)
    assert transformers.__version__
