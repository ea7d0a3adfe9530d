"""Checkpoints: bit for bit, or refused; a kill or a full disk costs at most the one being written."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import checkpoint_ranks
import pytest
import torch
from checkpoint_ranks import learn, state
from conftest import ROOT, TINY, environment, run_python
from safetensors.torch import load_file

import blockgpt.training.checkpoint as checkpoint
from blockgpt.errors import CheckpointError, UserError, exit_on_user_error
from blockgpt.files import PreallocatedFile, sha256_of
from blockgpt.training import checkpoint_saver
from blockgpt.training.checkpoint_saver import CheckpointSaver
from blockgpt.training.optimizers import build_optimizer
from model_builder import build_model
from model_config import get_preset
from tools.verify_checkpoint import main as verify_checkpoint

MODEL, OPTIMIZER = "model-00000.safetensors", "optimizer-00000.safetensors"
FILES = ("index.json", "manifest.json", MODEL, OPTIMIZER, "state.json")
CONFIG = SimpleNamespace(learning_rate=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.99, use_zero1=False)


def make(preset="llama", seed=1):
    config = get_preset(preset, n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32)
    model = build_model(config, seed)
    return model, build_optimizer(model, CONFIG, torch.device("cpu"))


def save(run_dir, model, optimizer, state, **options):
    return CheckpointSaver(run_dir, **options).save(model, optimizer, state)


@pytest.fixture
def run(tmp_path):
    """A run directory with the checkpoints of steps 2 and 4, and what was saved at 4."""
    model, optimizer = make()
    learn(model, optimizer, range(2))
    save(tmp_path, model, optimizer, state(2, best=2))
    learn(model, optimizer, range(2, 4))
    save(tmp_path, model, optimizer, state(4, best=2))
    return SimpleNamespace(dir=tmp_path, model=model, optimizer=optimizer, folder=tmp_path / "checkpoints",
                           older=tmp_path / "checkpoints/step_00000002", newest=tmp_path / "checkpoints/step_00000004")


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(path):
    """The one-line reason for which a checkpoint does not verify."""
    with pytest.raises(CheckpointError) as error:
        checkpoint.verify(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@contextlib.contextmanager
def largest_file(size):
    """No file can grow beyond `size` bytes: how a disk that fills up looks to one process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- bit for bit

@pytest.mark.parametrize("preset", ["llama", "gpt2", "gpt2_openai"], ids=["untied", "tied", "tied-biases"])
def test_a_loaded_run_is_the_saved_one_and_goes_on_alike(tmp_path, preset):
    model, optimizer = make(preset)
    learn(model, optimizer, range(3))
    saved = state(3, best=3)
    path = save(tmp_path, model, optimizer, saved)
    checkpoint.verify(path)
    again, its_optimizer = make(preset, seed=2)
    loaded = checkpoint.load(path, again, its_optimizer)
    assert {k: loaded[k] for k in saved} == saved and loaded["world_size"] == 1
    assert loaded["versions"].keys() == {"python", "torch", "numpy"} and "functions of (seed" in loaded["random"]

    def check_equal():
        theirs = dict(again.named_parameters())
        for name, p in model.named_parameters():
            assert torch.equal(p, theirs[name]), name
            a, b = optimizer.state[p], its_optimizer.state[theirs[name]]
            assert a.keys() == b.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)

    check_equal()
    assert (again.lm_head.weight is again.token_embedding.weight) == (preset != "llama")
    assert ("lm_head.weight" in load_file(path / MODEL)) == (preset == "llama")
    learn(model, optimizer, range(3, 6))
    learn(again, its_optimizer, range(3, 6))
    check_equal()


def test_a_checkpoint_from_before_the_first_step_loads(tmp_path):
    model, optimizer = make()
    path = save(tmp_path, model, optimizer, state(0))
    again, its_optimizer = make(seed=2)
    assert checkpoint.load(path, again, its_optimizer)["step"] == 0
    assert not its_optimizer.state and torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_another_architecture_is_refused_before_it_is_touched(run):
    other, optimizer = make("gpt2")
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(UserError, match="is not of this architecture"):
        checkpoint.load(run.newest, other, optimizer)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters()) and not optimizer.state


def test_files_are_readable_by_whom_any_new_file_is(run):
    checkpoint.export(run.dir, run.newest, {})
    (run.dir / "new").touch()
    written = [run.dir / "model.safetensors", run.dir / "config.json", *run.newest.iterdir()]
    assert {p.stat().st_mode for p in written} == {(run.dir / "new").stat().st_mode}


# ---- damage

def flip(path, position, mask=1):
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def rewrite_manifest(path, **entries):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **entries}))


def entry(path):
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


DAMAGE = {
    **{f"{name}: byte {i} flipped": lambda p, name=name, i=i: flip(p / name, i) for name in FILES for i in (0, 40, -1)},
    **{f"{name}: cut short": lambda p, name=name: os.truncate(p / name, 30) for name in FILES},
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
    "nothing but the folder": lambda p: [f.unlink() for f in p.iterdir()],
    "a file in place of the folder": lambda p: (shutil.rmtree(p), p.touch()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen_and_the_older_checkpoint_serves(run, capsys, damage):
    DAMAGE[damage](run.newest)
    assert str(run.newest) in refused(run.newest)
    assert checkpoint.find_newest(run.dir) == run.older
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: passed over: {run.newest}")


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_no_byte_can_change_unseen(run, name):
    for position in range((run.newest / name).stat().st_size):
        flip(run.newest / name, position)
        refused(run.newest)
        flip(run.newest / name, position)
    checkpoint.verify(run.newest)


def test_a_manifest_cannot_name_what_lies_elsewhere(run, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    for name in ("../../outside", str(outside), "..", ".", "", "a/../state.json", "a\0b"):
        rewrite_manifest(run.newest, **{name: entry(outside)})
        refused(run.newest)
        shutil.copyfile(run.older / "manifest.json", run.newest / "manifest.json")


def test_hidden_files_of_a_file_manager_are_no_damage(run):
    (run.newest / ".DS_Store").write_bytes(b"x")
    checkpoint.verify(run.newest)


def test_without_a_usable_checkpoint_the_error_says_so(run, capsys):
    for path in (run.older, run.newest):
        flip(path / "state.json", 5)
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        checkpoint.find_newest(run.dir)
    assert capsys.readouterr().err.count("warning: ") == 2
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        checkpoint.find_newest(run.dir / "elsewhere")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dump", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_no_pickle_is_read_even_under_a_manifest_made_for_it(run, tmp_path, name, dump):
    with open(run.newest / name, "wb") as f:
        dump(Bomb(tmp_path / "executed"), f)
    if name != "manifest.json":
        rewrite_manifest(run.newest, **{name: entry(run.newest / name)})
        with pytest.raises(CheckpointError):
            checkpoint.load(run.newest, *make())
    refused(run.newest)
    assert not (tmp_path / "executed").exists()


def trust(path):
    """Make the manifest true of whatever stands there."""
    rewrite_manifest(path, **{p.name: entry(p) for p in path.iterdir() if p.name != "manifest.json"})


def change_index(path, change):
    index = json.loads((path / "index.json").read_text())
    change(index)
    (path / "index.json").write_text(json.dumps(index))
    trust(path)


KEY = "blocks.0.attn.q_proj.weight"  # (16, 16)


def piece(**more):
    return {"file": MODEL, "offset": [0, 0], "shape": [16, 16], **more}


INDICES = {
    "no entry": lambda i: i.update({KEY: 7}),
    "no shape": lambda i: i[KEY].pop("shape"),
    "a shape of text": lambda i: i[KEY].update(shape="16"),
    "a negative shape": lambda i: i[KEY].update(shape=[-16, -16]),
    "an endless shape": lambda i: i[KEY].update(shape=[2**61, 16], pieces=[piece(shape=[2**61, 16])]),
    "an infinite shape": lambda i: i[KEY].update(shape=[float("inf"), 16]),
    "a true shape": lambda i: i[KEY].update(shape=[True, 256]),
    "another shape": lambda i: i[KEY].update(shape=[8, 32], pieces=[piece(shape=[8, 32])]),
    "another dtype": lambda i: i[KEY].update(dtype="I32"),
    "no dtype": lambda i: i[KEY].update(dtype="F33"),
    "a list for a dtype": lambda i: i[KEY].update(dtype=["F32"]),
    "no pieces": lambda i: i[KEY].update(pieces=[]),
    "pieces of nothing": lambda i: i[KEY].update(pieces=None),
    "a gap": lambda i: i[KEY].update(pieces=[piece(shape=[15, 16])]),
    "beyond": lambda i: i[KEY].update(pieces=[piece(offset=[1, 0])]),
    "an overlap": lambda i: i[KEY]["pieces"].append(piece(file="model-00001.safetensors")),
    "twice the same": lambda i: i[KEY]["pieces"].append(piece()),
    "a file elsewhere": lambda i: i[KEY].update(pieces=[piece(file="../step_00000002/" + MODEL)]),
    "an absolute file": lambda i: i[KEY].update(pieces=[piece(file="/etc/passwd")]),
    "a file that is not there": lambda i: i[KEY].update(pieces=[piece(file="model-00007.safetensors")]),
    "a tensor that is not there": lambda i: i.update({"other.weight": i[KEY]}),
    "a tensor of which it does not know": lambda i: i.pop(KEY),
    "too many dimensions": lambda i: i[KEY].update(shape=[1] * 1000, pieces=[piece(offset=[0] * 1000,
                                                                                    shape=[1] * 1000)]),
}


@pytest.mark.parametrize("change", INDICES)
def test_an_index_that_is_not_true_of_the_files_is_refused_however_good_its_digest(run, change):
    change_index(run.newest, INDICES[change])
    refused(run.newest)
    assert checkpoint.find_newest(run.dir) == run.older


@pytest.mark.parametrize("state", [{}, {"step": "4"}, {"step": True}, {"step": -1}, {"step": 5},
                                   {"step": 4, "best": {"step": "../../x"}}, {"step": 4, "best": [2]}], ids=str)
def test_a_state_that_is_none_is_refused_however_good_its_digest(run, state):
    (run.newest / "state.json").write_text(json.dumps({**state, "schema_version": 2}))
    trust(run.newest)
    refused(run.newest)


@pytest.mark.parametrize("header", [2**60, 2**63, 2**64 - 1, 10**8, 0])
def test_a_safetensors_file_that_lies_of_its_size_is_refused(run, header):
    data = (run.newest / MODEL).read_bytes()
    (run.newest / MODEL).write_bytes(header.to_bytes(8, "little") + data[8:])
    trust(run.newest)
    refused(run.newest)


@pytest.mark.parametrize("name", FILES)
def test_links_are_not_followed(run, tmp_path, name):
    outside = tmp_path / "outside"
    shutil.move(run.newest / name, outside)
    (run.newest / name).symlink_to(outside)
    assert "is not a file of its own" in refused(run.newest)
    (run.newest / name).unlink()
    os.mkfifo(run.newest / name)  # which would be waited for
    assert "is not a file of its own" in refused(run.newest)


def test_a_link_is_no_checkpoint(run, tmp_path):
    shutil.move(run.newest, tmp_path / "elsewhere")
    run.newest.symlink_to(tmp_path / "elsewhere")
    assert "is a link" in refused(run.newest)


@pytest.mark.parametrize("name", FILES)
def test_files_swapped_between_steps_are_seen(run, tmp_path, name):
    same = {p.name for p in run.newest.iterdir() if p.read_bytes() == (run.older / p.name).read_bytes()}
    assert same == {"index.json"}
    for a, b in ((run.older / name, tmp_path / "held"), (run.newest / name, run.older / name),
                 (tmp_path / "held", run.newest / name)):
        shutil.move(a, b)
    for path in (run.older, run.newest):
        if name not in same:
            refused(path)


def test_a_whole_checkpoint_under_another_steps_name_is_seen(run):
    run.newest.rename(run.folder / "step_00000005")
    assert "is that of step 4" in refused(run.folder / "step_00000005")


def test_a_checkpoint_of_format_1_is_refused_as_such(run):
    for name in ("index.json", MODEL, OPTIMIZER):
        (run.newest / name).unlink()
    for name in ("model.safetensors", "optimizer.safetensors"):
        (run.newest / name).write_bytes(b"")
    (run.newest / "manifest.json").write_text(json.dumps({
        name: entry(run.newest / name) for name in ("model.safetensors", "optimizer.safetensors", "state.json")}))
    assert "was written in format 1, this program reads 2" in refused(run.newest)


def test_a_state_of_another_version_is_refused(run):
    for version in ({}, {"schema_version": 1}, {"schema_version": 99}):
        (run.newest / "state.json").write_text(json.dumps({**state(4), **version}))
        with pytest.raises(CheckpointError, match="another version"):
            checkpoint.read_state(run.newest)


# ---- what is kept

def test_the_newest_two_and_the_best_are_kept_and_nothing_goes_before_the_new_one_is_verified(run, monkeypatch):
    seen = []
    monkeypatch.setattr(checkpoint_saver, "verify_written", lambda *_: seen.append(names(run.folder)))
    for step, best, kept in ((6, 2, [2, 4, 6]), (8, 8, [6, 8]), (10, 6, [6, 8, 10]), (12, 6, [6, 10, 12]),
                             (14, None, [12, 14])):
        before = names(run.folder)
        path = save(run.dir, run.model, run.optimizer, state(step, best))
        assert names(run.folder) == [f"step_{k:08d}" for k in kept] and path.name == f"step_{step:08d}"
        assert seen[-1] == sorted([*before, path.name])
        checkpoint.verify(path)
    save(run.dir, run.model, run.optimizer, state(16), keep=3)
    assert names(run.folder) == [f"step_{k:08d}" for k in (12, 14, 16)]
    save(run.dir, run.model, run.optimizer, state(13), keep=2)  # those after it were passed over
    assert names(run.folder) == [f"step_{k:08d}" for k in (12, 13, 14, 16)]


def test_what_reads_back_otherwise_is_no_checkpoint_and_the_older_ones_stay(run, monkeypatch):
    before = contents(run.folder)
    monkeypatch.setattr(checkpoint_saver, "drop_page_cache", lambda path: path.name == MODEL and flip(path, -1))
    with pytest.raises(OSError, match=f"{MODEL}: reads back otherwise than it was written"):
        save(run.dir, run.model, run.optimizer, state(6))
    assert contents(run.folder) == before


def test_the_same_step_is_not_written_twice_unless_it_is_damaged(run):
    before = [(p.name, p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(run.newest.iterdir())]
    assert save(run.dir, run.model, run.optimizer, state(4, best=2)) == run.newest
    assert before == [(p.name, p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(run.newest.iterdir())]
    flip(run.newest / MODEL, -1)
    save(run.dir, run.model, run.optimizer, state(4, best=2))
    checkpoint.verify(run.newest)
    assert names(run.folder) == [run.older.name, run.newest.name]


def test_best_is_by_validation_loss_and_falls_back_on_the_newest(run, capsys):
    assert checkpoint.find_best(run.dir) == run.older
    assert capsys.readouterr().err == ""
    flip(run.older / MODEL, -1)
    assert checkpoint.find_best(run.dir) == run.newest
    shutil.rmtree(run.older)  # as with checkpoint_interval=0: evaluated and never saved
    assert checkpoint.find_best(run.dir) == run.newest
    assert capsys.readouterr().err.count("warning: passed over: ") == 2
    save(run.dir, run.model, run.optimizer, state(6))
    assert checkpoint.find_best(run.dir).name == "step_00000006"


def test_what_killed_saves_left_behind_goes_with_the_next_save(run):
    stale = run.folder / ".step_00000006.tmp"
    stale.mkdir()
    (stale / MODEL).write_bytes(b"half")
    (run.folder / "notes.tmp").touch()
    save(run.dir, run.model, run.optimizer, state(6))
    assert names(run.folder) == ["notes.tmp", "step_00000004", "step_00000006"]


# ---- killed

KILLED_ANYWHERE = """
import os, shutil, signal, sys
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/training"]
from pathlib import Path
import blockgpt.training.checkpoint as checkpoint
from test_checkpoint import learn, make, names, save, state

base, run_dir = Path(sys.argv[1], "base"), Path(sys.argv[1], "run")
model, optimizer = make()
learn(model, optimizer, [0])
base.mkdir()
save(base, model, optimizer, state(1))
checkpoint.export(base, base / "checkpoints/step_00000001", {"step": 1})
operations, killed = 0, True
while killed:
    operations += 1
    shutil.copytree(base, run_dir)
    child = os.fork()
    if not child:
        left = operations
        def hook(event, arguments):
            global left
            if event.startswith(("open", "os.", "shutil.")):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        save(run_dir, model, optimizer, state(2))
        checkpoint.export(run_dir, run_dir / "checkpoints/step_00000002", {"step": 2})
        os._exit(0)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    newest = checkpoint.find_newest(run_dir)
    print(checkpoint.load(newest, *make(seed=3))["step"])
    save(run_dir, model, optimizer, state(3))
    assert names(run_dir / "checkpoints")[-1] == "step_00000003" and len(names(run_dir / "checkpoints")) == 2
    checkpoint.export(run_dir, run_dir / "checkpoints/step_00000003", {"step": 3})
    assert names(run_dir) == ["checkpoints", "config.json", "model.safetensors"]
    shutil.rmtree(run_dir)
"""


def test_a_save_killed_before_any_of_its_operations_leaves_a_usable_checkpoint_and_no_litter(tmp_path):
    done = run_python("-c", KILLED_ANYWHERE, tmp_path, ROOT / "tests")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = done.stdout.split()
    assert found == sorted(found) and found.count("1") > 20 < found.count("2")  # the old one until the new one stands


# ---- no room

@pytest.mark.parametrize("room", [1000, 50_000], ids=["for nothing", "for the weights alone"])
def test_a_full_disk_is_an_oserror_that_costs_only_the_new_checkpoint(run, room):
    sizes = {p.name: p.stat().st_size for p in run.newest.iterdir()}
    assert 1000 < sizes[MODEL] < 50_000 < sizes[OPTIMIZER]
    before = contents(run.folder)
    with largest_file(room), pytest.raises(OSError):
        save(run.dir, run.model, run.optimizer, state(6))
    assert contents(run.folder) == before and names(run.folder) == [run.older.name, run.newest.name]
    save(run.dir, run.model, run.optimizer, state(6))


ASKED_OF_THE_DISK = ((os, "mkdir"), (os, "fsync"), (os, "rename"), (os, "replace"), (os, "posix_fallocate"),
                     (Path, "write_bytes"), (PreallocatedFile, "write"))


def test_whatever_a_disk_refuses_the_last_good_checkpoint_stays_and_nothing_else(run, tmp_path, monkeypatch):
    model, optimizer = run.model, run.optimizer
    learn(model, optimizer, range(4, 6))
    left = [0]

    def counted(working):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return working(*arguments, **options)
        return call

    for place, name in ASKED_OF_THE_DISK:
        monkeypatch.setattr(place, name, counted(getattr(place, name)))
    refusals = 0
    for i in range(1, 200):
        folder = tmp_path / f"copy{i}"
        shutil.copytree(run.dir / "checkpoints", folder / "checkpoints")
        before, left[0] = contents(folder), i
        try:
            path = CheckpointSaver(folder).save(model, optimizer, state(6))
        except OSError as error:
            assert "No space left on device" in str(error)
            assert contents(folder) == before and len(names(folder / "checkpoints")) == 2, i
            refusals += 1
        else:  # what cannot be pruned is for the next save
            checkpoint.verify(path)
        through, left[0] = left[0] > 0, 0
        shutil.rmtree(folder)
        if through:
            break
    assert through and refusals >= 20


def test_an_export_without_room_leaves_the_former_one(run):
    checkpoint.export(run.dir, run.newest, {"step": 4})
    before = contents(run.dir)
    with largest_file(1000), pytest.raises(OSError):
        checkpoint.export(run.dir, run.older, {"step": 6})
    assert contents(run.dir) == before and checkpoint.read_export(run.dir)[1]["step"] == 4


def test_training_outlives_a_full_disk_and_says_so_at_the_end(tmp_path, train):
    def limited(name, *flags):
        command = [sys.executable, ROOT / "train.py", *TINY, f"--run_name={name}", *flags]
        return subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=120,
                              env=environment(), preexec_fn=lambda: resource.setrlimit(
                                  resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])))

    done = train("full", "--max_iters=4", "--eval_interval=2")
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs/full"
    good = contents(run_dir / "checkpoints")
    done = limited("full", "--resume=must", "--max_iters=8")
    assert done.returncode == 4
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and "Traceback" not in done.stderr
    assert lines[0].startswith("warning: the checkpoint of step 6 failed: ") and lines[0].endswith("training goes on")
    assert lines[1].startswith(f"error: {'runs/full'}: the checkpoint of step 8 failed: ")
    assert contents(run_dir / "checkpoints") == good
    assert not [p for p in run_dir.rglob(".*")]
    run = json.loads((run_dir / "run.json").read_text())
    assert run["status"] == "failed" and run["results"]["step"] == 8
    done = train("full", "--resume=must")  # there is room again
    assert done.returncode == 0 and "resumed from" in done.stdout and done.stderr == ""
    assert checkpoint.read_export(run_dir)[1]["step"] == 8


SMALL_DISK = """
set -e
mount -t tmpfs -o size=700k tmpfs "$1"; shift
code=0; "$@" || code=$?
ls -A small/run/checkpoints
"$PYTHON" -c 'import sys, blockgpt.training.checkpoint as c; c.verify(c.find_newest("small/run"))'
exit $code
"""


def test_on_a_disk_that_is_really_full(tmp_path, data_dir):
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    (tmp_path / "small").mkdir()
    try:
        subprocess.run([*namespace, "mount", "-t", "tmpfs", "tmpfs", "small"], cwd=tmp_path, check=True,
                       capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets no user mount a small file system")
    train = [sys.executable, ROOT / "train.py", *TINY, f"--data_dir={data_dir}", "--out_dir=small", "--run_name=run",
             "--max_iters=60", "--eval_interval=20", "--log_interval=20"]
    done = subprocess.run(
        [*namespace, "sh", "-c", SMALL_DISK, "sh", "small", *train],
        cwd=tmp_path, text=True, capture_output=True, timeout=120,
        env=environment(PYTHON=sys.executable))
    assert done.returncode == 4, done.stderr
    assert done.stdout.splitlines()[-1] == "step_00000020" and ".step_" not in done.stdout  # no temporary beside it
    lines = done.stderr.splitlines()
    assert lines[0].startswith("warning: ") and "checkpoints will need" in lines[0] and "are free" in lines[0]
    assert len(lines) == 3 and all("No space left on device" in line for line in lines[1:])
    assert lines[1].startswith("warning: the checkpoint of step 40 failed: ")
    assert lines[2].startswith("error: small/run: the checkpoint of step 60 failed: ")


# ---- tools/verify_checkpoint.py

def told(capsys, *argv):
    """(exit code, lines on stdout, lines on stderr) of the command."""
    with pytest.raises(SystemExit) as left, exit_on_user_error():
        verify_checkpoint(list(map(str, argv)))
        raise SystemExit(0)
    out, err = capsys.readouterr()
    return left.value.code, out.splitlines(), err.splitlines()


def test_the_command_tells_each_checkpoint_and_the_export(run, capsys):
    checkpoint.export(run.dir, run.newest, {})
    code, lines, _ = told(capsys, run.dir)
    assert code == 0 and [line.split(":")[0] for line in lines] == [
        f"ok      {path}" for path in (run.older, run.newest, run.dir / "model.safetensors")]
    assert all(line.endswith(" GB/s") for line in lines) and " 5 files, 0.000 GB, " in lines[0]
    flip(run.older / MODEL, -1)
    flip(run.dir / "model.safetensors", -1)
    code, lines, _ = told(capsys, run.dir)
    assert code == 3 and [line.split()[0] for line in lines] == ["not", "ok", "not"]
    assert lines[0] == f"not ok  {run.older / MODEL}: is damaged (its sha256 is not the manifest's)"
    assert told(capsys, run.newest)[0] == 0 and told(capsys, run.older)[0] == 3
    assert told(capsys, run.folder / "step_00000009")[:2] == (
        3, [f"not ok  {run.folder / 'step_00000009'}: is not there"])


def test_the_command_finds_nothing(tmp_path, capsys):
    assert told(capsys, tmp_path) == (3, [], [f"error: {tmp_path}: has no checkpoint"])
    assert told(capsys, tmp_path / "nowhere") == (2, [], [f"error: {tmp_path / 'nowhere'}: is not a directory"])


# ---- asynchronous

def test_a_save_in_the_background_holds_what_was_there_when_it_was_asked_for(tmp_path, run):
    (tmp_path / "other").mkdir()
    checkpoints = CheckpointSaver(tmp_path / "other", asynchronous=True)
    assert checkpoints.poll() is None and checkpoints.wait() is None
    now = state(4, best=2)
    assert checkpoints.save(run.model, run.optimizer, now) is None
    now["best"]["step"] = 4
    learn(run.model, run.optimizer, range(4, 5))
    assert checkpoints.wait() == (4, None) and checkpoints.poll() is None and not checkpoints.ended
    assert contents(tmp_path / "other/checkpoints/step_00000004") == contents(run.newest)


def test_a_failure_in_the_background_is_polled_and_the_next_save_waits_for_it(run):
    checkpoints = CheckpointSaver(run.dir, asynchronous=True)
    before = contents(run.folder)
    with largest_file(1000):
        checkpoints.save(run.model, run.optimizer, state(6))
        step, problem = checkpoints.wait()
    assert step == 6 and "File too large for" in problem and contents(run.folder) == before
    for step in (6, 8):
        checkpoints.save(run.model, run.optimizer, state(step))
    assert checkpoints.save(run.model, run.optimizer, state(10), wait=True).name == "step_00000010"
    assert [checkpoints.poll() for _ in range(3)] == [(6, None), (8, None), None]


def test_a_bug_in_the_background_is_no_failure_of_a_disk(run, monkeypatch):
    checkpoints = CheckpointSaver(run.dir, asynchronous=True)
    monkeypatch.setattr(checkpoint_saver, "commit", lambda *_: 1 / 0)
    checkpoints.save(run.model, run.optimizer, state(6))
    with pytest.raises(ZeroDivisionError):
        checkpoints.wait()


# ---- several ranks

@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory):
    """A folder for checkpoint_ranks.py, with what one process saved in it."""
    folder = tmp_path_factory.mktemp("ranks")
    model, optimizer = checkpoint_ranks.make("plain")
    learn(model, optimizer, range(3))
    (folder / "plain").mkdir()
    save(folder / "plain", model, optimizer, state(3))
    return folder


@pytest.mark.parametrize("ranks", [2, 3, pytest.param(4, marks=pytest.mark.long)])
def test_what_any_mode_saves_on_any_number_of_ranks_every_other_loads(of_one_process, ranks):
    done = run_python("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                      ROOT / "tests/checkpoint_ranks.py", of_one_process)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["agreed"] * ranks
    expected = checkpoint.read_weights(of_one_process / "plain/checkpoints/step_00000003")
    for mode in ("plain", "zero1", "fsdp"):  # and one process loads them all
        model, optimizer = checkpoint_ranks.make("plain", 6)
        checkpoint.load(checkpoint.find_newest(of_one_process / f"{mode}{ranks}"), model, optimizer)
        assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
        learn(model, optimizer, [3])


# ---- the export

def test_the_export_is_verified_too(run):
    checkpoint.export(run.dir, run.newest, {"step": 4, "model": {}})
    tensors, description = checkpoint.read_export(run.dir)
    assert description["step"] == 4 and all(torch.equal(tensors[n], p) for n, p in run.model.named_parameters())
    digest = hashlib.sha256((run.dir / "model.safetensors").read_bytes()).hexdigest()
    assert description["sha256"] == digest
    flip(run.dir / "model.safetensors", -1)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.read_export(run.dir)
    (run.dir / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read_export(run.dir)
    (run.dir / "config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        checkpoint.read_export(run.dir)
