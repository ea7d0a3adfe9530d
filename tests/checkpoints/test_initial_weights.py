"""init_from: a new run begins with the weights of another, checked before anything is copied, and records them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, config_error, environment, records
from forked import run_train

from blockgpt.checkpoints import checkpoint
from blockgpt.checkpoints.checkpoint import SINGLE_PROCESS
from blockgpt.checkpoints.initial_weights import load_initial_weights
from blockgpt.checkpoints.resume import split_init_from
from blockgpt.data.prepare import write_dataset
from blockgpt.data.tokenizer import ByteTokenizer
from blockgpt.errors import CheckpointError, UserError
from blockgpt.files import sha256_of
from configurator import load_config
from model_builder import build_model

FIXTURES = ROOT / "tests/fixtures"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """A folder with runs/source, trained for 4 steps, best at step 2; and data/other, another text."""
    folder = tmp_path_factory.mktemp("init_from")
    flags = ["--arch_preset=llama", "--max_iters=4", "--eval_interval=2", "--learning_rate=1e-3"]
    done = run_train([*TINY, *flags, f"--data_dir={data_dir}", "--run_name=source"], folder, environment(),
                     folder / "source")
    assert done.returncode == 0, done.stderr
    texts = [(split, (ROOT / "README.md").read_text()) for split in ("train", "val")]
    write_dataset(folder / "data/other", ByteTokenizer(), texts, source="x")
    state = folder / "runs/source/checkpoints/step_00000004/state.json"
    assert json.loads(state.read_text())["best"]["step"] == 4
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of it that a test may change; the working directory."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def start(folder):
    """start(*flags) -> a finished run runs/new that begins with other weights."""
    def run(*flags, name="new"):
        argv = ["--device=cpu", "--mfu_peak=1", "--log_interval=1", "--eval_tokens=512", "--batch_size=4",
                "--data_dir=data", "--dataset=other", f"--run_name={name}", *flags]
        return run_train(argv, folder, environment(), folder / "output")
    return run


def weights(path):
    return checkpoint.read_weights(Path(path))


def model_of(*flags):
    return build_model(load_config(["--device=cpu", *flags]).model)


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_another_on_other_data_with_other_keys(folder, start):
    done = start("--init_from=runs/source@2", "--eval_only", "--dropout=0.1", name="evaluated")
    assert done.returncode == 0, done.stderr
    done = start("--init_from=runs/source@2", "--dropout=0.1", "--max_iters=3", "--eval_interval=3",
                 "--learning_rate=1e-4", "--min_lr=0")
    assert done.returncode == 0, done.stderr
    manifest = folder / "runs/source/checkpoints/step_00000002/manifest.json"
    entry = json.loads((folder / "runs/new/run.json").read_text())
    source = entry["initial_weights"]
    assert (source["path"], source["step"], source["sha256"]) == (
        "runs/source/checkpoints/step_00000002", 2, sha256_of(manifest))
    assert f"weights of {source['path']}, step 2, sha256 {source['sha256'][:12]}" in done.stdout
    assert entry["config"]["init_from"] == "runs/source@2" and entry["arch_name"].endswith("drop0.1")
    assert entry["config"]["arch_preset"] == "llama" and entry["model"]["n_embd"] == 32  # the source's
    assert sorted(records(folder / "runs/new")) == [1, 2, 3]  # its own steps
    scratch = start("--arch_preset=llama", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32",
                    "--max_iters=1", name="scratch")
    assert scratch.returncode == 0, scratch.stderr
    first = [records(folder / "runs" / name)[1]["loss"] for name in ("new", "scratch")]
    assert first[0] < first[1]


@pytest.mark.slow
def test_a_run_that_began_with_other_weights_resumes_bitwise_equal_without_the_source(folder, start):
    flags = ["--init_from=runs/source", "--lr_decay_iters=4", "--warmup_iters=1", "--eval_interval=2"]
    assert start(*flags, "--max_iters=4", name="whole").returncode == 0
    assert start(*flags, "--max_iters=2", name="cut").returncode == 0
    source = json.loads((folder / "runs/cut/run.json").read_text())["initial_weights"]
    (folder / "runs/source").rename(folder / "runs/moved")
    resumed = start("--resume=must", "--max_iters=4", name="cut")
    assert resumed.returncode == 0, resumed.stderr
    cut, whole = (folder / "runs" / name / "model.safetensors" for name in ("cut", "whole"))
    assert cut.read_bytes() == whole.read_bytes()
    assert json.loads((folder / "runs/cut/run.json").read_text())["initial_weights"] == source
    assert source["step"] == 4
    refused = start("--resume=must", "--init_from=runs/moved", name="cut")
    assert refused.returncode == 2 and "init_from: the run was made with" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--use_fsdp"], ["--use_fsdp", "--fsdp_cpu_offload"], ["--use_zero1"]])
def test_the_weights_are_the_same_in_every_mode(folder, start, flags):
    one, other = start("--init_from=runs/source", "--eval_only", name="one"), start(
        "--init_from=runs/source", "--eval_only", *flags, name="other")
    assert one.returncode == other.returncode == 0, one.stderr + other.stderr
    losses = [next(iter(records(folder / "runs" / name, "eval").values()))["val_loss"] for name in ("one", "other")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_best_checkpoint_is_read_and_without_checkpoints_the_export(folder):
    model = model_of("--init_from=runs/source")
    source = load_initial_weights("runs/source", model, SINGLE_PROCESS)
    assert source["step"] == 4 and source["tokenizer"]["name"] == "byte"
    expected = weights("runs/source/checkpoints/step_00000004")
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    load_initial_weights("runs/source@2", model, SINGLE_PROCESS)
    expected = weights("runs/source/checkpoints/step_00000002")
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    export = dict(checkpoint.read_export("runs/source")[0])
    for damaged in (folder / "runs/source/checkpoints").glob("*/model-00000.safetensors"):
        damaged.write_bytes(b"")
    for remove in (lambda: None, lambda: shutil.rmtree("runs/source/checkpoints"),
                   lambda: Path("runs/source/run.json").unlink()):
        remove()
        model = model_of("--init_from=runs/source")
        source = load_initial_weights("runs/source", model, SINGLE_PROCESS)
        assert (source["path"], source["step"]) == ("runs/source/model.safetensors", 4)
        assert source["sha256"] == sha256_of("runs/source/model.safetensors")
        assert all(torch.equal(p, export[name]) for name, p in model.named_parameters())


def test_nothing_is_copied_unless_every_name_and_shape_fits(folder):
    for flags, message in ((["--n_kv_head=1"], "has shape"), (["--qk_norm=head"], "missing"),
                           (["--weight_tying=True"], "unexpected")):
        model = model_of("--init_from=runs/source", *flags)
        before = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(UserError, match=message):
            load_initial_weights("runs/source", model, SINGLE_PROCESS)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_source_that_cannot_be_used_is_an_error_in_one_line(folder, start):
    assert config_error("--init_from=runs/sourse") == ("--init_from: there is no run runs/sourse (did you mean "
                                                       "source?)")
    assert config_error("--init_from=runs/sourse@2").startswith("--init_from: there is no run runs/sourse (did you")
    Path("runs/source/checkpoints/step_00000002/model-00000.safetensors").write_bytes(b"")
    for flags, code, message in (
            (["--init_from=runs/source@3"], 2, "--init_from: runs/source has no checkpoint of step 3 (it has 2, 4)"),
            (["--init_from=runs/source", "--n_kv_head=1"], 2, "has shape"),
            (["--init_from=runs/source@2"], 3, "has 0 bytes")):
        done = start(*flags)
        assert done.returncode == code and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not Path("runs/new").exists()
    with pytest.raises(UserError, match=r"--init_from: vocab_size: 320 is too small .*a run with a larger vocabulary"):
        load_config(["--init_from=runs/source"]).for_vocabulary(321)
    shutil.rmtree("runs/source/checkpoints")
    Path("runs/source/model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_initial_weights("runs/source", model_of("--init_from=runs/source"), SINGLE_PROCESS)
    Path("runs/source/run.json").write_text("{")
    assert config_error("--init_from=runs/source").startswith("--init_from: runs/source/run.json cannot be read")


def test_the_architecture_is_the_sources_unless_it_is_set(folder):
    source = json.loads(Path("runs/source/run.json").read_text())["config"]
    model = load_config(["--init_from=runs/source", "--block_size=64"]).model
    assert model.flat() == {**{k: source[k] for k in model.flat()}, "block_size": 64}
    other = load_config(["--init_from=runs/source", "--arch_preset=gpt2"])
    assert other.model.norm_position == "post" and other.model.n_embd == 32 and other.model.vocab_size == 320
    assert other.learning_rate == load_config([]).learning_rate  # nothing else is inherited


def test_another_tokenizer_is_a_warning(folder, start):
    path = folder / "runs/source/config.json"
    shutil.rmtree("runs/source/checkpoints")
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer": {"name": "gpt2"}}))
    done = start("--init_from=runs/source", "--max_iters=1")
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("warning: the weights were trained with another tokenizer (gpt2)")


@pytest.mark.parametrize("name", ["gpt2-single", "gemma3-zero1"])
def test_a_run_of_an_earlier_version_is_a_source(tmp_path, monkeypatch, name):
    shutil.copytree(FIXTURES / "runs" / name, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    model = model_of(f"--init_from=runs/{name}")
    assert load_initial_weights(f"runs/{name}", model, SINGLE_PROCESS)["step"] == 8


def test_a_step_is_a_suffix_unless_a_directory_has_the_whole_name(tmp_path):
    assert split_init_from("runs/a@12") == (Path("runs/a"), 12)
    assert split_init_from("runs/a@best") == (Path("runs/a@best"), None)
    (tmp_path / "a@1").mkdir()
    assert split_init_from(f"{tmp_path}/a@1") == (tmp_path / "a@1", None)
