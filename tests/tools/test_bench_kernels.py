"""tools.bench_kernels: what it measures where, and what it says of the rest."""

import importlib.util

import pytest
import torch

from blockgpt.errors import UserError
from tools import bench_kernels

TINY = ["--device=cpu", "--tokens=64", "--vocabularies=128", "--head_width=16", "--chunk=20", "--rounds=1"]


def test_on_a_cpu_it_measures_the_head_and_says_what_the_rest_needs(capsys):
    bench_kernels.main(TINY)
    lines = capsys.readouterr().out.splitlines()
    needs = "a CUDA device" + ("" if importlib.util.find_spec("triton") else " and Triton")
    assert lines[0].startswith(f"rms_norm and swiglu: not measured, they need {needs}")
    rows = [line.split() for line in lines if line.startswith("linear_cross_entropy")]
    assert len(rows) == 4 and [row[-1] for row in rows][::2] == ["1.00", "1.00"]  # eager and chunks, in both passes


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
@pytest.mark.parametrize("flags, message", [
    (["--operations=swiglu"], "--operations: swiglu needs a CUDA device"),
    (["--operations=softmax"], "--operations: 'softmax' is unknown"), (["--dtypes=float33"], "--dtypes: ")])
def test_what_cannot_be_measured_is_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        bench_kernels.main([*TINY, *flags])
