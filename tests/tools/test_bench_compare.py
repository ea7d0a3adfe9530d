"""tools/bench_compare.py: its synthetic runs, and that thousands of runs are compared whole and in little memory."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

import compare_architectures
from tools.bench_compare import write_runs

# Prints the result, and to stderr the most memory that the comparison and its readers used, in KiB each. The ru_maxrss
# of a process itself is at least that of the process that started it.
MEASURE = """
import re, resource, sys
sys.path.insert(0, sys.argv.pop(1))
from compare_architectures import main
main(sys.argv[1:])
own = int(re.search("VmHWM:\\s*([0-9]+) kB", open("/proc/self/status").read())[1])
print([own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss], file=sys.stderr)
"""


@pytest.mark.slow
def test_several_processes_read_what_one_reads_in_the_same_order(tmp_path, monkeypatch):
    write_runs(tmp_path, 120, seeds=5)
    (tmp_path / "00007/run.json").write_text("{")
    directories = compare_architectures.select_runs([], str(tmp_path))
    alone = compare_architectures.load_runs(directories)
    monkeypatch.setattr(compare_architectures, "MANY_RUNS", 100)
    monkeypatch.setattr(compare_architectures, "n_cores", lambda: 2)
    assert compare_architectures.load_runs(directories) == alone
    assert [run["name"] for run in alone] == [f"{i:05}" for i in range(120)]
    assert sum(run["status"].startswith("broken") for run in alone) == 1


@pytest.mark.long
def test_ten_thousand_runs_are_compared_in_less_than_500_mib(tmp_path):
    write_runs(tmp_path, 10_000, seeds=5)
    (tmp_path / "00123/run.json").write_bytes(b"\xff\x00")
    (tmp_path / "00124/metrics.jsonl").unlink()
    command = [sys.executable, "-c", MEASURE, str(ROOT), f"--out_dir={tmp_path}", "--baseline=00000", "--format=json"]
    done = subprocess.run(command, capture_output=True, text=True)
    found, usage = json.loads(done.stdout), json.loads(done.stderr.splitlines()[-1])
    statuses = [run["status"].partition(":")[0] for run in found["runs"]]
    assert len(statuses) == 10_000 and statuses.count("broken") == 2 and statuses.count("finished") == 9_998
    assert len(found["judgement"]["verdicts"]) == 1_999
    assert max(usage) < 500 * 1024
