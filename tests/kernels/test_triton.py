"""The Triton kernels: triton_cases.py in a process of its own, as the interpreter is chosen when Triton is imported."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton", reason="Triton is not installed here")


@pytest.mark.slow
def test_the_kernels_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider",
               ROOT / "tests/kernels/triton_cases.py"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
