"""tools.bench_parallel: its runs are runs of train.py in the mode that they name, and its table compares them."""

import json
import subprocess

import pytest

from blockgpt.errors import UserError
from configurator import load_config
from tools import bench_parallel


@pytest.mark.parametrize("mode", bench_parallel.MODES)
def test_every_run_is_a_config_of_its_mode(tmp_path, monkeypatch, mode):
    processes, _ = bench_parallel.MODES[mode]
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    runs = bench_parallel.agreement_runs(["llama", "gpt2"], 3, tmp_path, mode)
    assert len(runs) == 8
    configs = {name: load_config(argv) for name, argv in runs.items()}
    for name, config in configs.items():
        preset, accumulation, tied = name.split("-")
        assert (config.model.arch_preset, str(config.model.weight_tying)) == (preset, tied)
        assert config.gradient_accumulation_steps == int(accumulation) and config.run_name == name
        assert (config.max_iters, config.processes, config.out_dir) == (3, processes, str(tmp_path))
        assert (config.use_zero1, config.use_fsdp) == (mode.startswith("ZeRO"), mode.startswith("FSDP"))
        assert config.tensor_parallel == (2 if "TP" in mode else 1) and config.dp_replicate == 1 + ("2 rep" in mode)


def test_the_difference_is_the_largest_of_all_steps_relative_to_the_reference():
    reference = [(4.0, 1.0), (2.0, 1.0)]
    assert bench_parallel.loss_difference([([(4.0, 9.0), (2.5, 1.0)], reference), (reference, reference)]) == 0.25
    assert bench_parallel.loss_difference([([(3.0, 1.0), (2.0, 1.0)], reference)]) == 0.25


def write_curves(losses):
    """A `train_all` that trains nothing: every run of a mode gets the losses {mode: losses}."""
    def train_all(mode, runs, folder):
        for argv in runs:
            run = folder / next(flag for flag in argv if flag.startswith("--run_name=")).partition("=")[2]
            run.mkdir(parents=True)
            records = [{"kind": "step", "loss": loss, "grad_norm": 1.0} for loss in losses[mode]] + [{"kind": "eval"}]
            (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    return train_all


def test_the_table_compares_each_mode_with_one_process_and_with_ddp(monkeypatch, capsys):
    monkeypatch.setattr(bench_parallel, "train_all", write_curves(
        {"single": [2.0, 1.0], "DDP": [2.0, 1.5], "ZeRO-1": [2.0, 1.5], "FSDP": [2.0, 1.25]}))
    assert bench_parallel.compare_modes(["DDP", "ZeRO-1", "FSDP"], ["llama"], 2) == 0.5
    rows = [line for line in capsys.readouterr().out.splitlines() if " | llama | " in line]
    assert rows == ["| DDP | 2 | llama | 5.0e-01 |  |", "| ZeRO-1 | 2 | llama | 5.0e-01 | yes |",
                    "| FSDP | 2 | llama | 2.5e-01 | no |"]


@pytest.mark.parametrize("difference, code", [(9e-7, None), (2e-6, 1)])
def test_modes_that_do_not_agree_are_exit_code_1(monkeypatch, difference, code):
    monkeypatch.setattr(bench_parallel, "compare_modes", lambda modes, presets, steps: difference)
    if code is None:
        bench_parallel.main(["agreement", "--presets", "llama"])
    else:
        with pytest.raises(SystemExit) as raised:
            bench_parallel.main(["agreement", "--presets", "llama"])
        assert raised.value.code == code


def test_a_failed_run_is_an_error_with_its_output(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "error: too large")
    monkeypatch.setattr(bench_parallel, "torchrun", lambda processes, *arguments: failed)
    with pytest.raises(UserError, match="DDP: the runs failed:\nerror: too large"):
        bench_parallel.train_all("DDP", [[]], tmp_path)
    with pytest.raises(UserError, match="DDP with 2 processes failed: error: too large"):
        bench_parallel.print_bytes(["llama"])


@pytest.mark.parametrize("mode", [pytest.param("DDP", marks=pytest.mark.long),
                                  pytest.param("ZeRO-1", marks=pytest.mark.long),
                                  pytest.param("FSDP", marks=pytest.mark.slow)])
def test_the_bytes_of_two_processes_follow_the_formula(mode):
    argv = ["config/arch_llama.py", *bench_parallel.SIZE, *bench_parallel.MODES[mode][1],
            "--gradient_accumulation_steps=2"]
    done = bench_parallel.torchrun(2, "--measure", json.dumps(argv))
    line = next((x for x in done.stdout.splitlines() if x.startswith(bench_parallel.MEASUREMENT)), None)
    assert done.returncode == 0 and line, done.stderr
    measured = json.loads(line.removeprefix(bench_parallel.MEASUREMENT))
    total = [sum(column) / measured["parameters"] for column in zip(*measured["by_rank"], strict=True)]
    assert total == pytest.approx([2 * b for b in bench_parallel.FORMULAS[mode](2)], rel=0.05)
