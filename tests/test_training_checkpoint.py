"""Checkpoints: bit for bit, or refused; a kill or a full disk costs at most the one being written."""

import contextlib
import hashlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, environment, run_python
from safetensors.torch import load_file

import training_checkpoint as checkpoint
from errors import CheckpointError, UserError
from files import sha256_of
from model_builder import build_model
from model_config import get_preset
from training_optimizers import build_optimizer

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")
CONFIG = SimpleNamespace(learning_rate=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.99)


def make(preset="llama", seed=1):
    config = get_preset(preset, n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32)
    model = build_model(config, seed)
    return model, build_optimizer(model, CONFIG, torch.device("cpu"))


def learn(model, optimizer, steps):
    for step in steps:
        x = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(step))
        model(x[:, :-1], x[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()


def state(step, best=None):
    return {"step": step, "tokens": 16 * step, "best": best and {"step": best, "val_loss": 1.0}, "scaler": None,
            "data": "0" * 64, "description": {}}


@pytest.fixture
def run(tmp_path):
    """A run directory with the checkpoints of steps 2 and 4, and what was saved at 4."""
    model, optimizer = make()
    learn(model, optimizer, range(2))
    checkpoint.save(tmp_path, model, optimizer, state(2, best=2))
    learn(model, optimizer, range(2, 4))
    checkpoint.save(tmp_path, model, optimizer, state(4, best=2))
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
    path = checkpoint.save(tmp_path, model, optimizer, saved)
    checkpoint.verify(path)
    again, its_optimizer = make(preset, seed=2)
    assert checkpoint.load(path, again, its_optimizer, torch.device("cpu")) == saved

    def check_equal():
        theirs = dict(again.named_parameters())
        for name, p in model.named_parameters():
            assert torch.equal(p, theirs[name]), name
            a, b = optimizer.state[p], its_optimizer.state[theirs[name]]
            assert a.keys() == b.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)

    check_equal()
    assert (again.lm_head.weight is again.token_embedding.weight) == (preset != "llama")
    assert ("lm_head.weight" in load_file(path / "model.safetensors")) == (preset == "llama")
    learn(model, optimizer, range(3, 6))
    learn(again, its_optimizer, range(3, 6))
    check_equal()


def test_a_checkpoint_from_before_the_first_step_loads(tmp_path):
    model, optimizer = make()
    path = checkpoint.save(tmp_path, model, optimizer, state(0))
    again, its_optimizer = make(seed=2)
    assert checkpoint.load(path, again, its_optimizer, torch.device("cpu"))["step"] == 0
    assert not its_optimizer.state and torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_another_architecture_is_refused_before_it_is_touched(run):
    other, optimizer = make("gpt2")
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(UserError, match="is not of this architecture"):
        checkpoint.load(run.newest, other, optimizer, torch.device("cpu"))
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters()) and not optimizer.state


def test_files_are_readable_by_whom_any_new_file_is(run):
    checkpoint.export(run.dir, run.model, {})
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
        checkpoint.verify(run.newest)
    model, optimizer = make()
    with pytest.raises(CheckpointError):
        checkpoint.verify(run.newest)
        checkpoint.load(run.newest, model, optimizer, torch.device("cpu"))
    assert not (tmp_path / "executed").exists()


def test_a_state_of_another_version_is_refused(run):
    for version in ({}, {"schema_version": 0}, {"schema_version": 99}):
        (run.newest / "state.json").write_text(json.dumps({**state(4), **version}))
        with pytest.raises(CheckpointError, match="another version"):
            checkpoint.read_state(run.newest)


# ---- what is kept

def test_the_newest_and_the_best_are_kept_and_nothing_goes_before_the_new_one_stands(run, monkeypatch):
    rename, seen = os.rename, []
    monkeypatch.setattr(os, "rename", lambda a, b: (seen.append(names(run.folder)), rename(a, b)))
    for step, best, kept in ((6, 2, [2, 6]), (8, 8, [8]), (10, 8, [8, 10]), (12, None, [12])):
        before = [n for n in names(run.folder) if not n.startswith(".")]
        path = checkpoint.save(run.dir, run.model, run.optimizer, state(step, best))
        assert names(run.folder) == [f"step_{k:08d}" for k in kept] and path.name == f"step_{step:08d}"
        assert [n for n in seen[-1] if not n.startswith(".")] == before
        checkpoint.verify(path)


def test_the_same_step_is_not_written_twice_unless_it_is_damaged(run):
    before = [(p.name, p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(run.newest.iterdir())]
    assert checkpoint.save(run.dir, run.model, run.optimizer, state(4, best=2)) == run.newest
    assert before == [(p.name, p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(run.newest.iterdir())]
    flip(run.newest / "model.safetensors", -1)
    checkpoint.save(run.dir, run.model, run.optimizer, state(4, best=2))
    checkpoint.verify(run.newest)
    assert names(run.folder) == [run.older.name, run.newest.name]


def test_best_is_by_validation_loss_and_falls_back_on_the_newest(run, capsys):
    assert checkpoint.find_best(run.dir) == run.older
    assert capsys.readouterr().err == ""
    flip(run.older / "model.safetensors", -1)
    assert checkpoint.find_best(run.dir) == run.newest
    shutil.rmtree(run.older)  # as with checkpoint_interval=0: evaluated and never saved
    assert checkpoint.find_best(run.dir) == run.newest
    assert capsys.readouterr().err.count("warning: passed over: ") == 2
    checkpoint.save(run.dir, run.model, run.optimizer, state(6))
    assert checkpoint.find_best(run.dir).name == "step_00000006"


def test_what_killed_saves_left_behind_goes_with_the_next_save(run):
    stale = run.folder / ".step_00000006.tmp"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    (run.folder / "notes.tmp").touch()
    checkpoint.save(run.dir, run.model, run.optimizer, state(6))
    assert names(run.folder) == ["notes.tmp", "step_00000006"]


# ---- killed

KILLED_ANYWHERE = """
import os, shutil, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import training_checkpoint as checkpoint
from test_training_checkpoint import learn, make, names, state

base, run_dir = Path(sys.argv[1], "base"), Path(sys.argv[1], "run")
model, optimizer = make()
learn(model, optimizer, [0])
base.mkdir()
checkpoint.save(base, model, optimizer, state(1))
checkpoint.export(base, model, {"step": 1})
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
        checkpoint.save(run_dir, model, optimizer, state(2))
        checkpoint.export(run_dir, model, {"step": 2})
        os._exit(0)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    newest = checkpoint.find_newest(run_dir)
    print(checkpoint.load(newest, *make(seed=3), "cpu")["step"])
    checkpoint.save(run_dir, model, optimizer, state(3))
    assert names(run_dir / "checkpoints") == ["step_00000003"]
    checkpoint.export(run_dir, model, {"step": 3})
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
    assert 1000 < sizes["model.safetensors"] < 50_000 < sizes["optimizer.safetensors"]
    before = contents(run.folder)
    with largest_file(room), pytest.raises(OSError):
        checkpoint.save(run.dir, run.model, run.optimizer, state(6))
    assert contents(run.folder) == before and names(run.folder) == [run.older.name, run.newest.name]
    checkpoint.save(run.dir, run.model, run.optimizer, state(6))


def test_an_export_without_room_leaves_the_former_one(run):
    checkpoint.export(run.dir, run.model, {"step": 4})
    before = contents(run.dir)
    with largest_file(1000), pytest.raises(OSError):
        checkpoint.export(run.dir, make(seed=5)[0], {"step": 6})
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
    done = limited("full", "--init_from=resume", "--max_iters=8")
    assert done.returncode == 4
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and "Traceback" not in done.stderr
    assert lines[0].startswith("warning: the checkpoint of step 6 failed: ") and lines[0].endswith("training goes on")
    assert lines[1].startswith(f"error: {'runs/full'}: the checkpoint of step 8 failed: ")
    assert contents(run_dir / "checkpoints") == good
    assert not [p for p in run_dir.rglob(".*")]
    run = json.loads((run_dir / "run.json").read_text())
    assert run["status"] == "failed" and run["results"]["step"] == 8
    done = train("full", "--init_from=resume")  # there is room again
    assert done.returncode == 0 and "resumed from" in done.stdout and done.stderr == ""
    assert checkpoint.read_export(run_dir)[1]["step"] == 8


SMALL_DISK = """
set -e
mount -t tmpfs -o size=700k tmpfs "$1"; shift
code=0; "$@" || code=$?
ls -A small/run/checkpoints
"$PYTHON" -c 'import sys, training_checkpoint as c; c.verify(c.find_newest("small/run"))'
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
    assert len(lines) == 2 and all("No space left on device" in line for line in lines)
    assert lines[0].startswith("warning: the checkpoint of step 40 failed: ")
    assert lines[1].startswith("error: small/run: the checkpoint of step 60 failed: ")


# ---- the export

def test_the_export_is_verified_too(run):
    checkpoint.export(run.dir, run.model, {"step": 4, "model": {}})
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
