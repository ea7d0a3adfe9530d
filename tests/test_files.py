"""files.py: a file is complete or absent; its blocks are allocated before it is written; three answers; locks."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from conftest import environment, run_python
from unprivileged import run_unprivileged

from blockgpt.errors import UserError
from blockgpt.files import (
    FolderLock,
    PreallocatedFile,
    below,
    exists,
    is_dir,
    is_file,
    list_dir,
    matching,
    preallocate,
    sha256_of,
    write_json,
)

KILLED_ANYWHERE = """
import json, os, signal, sys
from blockgpt.files import write_json

path = sys.argv[1]
write_json(path, "old")
operations = 0
while True:
    operations += 1
    child = os.fork()
    if not child:
        left = operations
        def hook(event, arguments):
            global left
            if event in ("open", "os.rename", "os.remove"):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        write_json(path, "new")
        os._exit(0)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    print(json.load(open(path)))
    if not killed:
        break
"""


def test_a_write_killed_before_any_of_its_operations_leaves_the_old_file_or_the_new(tmp_path):
    done = run_python("-c", KILLED_ANYWHERE, tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    seen = done.stdout.split()
    assert len(seen) >= 4 and seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}


def test_a_value_that_json_cannot_hold_changes_nothing(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    for value in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, value)
    assert json.loads(path.read_text()) == {"x": 1} and list(tmp_path.iterdir()) == [path]


def test_sha256_is_hashlibs_for_files_of_any_size(tmp_path):
    for size in (0, 1, 2**20, 2**20 + 1):
        (tmp_path / "f").write_bytes(b"\xa5" * size)
        assert sha256_of(tmp_path / "f") == hashlib.sha256(b"\xa5" * size).hexdigest()


# ---- preallocation

def test_blocks_are_allocated_before_the_first_byte(tmp_path):
    with PreallocatedFile(tmp_path / "f", 100_000) as file:
        assert os.path.getsize(tmp_path / "f") == 100_000 and os.stat(tmp_path / "f").st_blocks * 512 >= 100_000
        with pytest.raises(AssertionError):
            file.finish()


@pytest.mark.parametrize("code, raised", [(errno.ENOSPC, True), (errno.EFBIG, True), (errno.EIO, True),
                                          (errno.EOPNOTSUPP, False), (errno.EINVAL, False), (errno.ENOSYS, False)])
def test_only_a_file_system_without_preallocation_is_written_to_without(tmp_path, monkeypatch, code, raised):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    if raised:
        with pytest.raises(OSError, match=r".* for 1,234 bytes: .*f"):
            PreallocatedFile(tmp_path / "f", 1234)
        return
    with PreallocatedFile(tmp_path / "f", 3) as file:
        file.write(b"abc")
        assert file.finish()["sha256"] == hashlib.sha256(b"abc").hexdigest()


def test_a_system_without_posix_fallocate_allocates_nothing(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    with open(tmp_path / "f", "wb") as f:
        preallocate(f.fileno(), 10**18)
    assert os.path.getsize(tmp_path / "f") == 0


# ---- there, not there, cannot tell

LOOKUPS = {"exists": exists, "is_dir": is_dir, "is_file": is_file, "list_dir": list_dir, "matching": matching,
           "below": lambda path: list(below(path))}
NOTHING = {"exists": False, "is_dir": False, "is_file": False, "list_dir": [], "matching": [], "below": []}


@pytest.fixture
def tree(tmp_path):
    """A folder with a file, a folder, a link to each, and a hidden file."""
    (tmp_path / "folder/inner").mkdir(parents=True)
    for name in ("file", "folder/a.txt", "folder/b.md", "folder/inner/c.txt", "folder/.hidden.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "to_file").symlink_to("file")
    (tmp_path / "to_folder").symlink_to("folder")
    (tmp_path / "folder/inner/loop").symlink_to("..")
    return tmp_path


def test_what_is_there_is_found_and_what_is_not_is_not(tree):
    for name, kinds in (("file", (True, False, True)), ("folder", (True, True, False)),
                        ("to_file", (True, False, True)), ("to_folder", (True, True, False))):
        assert (exists(tree / name), is_dir(tree / name), is_file(tree / name)) == kinds
    for name in ("nothing", "nothing/below", "file/below", "to_folder/nothing", "folder/inner/c.txt/x/y", "x" * 300,
                 "a\0b"):
        assert {key: look(tree / name) for key, look in LOOKUPS.items()} == NOTHING
    assert [p.name for p in list_dir(tree / "folder")] == ["a.txt", "b.md", "inner"]
    assert [p.name for p in list_dir(tree / "folder", ".h*")] == [".hidden.txt"]


@pytest.mark.parametrize("pattern", ["*", "**", "**/*.txt", "f*/*.txt", "*/[ab].*", "folder/inner", "no*/x", "**/c.txt",
                                     "folder/**"])
def test_a_pattern_matches_what_globs_does(tree, pattern):
    (tree / "folder/inner/loop").unlink()  # glob follows it forty times
    expected = {os.path.normpath(p) for p in glob.glob(str(tree / pattern), recursive=True)}
    assert {str(p) for p in matching(tree / pattern)} == expected
    assert [str(p) for p in matching(tree / pattern)] == sorted(expected)


def test_a_link_to_a_folder_that_it_is_in_is_not_followed(tree):
    found = [str(p.relative_to(tree)) for p in below(tree / "folder")]
    assert found == ["folder/a.txt", "folder/b.md", "folder/inner", "folder/inner/c.txt", "folder/inner/loop"]


@pytest.mark.parametrize("closed, fails, tells", [
    ("link", ["exists closed", "is_dir closed", "list_dir closed", "is_file closed/x", "matching closed/*",
              "below ."], []),
    (0o000, ["list_dir closed", "exists closed/x", "matching closed/*", "matching **/x", "below ."], ["is_dir closed"]),
    (0o444, ["exists closed/x", "is_file closed/x", "matching closed/x", "below ."], ["list_dir closed"]),
    (0o111, ["list_dir closed", "matching */*", "below ."], ["is_file closed/x", "matching closed/x"])])
def test_what_cannot_be_told_is_one_line(tree, closed, fails, tells):
    if closed == "link":
        (tree / "closed").symlink_to("/no/such/disk")
        reason = "closed: is a link to /no/such/disk, which does not exist (mount that disk, or remove the link)"
    else:
        (tree / "closed").mkdir()
        (tree / "closed/x").touch()
        (tree / "closed").chmod(closed)
        reason = "cannot be read: Permission denied (change its permissions, or those of the folders above it)"
    for look, path in map(str.split, fails):
        message = run_unprivileged(lambda look=look, path=path: LOOKUPS[look](tree / path))
        assert message.startswith(f"UserError: {tree}/closed") and message.endswith(reason), (look, path)
    for look, path in map(str.split, tells):
        assert "Error" not in run_unprivileged(lambda look=look, path=path: LOOKUPS[look](tree / path)), (look, path)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ELOOP, errno.ETIMEDOUT])
def test_no_error_of_the_system_is_taken_for_an_absent_file(tree, monkeypatch, code):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    for function in ("stat", "lstat", "listdir"):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=re.escape(os.strerror(code))) as raised:
            patch.setattr(os, function, refuse)
            list_dir(tree / ("nothing" if function == "lstat" else "folder"))
        assert "\n" not in str(raised.value)


# ---- locks

HOLD = """
import sys, os, time
from blockgpt.files import FolderLock
lock = FolderLock(sys.argv[1], "trains in it")
child = os.fork()
if not child:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
time.sleep(60)
"""


@pytest.fixture
def other_process(tmp_path):
    """A process that holds the lock of tmp_path, and has forked another."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], env=environment(), stdout=subprocess.PIPE)
    forked = int(process.stdout.readline())
    yield process
    process.kill()
    os.kill(forked, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_by_name_until_the_first_is_killed(tmp_path, other_process):
    before = (tmp_path / ".lock").read_bytes()
    with pytest.raises(UserError) as raised:
        FolderLock(tmp_path, "trains in it", wait=0)
    assert str(raised.value) == (f"{tmp_path}: process {other_process.pid} on {socket.gethostname()} trains in it "
                                 "(wait until it ends, or end it)")
    assert (tmp_path / ".lock").read_bytes() == before
    other_process.kill()  # the process that it has forked lives on, and has no lock
    with FolderLock(tmp_path, "trains in it", wait=60) as lock:
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
        with FolderLock(tmp_path, "again"):  # the process has it already
            pass
        assert lock.key in FolderLock.held
    assert lock.key not in FolderLock.held and not (tmp_path / ".lock").exists()
    FolderLock(tmp_path, "trains in it", wait=0).release()


def test_a_holder_without_its_name_is_another_process(tmp_path, other_process):
    (tmp_path / ".lock").write_text("")
    with pytest.raises(UserError, match="another process trains in it"):
        FolderLock(tmp_path, "trains in it", wait=0)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
def test_a_file_system_without_locks_is_one_warning(tmp_path, monkeypatch, capsys, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    FolderLock(tmp_path, "trains in it").release()
    assert capsys.readouterr().err == (f"warning: {tmp_path}: this file system has no locks ({os.strerror(code)}): "
                                       "nothing stops a second process from writing there\n")
