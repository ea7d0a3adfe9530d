"""compare_architectures: its formats and its command."""

import ast
import csv
import glob
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from run_helpers import VAL_DATA, compared, main, make_run
from unprivileged import run_unprivileged

import compare_architectures as tool
from blockgpt.errors import UserError
from blockgpt.experiments import records


def command(*argv, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, ROOT / "compare_architectures.py", *map(str, argv)], cwd=cwd, env=env,
                          capture_output=True, text=True, timeout=60)


# ---- the formats ----

def test_the_table_has_one_line_of_numbers_and_the_architecture_per_run(tmp_path):
    make_run(tmp_path / "llama")
    make_run(tmp_path / "a-run-with-a-name-that-is-far-too-long-to-be-printed-to-its-end", preset="gpt2",
             losses=(2.25, 2.125))
    table = tool.render(compared(*sorted(tmp_path.iterdir())))
    lines = table.splitlines()
    assert all(len(line) <= 120 for line in lines)
    assert lines[0].split() == ["#", "run", "params", "tokens", "val", "loss", "vs", "best", "final", "bpb",
                                "tokens/s", "MFU", "step", "ms", "GiB", "status"]
    assert lines[2].split() == ["1", "llama", "124.3M", "409.6k", "2.0000", "+0.0000", "2.0000", "2.000", "20k",
                                "40.0%", "100.0", "1.00", "finished"]
    assert lines[3].strip() == "4L-4H-128D-RoPE-RMS-SwiGLU-PreNorm"
    assert "a-run-with-a…d-to-its-end  124.3M" in lines[4] and "+0.1250" in lines[4]
    assert lines[5].strip() == "4L-4H-128D-AbsPos-LN-NB-GELU-PostNorm"
    for header in ("tokens", "val loss", "tokens/s", "GiB"):  # numbers end where their header ends
        end = lines[0].index(header) + len(header)
        assert all(line[end - 1] != " " and line[end] == " " for line in (lines[2], lines[4])), header


def test_the_table_keeps_to_its_width_with_many_runs_and_long_reasons(tmp_path):
    for i in range(12):
        make_run(tmp_path / f"20261121-080000-a-preset-{i}", preset=("llama", "gpt2", "hybrid")[i % 3], seed=i,
                 status="failed", status_reason="the loss is not finite: " + "why " * 60)
    table = tool.render(compared(*tmp_path.iterdir()))
    assert all(len(line) <= 120 for line in table.splitlines())
    assert table.count("differs in") > 1  # continued below instead of running off the edge


def test_large_numbers_have_a_unit():
    assert [records.human_count(n) for n in (0, 999, 17_230.4, 124_300_000, 999_999, 1.5e9, 3e12)] == [
        "0", "999", "17.23k", "124.3M", "1M", "1.5B", "3T"]


def test_csv_parses_back_and_warns_on_stderr(tmp_path, capsys):
    make_run(tmp_path / "a,\"b", losses=(2.123456789,), seed=3)
    make_run(tmp_path / "c", preset="gpt2", losses=(2.5,))
    (tmp_path / "d").mkdir()
    out, err = main(capsys, "--out_dir", tmp_path, "--format", "csv")
    rows = list(csv.DictReader(out.splitlines()))
    assert list(rows[0]) == [c.key for c in records.COLUMNS]
    assert [row["name"] for row in rows] == ["a,\"b", "c", "d"]
    assert float(rows[0]["val_loss"]) == 2.123456789 and int(rows[0]["parameters"]) == 124_300_000
    assert rows[2]["val_loss"] == "" and rows[2]["status"] == "broken: run.json is missing"
    assert err.startswith("warning: these runs did not see the same tokens: seed")


def test_json_parses_back_with_raw_numbers_differences_and_warnings(tmp_path, capsys):
    make_run(tmp_path / "a", losses=(2.123456789,), seed=3)
    make_run(tmp_path / "b", preset="gpt2", losses=(2.5,))
    out, err = main(capsys, "--out_dir", tmp_path, "--format", "json")
    result = json.loads(out)
    assert set(result) == {"schema_version", "criterion", "runs", "differences", "warnings", "notes", "arms"}
    assert result["criterion"] == {"metric": "val_loss", "more_is_better": False}
    assert result["runs"][0] == {
        "rank": 1, "name": "a", "architecture": "4L-4H-128D-RoPE-RMS-SwiGLU-PreNorm", "parameters": 124_300_000,
        "tokens": 100 * 2048, "val_loss": 2.123456789, "delta": 0.0, "final_val_loss": 2.123456789,
        "val_bpb": 2.123456789, "tokens_per_sec": 20000.0, "mfu": 0.4, "step_ms": 100.0, "peak_memory": 2**30,
        "status": "finished", "path": str(tmp_path / "a"), "created_at": "2026-11-21T08:00:00Z",
        "val_data": VAL_DATA["digest"], "changes": []}
    assert result["differences"]["seed"] == {"a": 3, "b": 0}
    assert len(result["warnings"]) == 1 and err.splitlines() == [f"warning: {w}" for w in result["warnings"]]


def test_markdown_is_a_table_with_warnings_below_it(tmp_path, capsys):
    make_run(tmp_path / "a|b")
    make_run(tmp_path / "c", preset="gpt2", seed=1)
    out, err = main(capsys, "--out_dir", tmp_path, "--format", "md")
    lines = out.splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines[:4]}) == 1 and lines[1].startswith("| --- |")
    assert "a\\|b" in out and lines[4] == "" and lines[5].startswith("- warning: ") and err == ""


# ---- the command ----

def test_the_default_is_every_run_in_the_runs_directory(tmp_path):
    make_run(tmp_path / "runs" / "a")
    done = command(cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "4L-4H-128D-RoPE-RMS-SwiGLU-PreNorm" in done.stdout


def test_runs_are_selected_by_directory_and_by_glob_each_once(tmp_path, capsys):
    tmp_path /= "odd[0]"
    for name in ("llama-1", "llama-2", "gpt2-1", "odd[1]"):
        make_run(tmp_path / name)
    (tmp_path / "llama-notes.txt").write_text("no run")
    (tmp_path / "latest").symlink_to(tmp_path / "llama-2")
    anywhere = Path(glob.escape(str(tmp_path)))

    def selected(*argv):
        return sorted(run["name"] for run in json.loads(main(capsys, "--format", "json", *argv).out)["runs"])

    assert selected(anywhere / "llama-*") == ["llama-1", "llama-2"]
    assert selected(anywhere / "llama-*", anywhere / "lat*", tmp_path / "llama-1") == ["llama-1", "llama-2"]
    assert selected(tmp_path / "gpt2-1", anywhere / "llama-*") == ["gpt2-1", "llama-1", "llama-2"]
    assert selected(tmp_path / "odd[1]") == ["odd[1]"]
    assert selected("--out_dir", tmp_path) == ["gpt2-1", "llama-1", "llama-2", "odd[1]"]
    assert selected(tmp_path) == ["gpt2-1", "llama-1", "llama-2", "odd[1]"]  # a directory of runs: those in it


def test_latest_takes_the_newest_by_created_at_among_those_selected(tmp_path, capsys):
    for name, day in (("a", 3), ("b", 1), ("c", 2), ("other", 9)):
        make_run(tmp_path / name, created_at=f"2026-11-0{day}T08:00:00Z")
    out = main(capsys, "--latest", 2, "--format", "json", tmp_path / "?").out
    assert sorted(run["name"] for run in json.loads(out)["runs"]) == ["a", "c"]


@pytest.mark.parametrize("argv, message", [
    (["--out_dir", "nowhere"], f"no such directory: nowhere (train one: python {ROOT}/train.py {ROOT}/config/arch_"),
    (["--out_dir", "empty"], f"no runs in empty (train one: python {ROOT}/train.py {ROOT}/config/arch_llama.py "
                             f"{ROOT}/config/size_demo.py --out_dir=empty)"),
    ([], "no such directory: runs"),
    (["nowhere"], "no such run directory: nowhere"),
    (["no*where"], "no such run directory: no*where"),
    (["some/a/run.json"], "no such run directory: some/a/run.json"),
    (["--out_dir", "some", "--format", "xml"], "--format: invalid choice: 'xml'"),
    (["--out_dir", "some", "--sort", "val_los"], "--sort: 'val_los' is unknown (did you mean val_loss?)"),
    (["--out_dir", "some", "--sort", "zzzzz"], "(one of rank, name, architecture"),
    (["--out_dir", "some", "--latest", "0"], "--latest: 0"),
    (["--out_dir", "some", "--latest", "-3"], "--latest: -3"),
    (["--out_dir", "some", "--latest", "few"], "--latest"),
    (["--colour"], "unrecognized arguments: --colour"),
])
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(tmp_path, monkeypatch, capsys, argv, message):
    from blockgpt.errors import exit_on_user_error

    make_run(tmp_path / "some" / "a")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit, exit_on_user_error():
        tool.main(argv)
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_the_command_prints_a_mistake_on_one_line(tmp_path):
    done = command("--sort", "losss", "--out_dir", tmp_path, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and done.stderr.startswith("error: ")


def test_an_unknown_sort_key_is_a_user_error_for_other_code_too():
    with pytest.raises(UserError, match="did you mean mfu"):
        tool.compare([], sort="mfuu")


def test_the_table_prints_on_an_ascii_terminal(tmp_path):
    make_run(tmp_path / "runs" / "größte", losses=(2.0,))
    done = subprocess.run([sys.executable, ROOT / "compare_architectures.py"], cwd=tmp_path, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=60)
    assert done.returncode == 0 and b"gro?te" in done.stdout


def test_the_command_imports_neither_torch_nor_numpy(tmp_path):
    make_run(tmp_path / "runs" / "a")
    code = ("import sys, compare_architectures as tool\n"
            "tool.main([])\n"
            "assert not {'torch', 'numpy'} & set(sys.modules), 'imported'")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ---- repeats and verdicts ----

def make_study(folder, seeds=4, offset=-0.2, **options):
    """A baseline (gpt2) and a variant (llama), evaluated twice; run names end in the seed."""
    for seed in range(seeds):
        noise = (0.03, -0.02, 0.01, -0.01, 0.02)[seed]
        for preset, shift in (("gpt2", 0.0), ("llama", offset + noise / 10)):
            loss = 2 + noise + shift
            make_run(folder / f"{preset}-{seed}", preset=preset, seed=seed, losses=(loss + 0.5, loss),
                     config={"max_iters": 200, **options})
    return folder


def test_repeats_get_a_mean_with_its_interval(tmp_path, capsys):
    make_study(tmp_path)
    out = main(capsys, "--out_dir", tmp_path).out
    assert "95 %" in out and "--baseline NAME" in out
    row = next(line for line in out.splitlines() if line.startswith("4L-4H-128D-AbsPos") and "[" in line)
    assert row.split()[1] == "2.0025" and row.split()[-1] == "4"
    arms = json.loads(main(capsys, "--out_dir", tmp_path, "--format", "json").out)["arms"]
    assert sorted(len(arm["values"]) for arm in arms) == [4, 4]


@pytest.mark.parametrize("name", ["gpt2-1", "4L-4H-128D-AbsPos-LN-NB-GELU-PostNorm", "gpt2-*"])
def test_a_baseline_gives_a_verdict(tmp_path, capsys, name):
    make_study(tmp_path)
    out = main(capsys, "--out_dir", tmp_path, "--baseline", name).out
    assert "noise floor (A/A)" in out and "paired by seed" in out and "tokens, unique tokens not recorded" in out
    assert any(line.startswith("4L-4H") and line.endswith("better") for line in out.splitlines())
    assert all(len(line) <= 120 for line in out.splitlines())
    record = json.loads(main(capsys, "--out_dir", tmp_path, "--baseline", name, "--format", "json").out)
    verdict = record["judgement"]["verdicts"][0]
    assert (record["schema_version"], verdict["verdict"], verdict["difference_n"]) == (1, "better", 4)
    for format in ("md", "csv", "latex"):
        assert "better" in main(capsys, "--out_dir", tmp_path, "--baseline", name, "--format", format).out


def test_diverged_failed_and_broken_runs_stay_in_sight(tmp_path, capsys):
    make_study(tmp_path, seeds=5)
    for i, (name, reason) in enumerate((("llama-4", "NonFiniteError: step 3: the loss is not finite"),
                                        ("llama-3", "OutOfMemoryError: no memory"))):
        document = json.loads((tmp_path / name / "run.json").read_text())
        (tmp_path / name / "run.json").write_text(json.dumps({**document, "status": "failed", "status_reason": reason}))
        (tmp_path / name / "metrics.jsonl").write_bytes(b'{"kind": "step", "step": 1, "tokens": 2048}\n' * (i + 1))
    (tmp_path / "gpt2-9").mkdir()
    (tmp_path / "gpt2-9" / "run.json").write_text("{")
    out = main(capsys, "--out_dir", tmp_path, "--baseline", "gpt2-0").out
    assert "3/5 diverged 1 failed 1" in out and "inconclusive" in out and "broken: run.json is not JSON" in out
    assert "diverged with seed 4: 1 half pair" in out and "failed with seed 3: 1 half pair" in out


def test_horizons_of_the_baseline_give_the_worth(tmp_path, capsys):
    make_study(tmp_path)
    for seed in range(4):
        for steps, loss in ((100, 2.5), (400, 1.7), (800, 1.5)):
            make_run(tmp_path / f"gpt2-{seed}-{steps}", preset="gpt2", seed=seed, losses=(loss + seed / 100,),
                     config={"max_iters": steps})
    out = main(capsys, "--out_dir", tmp_path, "--baseline", "gpt2-0").out
    assert "% fewer tokens, 95 % [" in out and "4 horizons, 4 seeds" in out and "extrapolated" not in out


def test_runs_that_cannot_be_compared_say_why(tmp_path, capsys):
    make_study(tmp_path)
    for seed in range(4):
        make_run(tmp_path / f"long-{seed}", seed=seed, config={"max_iters": 400})
        make_run(tmp_path / f"batch-{seed}", seed=seed, config={"max_iters": 200, "learning_rate": 2e-3},
                 data={"sequences_per_step": 16}, git_commit="abc")
    out = " ".join(main(capsys, "--out_dir", tmp_path, "--baseline", "gpt2-0").out.split())
    assert "not judged: it was planned for 8.192e+05 tokens, the baseline for 4.096e+05" in out
    assert "it differs in sequences per step: 16, the baseline 8; code version: abc, the baseline -" in out


def test_at_reads_between_evaluations_and_warns_of_a_cosine(tmp_path, capsys):
    make_study(tmp_path, lr_schedule="cosine")
    out = " ".join(main(capsys, "--out_dir", tmp_path, "--baseline", "gpt2-0", "--at", "tokens=307200").out.split())
    assert "2.2525" in out and "is in the middle of the cosine of" in out  # halfway from 2.5025 to 2.0025
    out = main(capsys, "--out_dir", tmp_path, "--baseline", "gpt2-0", "--last", "2").out
    assert "2.2525" in out and "cosine" not in out
    out = main(capsys, "--out_dir", tmp_path, "--baseline", "gpt2-0", "--at", "tokens=9e9").out
    assert "unread 4" in out


def test_other_vocabularies_are_judged_by_bits_per_byte(tmp_path, capsys):
    for seed in range(3):
        for preset, vocab, loss in (("gpt2", 320, 2.0), ("llama", 640, 2.5)):
            record = {"kind": "eval", "step": 100, "tokens": 204800, "val_loss": loss, "val_bpb": 3 - loss + seed / 100,
                      "val_data": {"tokens": 1, "digest": str(vocab)}}
            make_run(tmp_path / f"{preset}-{seed}", record, preset=preset, seed=seed, data={"vocab_size": vocab})
    out = main(capsys, "--out_dir", tmp_path, "--baseline", "gpt2-0", "--margin", "0.01").out
    assert "by val_bpb" in out and any(line.endswith("better") for line in out.splitlines())


@pytest.mark.parametrize("argv, message", [
    (["--baseline", "gpt3-0"], "did you mean gpt2-0"), (["--at", "token=1"], "did you mean tokens"),
    (["--at", "tokens=1", "--last", "2"], "no effect with --at"), (["--margin", "0.1"], "no effect without --baseline"),
    (["--level", "2"], "--level: 2.0 is out of range"), (["--baseline", "*"], "different experiments")])
def test_a_mistake_in_a_flag_of_the_judge_is_named(tmp_path, argv, message):
    make_study(tmp_path, seeds=1)
    with pytest.raises(UserError) as error:
        tool.main(["--out_dir", str(tmp_path), *argv])
    assert message in str(error.value)


def disconnect(run):
    """Its disk is not mounted any more."""
    shutil.rmtree(run)
    run.symlink_to("/no/such/disk/a")


CLOSED = [lambda run: run.chmod(0o000), lambda run: (run / "run.json").chmod(0o000), disconnect]


@pytest.mark.parametrize("close", CLOSED)
@pytest.mark.parametrize("named", ["{}", "{}/*", "{}/a {}/b"])
def test_a_run_that_cannot_be_read_is_listed_as_broken_however_it_is_named(tmp_path, close, named):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    close(tmp_path / "a")
    names = named.replace("{}", str(tmp_path)).split()
    text = run_unprivileged(lambda: [(run["name"], run["status"])
                                     for run in tool.load_runs(tool.select_runs(names, ""))])
    found = dict(ast.literal_eval(text))
    assert found["b"] == "finished" and found["a"].startswith("broken: run.json "), found
