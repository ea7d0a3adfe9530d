"""bench_data measures every stage of the data pipeline on a small corpus."""

import pytest
from conftest import ROOT

from tools import bench_data


@pytest.mark.slow
def test_every_stage_is_measured(capsys):
    bench_data.main(["--input", f"{ROOT}/blockgpt/**/*.py", f"{ROOT}/tests/**/*.py", "--tokenizers", "byte"])
    lines = capsys.readouterr().out.splitlines()
    expected = ["prepare, byte: ", "open, ", "packing='documents': planned in ", "read, stream, from step 0e+00: ",
                "read, stream, from step 1e+09: ", "read, documents, ", "read, documents, ", "read, two sources, ",
                "read, two sources, ", "wait at 2 M tokens/s: ", "2 TB, sparse: opened in "]
    assert len(lines) == len(expected) and all(map(str.startswith, lines, expected))
