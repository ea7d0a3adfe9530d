"""init_from=hf:… in train.py and --run=hf:… in sample.py."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints as tiny
import tokenizers
import torch
from conftest import ROOT, config_error, environment, records
from forked import run_train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

import sample
from blockgpt.checkpoints import checkpoint
from blockgpt.data.prepare import write_dataset
from blockgpt.data.tokenizer import ByteTokenizer, load_tokenizer
from blockgpt.errors import UserError
from configurator import load_config


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with two checkpoints, `gemma2` and `gpt2`, and data/text, prepared with their tokenizer."""
    folder = tmp_path_factory.mktemp("hf")
    texts = [p.read_text() for p in sorted(ROOT.glob("model_*.py"))]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts[:1], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    for family, name in (("gemma2", "softcaps, windows"), ("gpt2", "as released")):
        with tiny.in_float64():
            tiny.save(tiny.reference_model(family, name, vocab_size=300).float(), folder / family)
        tokenizer.save(str(folder / family / "tokenizer.json"))
    documents = [("val" if i == 0 else "train", text) for i, text in enumerate(texts)]
    write_dataset(folder / "data/text", load_tokenizer(str(folder / "gpt2")), documents, source="x")
    write_dataset(folder / "data/bytes", ByteTokenizer(), documents, source="x")
    return folder


@pytest.fixture
def folder(sources, tmp_path, monkeypatch):
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def start(folder):
    def run(*flags, name="new"):
        argv = ["--device=cpu", "--mfu_peak=1", "--log_interval=1", "--eval_tokens=64", "--batch_size=2",
                "--data_dir=data", "--dataset=text", f"--run_name={name}", *flags]
        return run_train(argv, folder, environment(), folder / "output")
    return run


@pytest.mark.slow
def test_one_key_trains_another_model(folder, start):
    constants = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    save_file({**load_file("gemma2/model.safetensors"), **constants}, "gemma2/model.safetensors")
    done = start("--init_from=hf:gemma2", "--max_iters=2", "--learning_rate=1e-9", "--min_lr=0", "--block_size=16")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("note: ")] == [
        "note: gemma2: model.layers.{i}.self_attn.rotary_emb.inv_freq: not read (a constant; 2 layers)"]
    record = json.loads(Path("runs/new/run.json").read_text())
    source = record["initial_weights"]
    assert (source["name"], source["path"], source["model_type"]) == ("hf:gemma2", "gemma2", "gemma2")
    assert record["model"]["norm_position"] == "sandwich" and record["model"]["block_size"] == 16
    assert f"weights of gemma2, sha256 {source['sha256'][:12]}" in done.stdout
    trained = checkpoint.read_export("runs/new")[0]
    model, _ = tiny.load(folder / "gemma2", block_size=16)
    for name, p in model.named_parameters():
        torch.testing.assert_close(trained[name].double(), p, rtol=0, atol=1e-6)
    assert sorted(records("runs/new")) == [1, 2]
    shutil.rmtree("gemma2")  # a resumed run does not need it
    done = start("--resume=must", "--max_iters=3")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name, tensors", [("gpt2", 28), ("gemma2", 24)])
def test_a_dry_run_says_what_will_train_and_writes_nothing(folder, start, name, tensors):
    done = start(f"--init_from=hf:{name}", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert f"hf:{name}: {name}; its {tensors} tensors fit; all parameters are trained" in done.stdout
    assert "training tokens" in done.stdout and not Path("runs").exists()


@pytest.mark.slow
def test_a_dry_run_refuses_tensors_that_do_not_fit(folder, start):
    with safe_open("gpt2/model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    save_file({name: t for name, t in tensors.items() if "h.1.ln_1.bias" not in name}, "gpt2/model.safetensors")
    done = start("--init_from=hf:gpt2", "--dry_run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "gpt2: has no tensor transformer.h.1.ln_1.bias" in done.stderr


@pytest.mark.slow
def test_another_vocabulary_is_an_error_with_the_command_that_prepares_it(folder, start):
    for flags in ([], ["--dry_run"]):
        done = start("--init_from=hf:gpt2", "--dataset=bytes", *flags)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "hf:gpt2 has another vocabulary" in done.stderr and f"--tokenizer {folder}/gpt2" in done.stderr
    assert not Path("runs").exists()


def test_keys_that_contradict_the_checkpoint_are_refused_by_name(folder):
    for flag, message in (
            ("--n_layer=3", "--n_layer: 3 is not the checkpoint's 2, which hf:gemma2 decides"),
            ("--vocab_size=304", "--vocab_size: 304 is not the checkpoint's 300"),
            ("--qk_norm=head", "--qk_norm: head is not the checkpoint's none"),
            ("--block_size=25", "--block_size: 25 is beyond the 24 positions of hf:gemma2"),
            ("--arch_preset=llama", "--arch_preset: 'llama' is not the architecture of hf:gemma2: normalization "
                                    "rmsnorm (the checkpoint: rmsnorm_gemma)")):
        assert config_error("--init_from=hf:gemma2", flag).startswith(message)
    model = load_config(["--init_from=hf:gemma2", "--dropout=0.1", "--block_size=8", "--attention_backend=manual",
                         "--n_layer=2", "--d_ff=80"]).model
    assert (model.dropout, model.block_size, model.n_head, model.n_kv_head) == (0.1, 8, 4, 2)
    assert load_config(["--init_from=hf:gpt2", "--arch_preset=gpt2_openai"]).model.arch_preset == "gpt2_openai"


def test_what_cannot_be_read_is_one_line(folder):
    assert config_error("--init_from=hf:nowhere/at/all").startswith("hf:nowhere/at/all: there is no folder")
    path = Path("gpt2/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_layer": "two"}))
    assert "n_layer" in config_error("--init_from=hf:gpt2")
    path.write_text("{")
    assert config_error("--init_from=hf:gpt2").startswith("gpt2/config.json: cannot be read")


def test_sampling_a_checkpoint(folder, capsys):
    argv = ["--run=hf:gpt2", "--device=cpu", "--prompt=def f", "--max_new_tokens=8", "--temperature=0"]
    torch.save(load_file("gpt2/model.safetensors"), "gpt2/pytorch_model.bin")
    Path("gpt2/model.safetensors").unlink()
    sample.main(argv)
    text, notes = capsys.readouterr()
    assert text.startswith("def f") and len(text) > 7
    assert notes.startswith("note: gpt2: pytorch_model.bin, a pickle, is read by torch's weights-only loader (")
    sample.main([*argv, "--stream"])
    assert capsys.readouterr().out == text
    sample.main([*argv, "--num_samples=2"])
    assert capsys.readouterr().out == f"{text}{'-' * 80}\n{text}"
    with pytest.raises(UserError, match="--chat: gpt2 has no chat template"):
        sample.main([*argv, "--chat"])
    Path("gpt2/chat_template.jinja").write_text("<|endoftext|>{{ messages[0]['content'] }}")
    sample.main([*argv, "--chat"])
    answer = capsys.readouterr().out
    assert "def f" not in answer[:5] and answer.strip()
    Path("gpt2/chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(UserError, match="the template of gpt2 refuses: no"):
        sample.main([*argv, "--chat"])


def test_a_text_ends_at_any_of_the_checkpoints_ends(folder, capsys):
    argv = ["--run=hf:gpt2", "--device=cpu", "--prompt=def f", "--max_new_tokens=12", "--temperature=0"]
    ids = load_tokenizer(str(folder / "gpt2")).encode("def f")
    model, _, _ = sample.load_checkpoint("hf:gpt2", torch.device("cpu"))
    row = model.generate(torch.tensor([ids]), 12, temperature=0.0)[0].tolist()
    new = row[len(ids):]
    Path("gpt2/generation_config.json").write_text(json.dumps({"eos_token_id": [299, new[3]]}))
    sample.main(argv)
    end = len(ids) + new.index(new[3])
    assert capsys.readouterr().out == load_tokenizer(str(folder / "gpt2")).decode(row[:end]) + "\n"


@pytest.mark.parametrize("named, end", [("<|im_end|>", "<|im_end|>"), ({"content": "<|im_end|>"}, "<|im_end|>"),
                                        ("<|absent|>", "<|endoftext|>"), (None, "<|endoftext|>")])
def test_documents_end_with_the_checkpoints_own_token(folder, named, end):
    tokenizer = tokenizers.Tokenizer.from_file("gpt2/tokenizer.json")
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save("gpt2/tokenizer.json")
    Path("gpt2/tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    write_dataset(folder / "data/own", load_tokenizer("gpt2/"), [("train", "one"), ("val", "two")], source="x")
    meta = json.loads(Path("data/own/meta.json").read_text())
    assert meta["eot"] == tokenizer.token_to_id(end)
    tokens = np.fromfile("data/own/train.bin", dtype=meta["dtype"])
    assert tokens.tolist() == [*tokenizer.encode("one").ids, meta["eot"]]
    assert load_tokenizer("gpt2/", eot="<|endoftext|>").eot_text == "<|endoftext|>"  # --eot comes first


def test_the_finetuning_config_is_one_line_to_edit(folder):
    config = load_config([str(ROOT / "config/finetune_hf.py"), "--init_from=hf:gemma2", "--block_size=16"])
    assert config.model.norm_position == "sandwich" and config.learning_rate == 2e-5
