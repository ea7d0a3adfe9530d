"""Checkpoints load bit for bit, or are refused; the newest usable one is found; any parallel mode loads any other's."""

import errno
import hashlib
import json
import os
import pickle
import shutil
from types import SimpleNamespace

import checkpoint_ranks
import pytest
import torch
from checkpoint_helpers import (
    FILES,
    MODEL,
    OPTIMIZER,
    contents,
    flip,
    largest_file,
    make,
    manifest_entry,
    paths,
    refused,
    rewrite_manifest,
    save,
    saved_run,
)
from checkpoint_ranks import learn, state
from conftest import ROOT, run_python
from safetensors.torch import load_file

from blockgpt.checkpoints import checkpoint
from blockgpt.errors import CheckpointError, UserError


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("original"))


@pytest.fixture
def run(original, tmp_path):
    """A copy of a run directory with the checkpoints of steps 2 and 4; the model of step 4, which no test changes."""
    shutil.copytree(original.folder, tmp_path / "checkpoints")
    return SimpleNamespace(model=original.model, **paths(tmp_path))


def test_optimizer_state_of_any_form_is_resumed_bitwise(tmp_path):
    checkpoint_ranks.check_odd_state(tmp_path, checkpoint.SINGLE_PROCESS, ["plain"])


@pytest.mark.parametrize("value, reason", [
    ({1, 2}, "cannot be saved: Object of type set"), ([torch.zeros(2)], "cannot be saved: Object of type Tensor"),
    (torch.zeros(2, dtype=torch.complex64), "torch.complex64 cannot be saved")], ids=["set", "tensors", "complex"])
def test_optimizer_state_that_cannot_be_saved_is_one_line_before_anything_is_written(tmp_path, value, reason):
    model, optimizer = make()
    learn(model, optimizer, [0])
    optimizer.state[next(model.parameters())]["odd"] = value
    with pytest.raises(UserError, match=f"optimizer state 'odd' of token_embedding.weight: {reason}"):
        save(tmp_path, model, optimizer, state(1))
    assert list(tmp_path.iterdir()) == []


# ---- load

@pytest.mark.parametrize("preset", ["llama", "gpt2", "gpt2_openai"], ids=["untied", "tied", "tied-biases"])
def test_a_loaded_run_equals_the_saved_one_and_trains_on_bitwise(tmp_path, preset):
    model, optimizer = make(preset)
    learn(model, optimizer, range(3))
    saved = state(3, best=3)
    path = save(tmp_path, model, optimizer, saved)
    checkpoint.verify(path)
    resumed, resumed_optimizer = make(preset, seed=2)
    loaded = checkpoint.load(path, resumed, resumed_optimizer)
    assert {k: loaded[k] for k in saved} == saved and loaded["world_size"] == 1
    assert loaded["versions"].keys() == {"python", "torch", "numpy"} and "functions of (seed" in loaded["random"]

    def check_equal():
        resumed_parameters = dict(resumed.named_parameters())
        for name, p in model.named_parameters():
            assert torch.equal(p, resumed_parameters[name]), name
            a, b = optimizer.state[p], resumed_optimizer.state[resumed_parameters[name]]
            assert a.keys() == b.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)

    check_equal()
    assert (resumed.lm_head.weight is resumed.token_embedding.weight) == (preset != "llama")
    assert ("lm_head.weight" in load_file(path / MODEL)) == (preset == "llama")
    learn(model, optimizer, range(3, 6))
    learn(resumed, resumed_optimizer, range(3, 6))
    check_equal()


def test_a_checkpoint_of_step_0_loads(tmp_path):
    model, optimizer = make()
    path = save(tmp_path, model, optimizer, state(0))
    resumed, resumed_optimizer = make(seed=2)
    assert checkpoint.load(path, resumed, resumed_optimizer)["step"] == 0
    assert not resumed_optimizer.state and torch.equal(resumed.lm_head.weight, model.lm_head.weight)


def test_another_architecture_is_refused_and_the_model_unchanged(run):
    other, optimizer = make("gpt2")
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(UserError, match="is not of this architecture"):
        checkpoint.load(run.newest, other, optimizer)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters()) and not optimizer.state


# ---- verify: damage

DAMAGE = {
    **{f"{name}: byte {i} flipped": lambda p, name=name, i=i: flip(p / name, i) for name in FILES for i in (0, 40, -1)},
    **{f"{name}: truncated": lambda p, name=name: os.truncate(p / name, 30) for name in FILES},
    **{f"{name}: empty": lambda p, name=name: os.truncate(p / name, 0) for name in FILES},
    **{f"{name}: longer": lambda p, name=name: os.truncate(p / name, (p / name).stat().st_size + 1) for name in FILES},
    **{f"{name}: missing": lambda p, name=name: (p / name).unlink() for name in FILES},
    **{f"{name}: a folder": lambda p, name=name: ((p / name).unlink(), (p / name).mkdir()) for name in FILES},
    **{f"{name}: a pickle": lambda p, name=name: (p / name).write_bytes(pickle.dumps({})) for name in FILES},
    **{f"manifest: {text[:12]!r}": lambda p, text=text: (p / "manifest.json").write_text(text)
       for text in ("", "{}", "[]", "null", "7", "{", '{"a": 1}', '{"a": {}}', '{"a": [1, 2]}', "[" * 10**5)},
    "manifest: not UTF-8": lambda p: (p / "manifest.json").write_bytes(b'{"\xff": 1}'),
    "an extra file": lambda p: (p / "extra.bin").write_bytes(b"x"),
    "an extra folder": lambda p: (p / "extra").mkdir(),
    "only the folder": lambda p: [f.unlink() for f in p.iterdir()],
    "a file in place of the folder": lambda p: (shutil.rmtree(p), p.touch()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_for_the_older_one(run, capsys, damage):
    DAMAGE[damage](run.newest)
    assert str(run.newest) in refused(run.newest)
    assert checkpoint.find_newest(run.dir) == run.older
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: skipped: {run.newest}")


@pytest.mark.parametrize("code, skipped", [(errno.EIO, True), (errno.EACCES, False), (errno.ESTALE, False)])
def test_only_a_file_that_is_lost_or_damaged_lets_the_older_checkpoint_take_its_place(run, monkeypatch, code, skipped):
    def sha256_of(path):
        if path == run.newest / MODEL:
            raise OSError(code, "no answer")
        return sha256_of_file(path)

    sha256_of_file = checkpoint.sha256_of
    monkeypatch.setattr(checkpoint, "sha256_of", sha256_of)
    with pytest.raises(UserError, match=f"{MODEL}: cannot be read: no answer") as raised:
        checkpoint.verify(run.newest)
    assert (type(raised.value) is CheckpointError) == skipped
    if skipped:
        assert checkpoint.find_newest(run.dir) == run.older


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_every_changed_byte_is_detected(run, name):
    for position in range((run.newest / name).stat().st_size):
        flip(run.newest / name, position)
        refused(run.newest)
        flip(run.newest / name, position)
    checkpoint.verify(run.newest)


def test_a_manifest_cannot_name_a_file_outside(run, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    for name in ("../../outside", str(outside), "..", ".", "", "a/../state.json", "a\0b"):
        rewrite_manifest(run.newest, **{name: manifest_entry(outside)})
        refused(run.newest)
        shutil.copyfile(run.older / "manifest.json", run.newest / "manifest.json")


def test_hidden_files_of_a_file_manager_are_ignored(run):
    (run.newest / ".DS_Store").write_bytes(b"x")
    checkpoint.verify(run.newest)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dump", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_nothing_is_unpickled_even_if_the_manifest_lists_it(run, tmp_path, name, dump):
    with open(run.newest / name, "wb") as f:
        dump(Bomb(tmp_path / "executed"), f)
    if name != "manifest.json":
        rewrite_manifest(run.newest, **{name: manifest_entry(run.newest / name)})
        with pytest.raises(CheckpointError):
            checkpoint.load(run.newest, *make())
    refused(run.newest)
    assert not (tmp_path / "executed").exists()


def update_manifest(path):
    """Give the manifest the entries of all files as they are now, so that more than a digest has to refuse them."""
    rewrite_manifest(path, **{p.name: manifest_entry(p) for p in path.iterdir() if p.name != "manifest.json"})


KEY = "blocks.0.attn.q_proj.weight"  # (16, 16)


def chunk(**more):
    return {"file": MODEL, "offset": [0, 0], "shape": [16, 16], **more}


INDICES = {
    "no entry": lambda i: i.update({KEY: 7}),
    "no shape": lambda i: i[KEY].pop("shape"),
    "a shape of text": lambda i: i[KEY].update(shape="16"),
    "a negative shape": lambda i: i[KEY].update(shape=[-16, -16]),
    "a huge shape": lambda i: i[KEY].update(shape=[2**61, 16], pieces=[chunk(shape=[2**61, 16])]),
    "an infinite shape": lambda i: i[KEY].update(shape=[float("inf"), 16]),
    "a boolean shape": lambda i: i[KEY].update(shape=[True, 256]),
    "another shape": lambda i: i[KEY].update(shape=[8, 32], pieces=[chunk(shape=[8, 32])]),
    "another dtype": lambda i: i[KEY].update(dtype="I32"),
    "an unknown dtype": lambda i: i[KEY].update(dtype="F33"),
    "a list as dtype": lambda i: i[KEY].update(dtype=["F32"]),
    "no pieces": lambda i: i[KEY].update(pieces=[]),
    "null pieces": lambda i: i[KEY].update(pieces=None),
    "a gap": lambda i: i[KEY].update(pieces=[chunk(shape=[15, 16])]),
    "out of bounds": lambda i: i[KEY].update(pieces=[chunk(offset=[1, 0])]),
    "an overlap": lambda i: i[KEY]["pieces"].append(chunk(file="model-00001.safetensors")),
    "a duplicate": lambda i: i[KEY]["pieces"].append(chunk()),
    "a file outside": lambda i: i[KEY].update(pieces=[chunk(file="../step_00000002/" + MODEL)]),
    "an absolute file": lambda i: i[KEY].update(pieces=[chunk(file="/etc/passwd")]),
    "a missing file": lambda i: i[KEY].update(pieces=[chunk(file="model-00007.safetensors")]),
    "a missing tensor": lambda i: i.update({"other.weight": i[KEY]}),
    "a tensor that is not in the index": lambda i: i.pop(KEY),
    "too many dimensions": lambda i: i[KEY].update(shape=[1] * 1000,
                                                   pieces=[chunk(offset=[0] * 1000, shape=[1] * 1000)]),
}


@pytest.mark.parametrize("change", INDICES)
def test_an_index_that_differs_from_the_files_is_refused_whatever_its_digest(run, change):
    index = json.loads((run.newest / "index.json").read_text())
    INDICES[change](index)
    (run.newest / "index.json").write_text(json.dumps(index))
    update_manifest(run.newest)
    refused(run.newest)
    assert checkpoint.find_newest(run.dir) == run.older


@pytest.mark.parametrize("state", [{}, {"step": "4"}, {"step": True}, {"step": -1}, {"step": 5},
                                   {"step": 4, "best": {"step": "../../x"}}, {"step": 4, "best": [2]}], ids=str)
def test_an_invalid_state_is_refused_whatever_its_digest(run, state):
    (run.newest / "state.json").write_text(json.dumps({**state, "schema_version": 2}))
    update_manifest(run.newest)
    refused(run.newest)


@pytest.mark.parametrize("header", [2**60, 2**63, 2**64 - 1, 10**8, 0])
def test_a_safetensors_file_with_a_wrong_header_size_is_refused(run, header):
    data = (run.newest / MODEL).read_bytes()
    (run.newest / MODEL).write_bytes(header.to_bytes(8, "little") + data[8:])
    update_manifest(run.newest)
    refused(run.newest)


@pytest.mark.parametrize("name", FILES)
def test_links_and_pipes_are_not_opened(run, tmp_path, name):
    outside = tmp_path / "outside"
    shutil.move(run.newest / name, outside)
    (run.newest / name).symlink_to(outside)
    assert "is not a regular file" in refused(run.newest)
    (run.newest / name).unlink()
    os.mkfifo(run.newest / name)  # opening it would block
    assert "is not a regular file" in refused(run.newest)


def test_a_link_to_a_checkpoint_is_refused(run, tmp_path):
    shutil.move(run.newest, tmp_path / "elsewhere")
    run.newest.symlink_to(tmp_path / "elsewhere")
    assert "is a symbolic link" in refused(run.newest)


@pytest.mark.parametrize("name", FILES)
def test_files_swapped_between_steps_are_detected(run, tmp_path, name):
    same = {p.name for p in run.newest.iterdir() if p.read_bytes() == (run.older / p.name).read_bytes()}
    assert same == {"index.json"}
    for source, target in ((run.older / name, tmp_path / "held"), (run.newest / name, run.older / name),
                           (tmp_path / "held", run.newest / name)):
        shutil.move(source, target)
    for path in (run.older, run.newest):
        if name not in same:
            refused(path)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(run):
    run.newest.rename(run.folder / "step_00000005")
    assert "is the checkpoint of step 4" in refused(run.folder / "step_00000005")


def test_a_checkpoint_of_format_1_is_refused_as_such(run):
    for name in ("index.json", MODEL, OPTIMIZER):
        (run.newest / name).unlink()
    for name in ("model.safetensors", "optimizer.safetensors"):
        (run.newest / name).write_bytes(b"")
    (run.newest / "manifest.json").write_text(json.dumps({
        name: manifest_entry(run.newest / name) for name in ("model.safetensors", "optimizer.safetensors",
                                                             "state.json")}))
    assert "was written in format 1, this program reads 2" in refused(run.newest)


def test_a_state_of_another_version_is_refused(run):
    for version in ({}, {"schema_version": 1}, {"schema_version": 99}):
        (run.newest / "state.json").write_text(json.dumps({**state(4), **version}))
        with pytest.raises(CheckpointError, match="another version"):
            checkpoint.read_state(run.newest)


# ---- find

def test_without_a_usable_checkpoint_the_error_says_so(run, capsys):
    for path in (run.older, run.newest):
        flip(path / "state.json", 5)
    for or_none in (False, True):  # a damaged one is not the same as none
        with pytest.raises(CheckpointError, match="no usable checkpoint"):
            checkpoint.find_newest(run.dir, or_none=or_none)
        assert capsys.readouterr().err.count("warning: ") == 2
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        checkpoint.find_newest(run.dir / "elsewhere")
    assert checkpoint.find_newest(run.dir / "elsewhere", or_none=True) is None


def test_find_best_is_by_validation_loss_and_falls_back_to_the_newest(run, capsys):
    assert checkpoint.find_best(run.dir) == run.older
    assert capsys.readouterr().err == ""
    flip(run.older / MODEL, -1)
    assert checkpoint.find_best(run.dir) == run.newest
    shutil.rmtree(run.older)  # as with checkpoint_interval=0: evaluated and never saved
    assert checkpoint.find_best(run.dir) == run.newest
    assert capsys.readouterr().err.count("warning: skipped: ") == 2
    save(run.dir, *make(), state(6))
    assert checkpoint.find_best(run.dir).name == "step_00000006"


# ---- export

def test_a_damaged_or_missing_export_is_refused(run):
    checkpoint.export(run.dir, run.newest, {"step": 4, "model": {}})
    tensors, description = checkpoint.read_export(run.dir)
    assert description["step"] == 4 and all(torch.equal(tensors[n], p) for n, p in run.model.named_parameters())
    assert description["sha256"] == hashlib.sha256((run.dir / "model.safetensors").read_bytes()).hexdigest()
    flip(run.dir / "model.safetensors", -1)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.read_export(run.dir)
    (run.dir / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read_export(run.dir)
    (run.dir / "config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        checkpoint.read_export(run.dir)


def test_an_export_to_a_full_disk_leaves_the_previous_one(run):
    checkpoint.export(run.dir, run.newest, {"step": 4})
    before = contents(run.dir)
    with largest_file(1000), pytest.raises(OSError):
        checkpoint.export(run.dir, run.older, {"step": 6})
    assert contents(run.dir) == before and checkpoint.read_export(run.dir)[1]["step"] == 4


# ---- several ranks

@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory):
    """A folder for checkpoint_ranks.py, with a run saved by one process in it."""
    folder = tmp_path_factory.mktemp("ranks")
    model, optimizer = checkpoint_ranks.make("plain")
    learn(model, optimizer, range(3))
    (folder / "plain").mkdir()
    save(folder / "plain", model, optimizer, state(3))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)])
def test_every_mode_loads_what_any_other_saved_on_any_number_of_ranks(of_one_process, ranks):
    done = run_python("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                      ROOT / "tests/checkpoints/checkpoint_ranks.py", of_one_process)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["passed"] * ranks
    expected = checkpoint.read_weights(of_one_process / "plain/checkpoints/step_00000003")
    for mode in ("plain", "zero1", "fsdp"):  # and one process loads them all
        model, optimizer = checkpoint_ranks.make("plain", 6)
        checkpoint.load(checkpoint.find_newest(of_one_process / f"{mode}{ranks}"), model, optimizer)
        assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
        learn(model, optimizer, [3])
