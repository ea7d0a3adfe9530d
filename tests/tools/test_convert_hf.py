"""python -m tools.convert_hf: import, export, tokenizers, and a conversion that is killed."""

import json
import multiprocessing
import os
import shutil
import signal

import pytest
import tiny_checkpoints as tiny
import tokenizers
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from blockgpt.checkpoints import checkpoint
from blockgpt.checkpoints.files import TensorFile
from blockgpt.data.tokenizer import ByteTokenizer, CharTokenizer, TiktokenTokenizer, load_tokenizer, pack_bytes
from blockgpt.errors import UserError
from blockgpt.files import FolderLock
from blockgpt.huggingface import tokenizer_files, write
from blockgpt.huggingface.families import FAMILIES
from blockgpt.huggingface.parity import Parity, check_parity
from model_builder import build_model
from model_config import ModelConfig, get_preset
from tools import convert_hf

TEXT = "def f(x):\n    return x ** 2  # naïve café — 你好 🙂 1234567\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of transformers with a tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "qwen3"
    with tiny.in_float64():
        tiny.save(tiny.reference_model("qwen3", "wide heads").float(), folder)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=61, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator(["abcdef " * 5], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("<user>{{ messages[0].content }}<answer>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    return folder


def run_of(config, folder, tokenizer=None):
    """An export of a model with random weights, as a run leaves it; the model."""
    from blockgpt.checkpoints.files import Index, TensorEntry

    model = build_model(config).eval()
    tiny.randomise(model)
    index = Index(folder, {})
    state = {name: p.detach() for name, p in model.named_parameters()}
    index.entries = {name: TensorEntry(p.dtype, tuple(p.shape), []) for name, p in state.items()}
    index.read = state.__getitem__
    folder.mkdir(parents=True)
    meta = (tokenizer or ByteTokenizer()).to_meta()
    checkpoint.write_export(folder, index, {"model": config.resolve().flat(), "tokenizer": meta, "step": 7})
    return model


def convert(capsys, *argv):
    """(stdout, stderr) of the command."""
    convert_hf.main([str(word) for word in argv])
    return capsys.readouterr()


@pytest.mark.slow
def test_import_then_export_gives_the_same_file(source, tmp_path, capsys):
    out, err = convert(capsys, "import", source, "--out", tmp_path / "x")
    assert "32 of 32 greedy tokens equal" in out and not err
    out, err = convert(capsys, "export", tmp_path / "x", "--out", tmp_path / "y")
    assert "Qwen3ForCausalLM" in out and "32 of 32 greedy tokens equal" in out
    assert (tmp_path / "y/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (tmp_path / "y/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert not [p for p in (tmp_path / "y").iterdir() if p.name.startswith(".")]
    card = (tmp_path / "y/README.md").read_text()
    assert "| class | Qwen3ForCausalLM |" in card and f"| started from | {source} |" in card
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "y")
    assert loaded("abc fed").input_ids == load_tokenizer(str(source)).encode("abc fed")
    assert loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<user>a<answer>"
    assert json.loads((tmp_path / "y/generation_config.json").read_text())["eos_token_id"] == [7, 9]
    for command, target in (("import", source), ("export", tmp_path / "x")):
        with pytest.raises(UserError, match="has a checkpoint"):
            convert_hf.main([command, str(target), "--out", str(tmp_path / "y")])


@pytest.mark.slow
@pytest.mark.parametrize("preset, keys, cls", [
    ("llama", dict(n_kv_head=2), "LlamaForCausalLM"),
    ("team", dict(head_dim=6), "LlamaForCausalLM"),  # found from what was built, not from the preset's name
    ("gemma3", dict(n_layer=6), "Gemma3ForCausalLM"),
    ("llama", dict(init="mup", mup_base_width=12), "GraniteForCausalLM"),  # muP's factors are Granite's
    ("modern", dict(attn_gate="headwise"), "BlockGPTForCausalLM"),
])
def test_an_export_opens_in_transformers_and_is_the_same_function(tmp_path, capsys, preset, keys, cls):
    config = get_preset(preset, **dict(n_layer=2, n_head=4, n_embd=48, block_size=48, vocab_size=260) | keys)
    run_of(config, tmp_path / "run")
    out, err = convert(capsys, "export", tmp_path / "run", "--out", tmp_path / "out")
    assert f"out: {cls}, " in out and "32 of 32 greedy tokens equal" in out and not err
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT).input_ids == list(TEXT.encode())
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == 256


def test_wrong_logits_and_other_tokens_fail():
    check_parity(Parity(1e-6, 1e-4, 32, False), "x")
    check_parity(Parity(1e-6, 1e-4, 5, True), "x")
    for outcome in (Parity(1e-3, 1e-4, 32, False), Parity(1e-6, 1e-4, 5, False)):
        with pytest.raises(UserError, match="x is not the same function"):
            check_parity(outcome, "x")


def test_large_checkpoints_are_sharded(tmp_path):
    config = ModelConfig(n_layer=2, n_head=4, n_embd=48, block_size=8, vocab_size=61).resolve()
    state = dict(build_model(config).named_parameters())
    tensors = write.custom_tensors({name: p.shape for name, p in state.items()})
    arguments = ({}, tensors, {}, lambda name: state[name].detach(), lambda name: torch.bfloat16, {})
    write.write_checkpoint(tmp_path / "a", *arguments, shard_bytes=20_000)
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    loaded = {name: t for file in files for name, t in load_file(tmp_path / "a" / file).items()}
    assert loaded.keys() == index["weight_map"].keys() == {tensor.name for tensor in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in loaded.values())
    assert all(t.dtype == torch.bfloat16 for t in loaded.values())
    assert all(name in load_file(tmp_path / "a" / file) for name, file in index["weight_map"].items())


def killed_export(folder, kill_at):
    """Write a checkpoint, and end this process without any clean-up before its tensor `kill_at`."""
    config = ModelConfig(n_layer=1, n_head=4, n_embd=48, block_size=8, vocab_size=61).resolve()
    state = dict(build_model(config).named_parameters())
    count = 0

    def read(name):
        nonlocal count
        count += 1
        if count == kill_at:
            os._exit(9)
        return state[name].detach()

    tensors = write.custom_tensors({name: p.shape for name, p in state.items()})
    write.write_checkpoint(folder, {"model_type": "blockgpt"}, tensors, {}, read, lambda name: torch.float32,
                           {"README.md": b"x"}, shard_bytes=10_000)


@pytest.mark.parametrize("kill_at", [1, 6])
def test_a_killed_export_leaves_nothing_that_loads(tmp_path, kill_at):
    process = multiprocessing.get_context("fork").Process(target=killed_export, args=(tmp_path / "x", kill_at))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert not write.is_checkpoint(tmp_path / "x") and not list((tmp_path / "x").glob("*.safetensors"))
    killed_export(tmp_path / "x", None)  # the same command again
    assert write.is_checkpoint(tmp_path / "x") and not (tmp_path / "x" / write.TEMPORARY).exists()


def convert_and_kill(command, folder, out, kill_at):
    """Run the command, and kill this process (-9) before its file operation `kill_at`; exit 0 if it has fewer."""
    count = 0

    def counted(operation):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)
        return call

    for name in ("replace", "fsync", "rename", "mkdir", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    TensorFile.write_tensors = counted(TensorFile.write_tensors)
    convert_hf.main([command, str(folder), "--out", str(out), "--no-verify"])


# How many moments there are is not known before: the process that is not killed any more ends it.
MOMENTS = [pytest.param(range(1, 40, 4), id="few"), pytest.param(range(1, 60), marks=pytest.mark.long, id="all")]


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("command", ["import", "export"])
def test_a_conversion_killed_at_any_moment_leaves_nothing_that_loads(source, tmp_path, command, moments):
    folder, out = source, tmp_path / "out"
    if command == "export":
        folder = tmp_path / "run"
        run_of(get_preset("llama", n_layer=1, n_head=4, n_embd=48, block_size=8, vocab_size=260), folder)
    outcomes = []
    for kill_at in moments:
        process = multiprocessing.get_context("fork").Process(target=convert_and_kill, args=(
            command, folder, out, kill_at))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        outcomes.append(loads(out))  # into the same folder: what a killed conversion left does not hinder the next
        if outcomes[-1]:  # complete: killed in what follows
            shutil.rmtree(out)
    assert process.exitcode == 0 and loads(out) and not outcomes[0] and len(outcomes) > 2
    assert not [path for path in out.iterdir() if path.name.startswith(".") and path.is_dir()]


def loads(folder):
    """Whether a checkpoint is in a folder, which must then be whole; False if no reader takes it for one."""
    readers = (lambda: checkpoint.read_export(folder), lambda: tiny.load(folder))
    for read in readers:
        try:
            read()
            return True
        except UserError:
            pass
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    return False


def test_two_conversions_into_one_folder_are_refused(tmp_path):
    def other(folder):
        with pytest.raises(UserError, match="converts a checkpoint into it"):
            killed_export(folder, None)

    with FolderLock(tmp_path, "converts a checkpoint into it"):
        process = multiprocessing.get_context("fork").Process(target=other, args=(tmp_path,))
        process.start()
        process.join()
    assert process.exitcode == 0 and not write.is_checkpoint(tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, read):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorFile, "write_tensors", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        killed_export(tmp_path / "x", None)
    assert list((tmp_path / "x").iterdir()) == []


def test_every_tokenizer_is_written_as_tokenizer_json(sentencepiece_model):
    ranks = sentencepiece_model.with_suffix(".tiktoken").read_bytes()
    for ours in (ByteTokenizer(), CharTokenizer(TEXT), TiktokenTokenizer(ranks=pack_bytes(ranks)),
                 load_tokenizer(str(sentencepiece_model))):
        files, ids, warnings = tokenizer_files.tokenizer_files(ours.to_meta(), 64)
        assert not warnings, (ours.name, warnings)
        theirs = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        text = TEXT if ours.name in ("byte", "char") else TEXT + sentencepiece_model.with_name("0.txt").read_text()
        encoded = theirs.encode(text, add_special_tokens=False).ids
        assert encoded == ours.encode(text), ours.name
        assert theirs.decode(encoded, skip_special_tokens=True) == text
        assert ids["eos_token_id"] == ours.eot


def test_a_model_that_sees_later_tokens_is_refused(tmp_path):
    run_of(ModelConfig(n_layer=1, n_head=4, n_embd=48, block_size=8, vocab_size=260, causal=False), tmp_path / "run")
    with pytest.raises(UserError, match="causal=False"):
        convert_hf.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--no-verify"])
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="is not a folder"):
        convert_hf.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--no-verify"])


def test_the_table_in_the_docs_lists_every_family(capsys):
    out, _ = convert(capsys, "table")
    docs = (ROOT / "docs/HUGGING_FACE.md").read_text()
    rows = [line for line in out.splitlines() if line.startswith("| ") and "model_type" not in line]
    assert len(rows) == len(FAMILIES)
    assert all(row.removesuffix(" |") in docs for row in rows)


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_a_measured_row_says_that_a_family_is_equal(family):
    difference, tokens, back = convert_hf.measure_family(FAMILIES[family])
    assert float(difference) < 1e-4 and (tokens, back) == ("32 of 32", "bit for bit")
