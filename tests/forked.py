"""train.py in a process forked from one that has torch loaded: the seconds of loading it, once for all tests.

Such a process runs train.py as `__main__`, without the interpreter's own start and end. tools.torture and the tests
that start a new process cover these.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

from unprivileged import give_up_privileges

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["forked", "torch._dynamo", "train"])


def exec_train(argv, cwd, env, output, unprivileged=False):
    """Run `python train.py *argv` in this process; its standard streams are `output`.out and `output`.err."""
    for descriptor, path in ((0, os.devnull), (1, f"{output}.out"), (2, f"{output}.err")):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    if unprivileged:
        give_up_privileges()
    # multiprocessing has replaced the first, and pytest all of them, if it is pytest's process that was forked
    sys.stdin, sys.stdout, sys.stderr = (open(i, mode, closefd=False) for i, mode in enumerate("rww"))  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [str(ROOT / "train.py"), *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_train(argv, cwd, env, output, timeout=240, unprivileged=False):
    """`subprocess.run` of train.py, in a forked process; the finished process, its output as text."""
    process = SERVER.Process(target=exec_train, args=(argv, str(cwd), env, str(output), unprivileged))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(argv, timeout)
    out, err = (Path(f"{output}.{stream}").read_text() for stream in ("out", "err"))
    return subprocess.CompletedProcess(argv, process.exitcode, out, err)
