"""A killed save or a full disk costs at most the checkpoint being written; pruning; saves in the background."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_helpers import MODEL, OPTIMIZER, contents, flip, largest_file, names, save, saved_run
from checkpoint_ranks import learn, state
from conftest import ROOT, TINY, environment, run_python

from blockgpt.checkpoints import checkpoint
from blockgpt.checkpoints import files as checkpoint_files
from blockgpt.checkpoints import saver as saver_module
from blockgpt.checkpoints.saver import CheckpointSaver, check_disk_space
from blockgpt.errors import UserError
from blockgpt.files import PreallocatedFile


@pytest.fixture
def run(tmp_path):
    return saved_run(tmp_path)


# ---- what is kept

def test_the_newest_two_and_the_best_are_kept_and_nothing_is_removed_before_the_new_one_is_verified(run, monkeypatch):
    seen = []
    monkeypatch.setattr(saver_module, "verify_written", lambda *_: seen.append(names(run.folder)))
    for step, best, expected in ((6, 2, [2, 4, 6]), (8, 8, [6, 8]), (10, 6, [6, 8, 10]), (12, 6, [6, 10, 12]),
                             (14, None, [12, 14])):
        before = names(run.folder)
        path = save(run.dir, run.model, run.optimizer, state(step, best))
        assert names(run.folder) == [f"step_{k:08d}" for k in expected] and path.name == f"step_{step:08d}"
        assert seen[-1] == sorted([*before, path.name])
        checkpoint.verify(path)
    save(run.dir, run.model, run.optimizer, state(16), keep=3)
    assert names(run.folder) == [f"step_{k:08d}" for k in (12, 14, 16)]
    save(run.dir, run.model, run.optimizer, state(13), keep=2)  # the later ones were skipped
    assert names(run.folder) == [f"step_{k:08d}" for k in (12, 13, 14, 16)]


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, "index.json", "state.json"])
def test_a_checkpoint_that_reads_back_differently_is_removed_and_the_older_ones_stay(run, monkeypatch, name):
    before = contents(run.folder)
    monkeypatch.setattr(saver_module, "drop_page_cache", lambda path: path.name == name and flip(path, -1))
    with pytest.raises(OSError, match=f"{name}: its content on the disk differs from what was written"):
        save(run.dir, run.model, run.optimizer, state(6))
    assert contents(run.folder) == before


def test_the_same_step_is_written_again_only_if_it_is_damaged(run):
    before = [(p.name, p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(run.newest.iterdir())]
    assert save(run.dir, run.model, run.optimizer, state(4, best=2)) == run.newest
    assert before == [(p.name, p.stat().st_ino, p.stat().st_mtime_ns) for p in sorted(run.newest.iterdir())]
    flip(run.newest / MODEL, -1)
    save(run.dir, run.model, run.optimizer, state(4, best=2))
    checkpoint.verify(run.newest)
    assert names(run.folder) == [run.older.name, run.newest.name]


def test_files_have_the_permissions_of_any_new_file(run):
    checkpoint.export(run.dir, run.newest, {})
    (run.dir / "new").touch()
    new_files = [run.dir / "model.safetensors", run.dir / "config.json", *run.newest.iterdir()]
    assert {p.stat().st_mode for p in new_files} == {(run.dir / "new").stat().st_mode}


# ---- killed

def test_a_save_removes_what_killed_saves_left(run):
    stale = run.folder / ".step_00000006.tmp"
    stale.mkdir()
    (stale / MODEL).write_bytes(b"half")
    (run.folder / "notes.tmp").touch()
    save(run.dir, run.model, run.optimizer, state(6))
    assert names(run.folder) == ["notes.tmp", "step_00000004", "step_00000006"]


KILLED_ANYWHERE = """
import os, shutil, signal, sys
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/checkpoints"]
from pathlib import Path
from blockgpt.checkpoints import checkpoint
from checkpoint_ranks import learn, state
from checkpoint_helpers import make, names, save

os.fsync = lambda descriptor: None  # a kill leaves what was written to the system
base, run_dir = Path(sys.argv[1], "base"), Path(sys.argv[1], "run")
model, optimizer = make()
learn(model, optimizer, [0])
base.mkdir()
save(base, model, optimizer, state(1))
checkpoint.export(base, base / "checkpoints/step_00000001", {"step": 1})
operations, killed, resumed = 0, True, make(seed=3)
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
    print(checkpoint.load(newest, *resumed)["step"])
    save(run_dir, model, optimizer, state(3))
    assert names(run_dir / "checkpoints")[-1] == "step_00000003" and len(names(run_dir / "checkpoints")) == 2
    checkpoint.export(run_dir, run_dir / "checkpoints/step_00000003", {"step": 3})
    assert names(run_dir) == ["checkpoints", "config.json", "model.safetensors"]
    shutil.rmtree(run_dir)
"""


@pytest.mark.slow
def test_a_save_killed_before_any_of_its_operations_leaves_a_usable_checkpoint_and_no_temporary(tmp_path):
    done = run_python("-c", KILLED_ANYWHERE, tmp_path, ROOT / "tests")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = done.stdout.split()
    assert found == sorted(found) and found.count("1") > 20 < found.count("2")  # the old one until the rename


# ---- a full disk

@pytest.mark.parametrize("size", [1000, 50_000], ids=["for nothing", "for the weights alone"])
def test_a_full_disk_is_an_oserror_that_costs_only_the_new_checkpoint(run, size):
    sizes = {p.name: p.stat().st_size for p in run.newest.iterdir()}
    assert 1000 < sizes[MODEL] < 50_000 < sizes[OPTIMIZER]
    before = contents(run.folder)
    with largest_file(size), pytest.raises(OSError):
        save(run.dir, run.model, run.optimizer, state(6))
    assert contents(run.folder) == before and names(run.folder) == [run.older.name, run.newest.name]
    save(run.dir, run.model, run.optimizer, state(6))


def test_a_folder_that_cannot_be_looked_at_is_a_failed_save_like_any_other(run, monkeypatch):
    def closed(*_):
        raise UserError("the folder cannot be read")

    monkeypatch.setattr(saver_module, "list_checkpoints", closed)
    with pytest.raises(OSError, match="the folder cannot be read"):
        save(run.dir, run.model, run.optimizer, state(6))


DISK_OPERATIONS = ((os, "mkdir"), (os, "fsync"), (os, "rename"), (os, "replace"), (os, "posix_fallocate"),
                   (Path, "write_bytes"), (PreallocatedFile, "write"))


@pytest.mark.slow
def test_whatever_operation_a_disk_refuses_only_the_good_checkpoints_remain(run, tmp_path, monkeypatch):
    model, optimizer = run.model, run.optimizer
    learn(model, optimizer, range(4, 6))
    left = [0]

    def refusing(operation):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return operation(*arguments, **options)
        return call

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the refusal counts, not the wait
    for owner, name in DISK_OPERATIONS:
        monkeypatch.setattr(owner, name, refusing(getattr(owner, name)))
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
        else:  # the next save prunes what could not be pruned
            checkpoint.verify(path)
        complete, left[0] = left[0] > 0, 0
        shutil.rmtree(folder)
        if complete:
            break
    assert complete and refusals >= 20


@pytest.mark.slow
def test_training_continues_on_a_full_disk_and_fails_at_the_end(tmp_path, train):
    def limited(name, *flags):  # a checkpoint's largest file is twice the export, for which there must be space
        limit = (tmp_path / "runs" / name / "model.safetensors").stat().st_size * 3 // 2
        command = [sys.executable, ROOT / "train.py", *TINY, f"--run_name={name}", *flags]
        return subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=120,
                              env=environment(), preexec_fn=lambda: resource.setrlimit(
                                  resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1])))

    done = train("full", "--max_iters=4", "--eval_interval=2")
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs/full"
    good = contents(run_dir / "checkpoints")
    done = limited("full", "--resume=must", "--max_iters=8")
    assert done.returncode == 4
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and "Traceback" not in done.stderr
    assert lines[0].startswith("warning: the checkpoint of step 6 failed: ")
    assert lines[1].startswith("error: runs/full: the checkpoint of step 8 failed: ")
    assert contents(run_dir / "checkpoints") == good
    assert not [p for p in run_dir.rglob(".*") if p.name != ".lock"]
    run = json.loads((run_dir / "run.json").read_text())
    assert run["status"] == "failed" and run["results"]["step"] == 8
    done = train("full", "--resume=must")  # the disk has space again
    assert done.returncode == 0 and "resumed from" in done.stdout and done.stderr == ""
    assert checkpoint.read_export(run_dir)[1]["step"] == 8


SMALL_DISK = """
set -e
mount -t tmpfs -o size=700k tmpfs "$1"; shift
code=0; "$@" || code=$?
ls -A small/run/checkpoints
"$PYTHON" -c 'import sys, blockgpt.checkpoints.checkpoint as c; c.verify(c.find_newest("small/run"))'
exit $code
"""


@pytest.mark.slow
def test_a_small_disk_that_fills_up(tmp_path, data_dir):
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
    assert done.stdout.splitlines()[-1] == "step_00000020" and ".step_" not in done.stdout  # no temporary directory
    lines = done.stderr.splitlines()
    assert lines[0].startswith("warning: ") and "checkpoints will need" in lines[0] and "are free" in lines[0]
    assert len(lines) == 3 and all("No space left on device" in line for line in lines[1:])
    assert lines[1].startswith("warning: the checkpoint of step 40 failed: ")
    assert lines[2].startswith("error: small/run: the checkpoint of step 60 failed: ")


def test_a_disk_without_space_for_one_checkpoint_is_an_error_for_all_that_are_kept_a_warning(run, monkeypatch, capsys):
    config, parameters = SimpleNamespace(eval_only=False, keep_last=3), 1000

    def check(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        check_disk_space(run.dir, parameters, config)
        return capsys.readouterr().err

    one, export = 12 * parameters, 4 * parameters
    assert check(3 * one + export) == ""  # three newest, the best, the next; two exist
    assert check(3 * one + export - 1).startswith("warning: ")
    assert check(one + export).startswith("warning: ")
    with pytest.raises(UserError, match="--out_dir"):
        check(one + export - 1)
    with largest_file(export - 1), pytest.raises(UserError, match=r"files are limited to .*ulimit -f"):
        check(3 * one + export)
    config.eval_only = True
    assert check(0) == ""


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_an_export_that_cannot_be_written_is_refused_before_the_training(tmp_path, name):
    config = SimpleNamespace(eval_only=False, keep_last=3)
    check_disk_space(tmp_path / "new", 1000, config)
    (tmp_path / "checkpoints").mkdir()
    check_disk_space(tmp_path, 1000, config)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name}: is a folder"):
        check_disk_space(tmp_path, 1000, config)


@pytest.mark.parametrize("folder", [".", "checkpoints"])
def test_a_folder_that_may_not_be_written_is_refused_before_the_training(tmp_path, folder, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    mkdir = Path.mkdir

    def refuse(path, *args, **kwargs):
        if path.parent == tmp_path / folder:
            raise PermissionError(13, "Permission denied", str(path))
        return mkdir(path, *args, **kwargs)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot be written: Permission denied .make it"):
        check_disk_space(tmp_path, 1000, SimpleNamespace(eval_only=False, keep_last=3))


def test_reading_a_checkpoint_of_many_files_holds_few_of_them_open(run, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "MAX_OPEN_FILES", 1)
    path = checkpoint.list_checkpoints(run.dir)[0][1]
    weights = checkpoint.read_weights(path)
    index = checkpoint.read_index(path)
    assert index.check({chunk.file for entry in index.entries.values() for chunk in entry.chunks}) is None
    assert len(index.open_files) == 1 and weights


# ---- in the background

def test_a_save_in_the_background_writes_the_tensors_as_they_were_at_the_call(tmp_path, run):
    (tmp_path / "other").mkdir()
    saver = CheckpointSaver(tmp_path / "other", asynchronous=True)
    assert saver.poll() is None and saver.wait() is None
    now = state(4, best=2)
    assert saver.save(run.model, run.optimizer, now) is None
    now["best"]["step"] = 4
    learn(run.model, run.optimizer, range(4, 5))
    assert saver.wait() == (4, None) and saver.poll() is None and not saver.ended
    assert contents(tmp_path / "other/checkpoints/step_00000004") == contents(run.newest)
    memory = {key: copy.data_ptr() for key, copy in saver.copies.items()}
    saver.save(run.model, run.optimizer, state(5))
    assert saver.wait() == (5, None) and memory and memory == {key: c.data_ptr() for key, c in saver.copies.items()}
    for key, value in checkpoint.read_weights(tmp_path / "other/checkpoints/step_00000005").items():
        assert torch.equal(value, run.model.state_dict()[key])


def test_a_failure_in_the_background_is_polled_before_the_next_save(run):
    saver = CheckpointSaver(run.dir, asynchronous=True)
    before = contents(run.folder)
    with largest_file(1000):
        saver.save(run.model, run.optimizer, state(6))
        step, problem = saver.wait()
    assert step == 6 and "File too large for" in problem and contents(run.folder) == before
    for step in (6, 8):
        saver.save(run.model, run.optimizer, state(step))
        assert saver.wait() == (step, None)
    assert saver.save(run.model, run.optimizer, state(10), wait=True).name == "step_00000010" and saver.poll() is None
    saver.save(run.model, run.optimizer, state(12))
    saver.join()
    with pytest.raises(AssertionError):  # nobody asked how it ended
        saver.save(run.model, run.optimizer, state(14))


def test_a_bug_in_the_background_is_raised_as_itself(run, monkeypatch):
    saver = CheckpointSaver(run.dir, asynchronous=True)
    monkeypatch.setattr(saver_module, "commit_checkpoint", lambda *_: 1 / 0)
    saver.save(run.model, run.optimizer, state(6))
    with pytest.raises(ZeroDivisionError):
        saver.wait()
