"""files.py: a file is complete or absent; its blocks are allocated before it is written."""

import errno
import hashlib
import json
import os

import pytest
from conftest import run_python

from blockgpt.files import PreallocatedFile, preallocate, sha256_of, write_json

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
