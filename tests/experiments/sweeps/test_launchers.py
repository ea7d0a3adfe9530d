"""Jobs on this computer, through submitit's local executor and through a local Ray."""

import os
import sys
import time

import pytest
from conftest import ROOT, environment
from dataset_helpers import refusal

from blockgpt.errors import UserError, require_package
from blockgpt.experiments.sweeps.launchers import Job, LocalLauncher, RayLauncher, SlurmLauncher, run_job

ENDS = "import os, sys; print(os.environ['WORD'], flush=True); sys.exit(7)"
WAITS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
print('waits', flush=True)
time.sleep(60)
"""


def job(folder, script):
    folder.mkdir()
    return Job((sys.executable, "-c", script), folder, folder, {"WORD": "a word", "PYTHONPATH": str(ROOT)})


def ended(handle, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (code := handle.poll()) is not None:
            return code
        time.sleep(0.05)
    raise AssertionError("it did not end in time")


def console(folder, text):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if text in ((folder / "console.txt").read_text() if (folder / "console.txt").exists() else ""):
            return True
        time.sleep(0.05)
    return False


def check_launcher(launcher, tmp_path):
    """A job's exit code and output arrive; a job that is stopped gets SIGTERM; a job that cannot start has failed."""
    handle = launcher.start(job(tmp_path / "ends", ENDS))
    waiting = launcher.start(job(tmp_path / "waits", WAITS))
    assert ended(handle) == 7
    assert console(tmp_path / "ends", "a word")
    assert console(tmp_path / "waits", "waits")
    assert waiting.poll() is None
    waiting.stop()
    assert ended(waiting) == 3


def test_local_processes(tmp_path):
    launcher = LocalLauncher(2)
    check_launcher(launcher, tmp_path)
    assert sorted(launcher.free) == [0, 1]
    missing = Job(("/no/such/program",), tmp_path, tmp_path, {})
    assert "/no/such/program: cannot be started: No such file" in refusal(launcher.start, missing, error=UserError)
    assert sorted(launcher.free) == [0, 1]


def test_a_job_of_a_cluster_is_stopped_by_a_file(tmp_path):
    waiting = job(tmp_path / "waits", "import os, signal, time\nsignal.signal(15, lambda *_: os._exit(4))\n"
                                      "open('stop', 'w').close()\ntime.sleep(60)")
    assert run_job(waiting) == 4


@pytest.mark.slow
def test_submitit(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr(os, "environ", environment())
    launcher = SlurmLauncher(2, tmp_path, {"cluster": "local", "timeout_min": 5})
    check_launcher(launcher, tmp_path)


@pytest.mark.long
def test_a_job_that_submitit_has_lost_has_failed(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr(os, "environ", environment())
    lost = SlurmLauncher(1, tmp_path, {"cluster": "local", "timeout_min": 5}).start(job(tmp_path / "lost", WAITS))
    assert console(tmp_path / "lost", "waits")
    lost.job.cancel()
    assert ended(lost) < 0
    with open(tmp_path / "lost/console.txt") as file:
        assert len(file.read().splitlines()) > 1


def test_a_parameter_that_submitit_does_not_know_is_one_line(tmp_path):
    pytest.importorskip("submitit")
    assert refusal(SlurmLauncher, 1, tmp_path, {"cluster": "local", "nonsense": 3}, error=UserError).startswith(
        "--launcher=slurm: ")


@pytest.mark.slow
def test_ray(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    try:
        check_launcher(RayLauncher(2, 1, 0), tmp_path)
    finally:
        ray.shutdown()


def test_a_launcher_without_its_package_is_one_line(tmp_path, monkeypatch):
    require_package.cache_clear()
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "needs the package ray" in refusal(RayLauncher, 1, 1, 0, error=UserError)
    assert "(pip install submitit)" in refusal(SlurmLauncher, 1, tmp_path, {}, error=UserError)
    require_package.cache_clear()
