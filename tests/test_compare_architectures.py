"""compare_architectures: what the table shows, and that no log, however broken, stops it."""

import csv
import glob
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import compare_architectures as tool
import configurator
from blockgpt.errors import UserError
from model_config import get_preset

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests/fixtures/runs"
SIZE = dict(n_layer=4, n_head=4, n_embd=128, block_size=256, vocab_size=320)


def evaluation(step, val_loss, **more):
    return {"kind": "eval", "step": step, "tokens": step * 2048, "val_loss": val_loss, "val_bpb": val_loss, **more}


def step(index, **more):
    return {"kind": "step", "step": index, "tokens": index * 2048, "loss": 3.0, "lr": 1e-3, "grad_norm": 0.5,
            "step_time": 0.1, "tokens_per_sec": 20000, "mfu": 0.4, "memory": {"peak": 2**30}, "elapsed": 1.0, **more}


def document(preset="llama", seed=0, config=(), data=(), **sections):
    model = get_preset(preset, **SIZE).resolve()
    config = {**asdict(model), "seed": seed, "learning_rate": 1e-3, "max_iters": 200, "batch_size": 8,
             "gradient_accumulation_steps": 1, "weight_decay": 0.1, "dtype": "float32", **dict(config)}
    return {"schema_version": 1, "run_name": "x", "status": "finished", "status_reason": None,
            "created_at": "2026-11-21T08:00:00Z", "arch_name": model.arch_name(), "config": config,
            "model": asdict(model),
            "parameters": {"total": 124_300_000, "trainable": 124_300_000, "non_embedding": 85_000_000},
            "hardware": {"device": "cpu", "name": "cpu", "world_size": 1, "dtype": "float32"},
            "data": {"dataset": "pycode", "fingerprint": "abc", "tokens_per_step": 2048, "sequences_per_step": 8,
                     **dict(data)}, **sections}


def make_run(path, *records, losses=(2.5, 2.0), run=None, **options):
    """A run directory; by default a finished one with an evaluation every 100 steps. bytes and str are written raw."""
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(document(**options)) if run is None else run)
    records = records or [step(1), step(100), *(evaluation(100 * i, x) for i, x in enumerate(losses, 1))]
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records]
    (path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return path


def compared(*paths, **options):
    return tool.compare([tool.load_run(path) for path in paths], **options)


def main(capsys, *argv):
    """(stdout, stderr) of the command, which must succeed."""
    tool.main([str(a) for a in argv])
    return capsys.readouterr()


def command(*argv, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, ROOT / "compare_architectures.py", *map(str, argv)], cwd=cwd, env=env,
                          capture_output=True, text=True, timeout=60)


def names(comparison):
    return [run["name"] for run in comparison["runs"]]


# ---- one run ----

def test_a_run_is_described_by_the_model_that_was_built(tmp_path):
    run = tool.load_run(make_run(tmp_path / "a", preset="llama", config={"normalization": "layernorm"}))
    assert run["architecture"] == "4L-4H-128D-RoPE-RMS-SwiGLU-PreNorm"
    assert run["model"]["normalization"] == "rmsnorm" and tool.compared_values(run)["normalization"] == "rmsnorm"


def test_the_best_evaluation_gives_loss_and_bits_and_the_last_step_the_final_loss(tmp_path):
    run = tool.load_run(make_run(tmp_path / "a", evaluation(300, 2.3), evaluation(200, 2.0, val_bpb=2.9),
                                 evaluation(100, 2.5)))
    assert (run["val_loss"], run["val_bpb"], run["final_val_loss"], run["tokens"]) == (2.0, 2.9, 2.3, 300 * 2048)


def test_speeds_are_medians_without_the_first_step_record(tmp_path):
    slow = step(1, tokens_per_sec=1, mfu=0.01, step_time=9.0)
    run = tool.load_run(make_run(tmp_path / "a", slow, step(2, tokens_per_sec=100, mfu=0.2, step_time=0.2),
                                 step(3, tokens_per_sec=300, mfu=0.4, step_time=0.4)))
    assert (run["tokens_per_sec"], run["mfu"]) == (200, pytest.approx(0.3)) and run["step_ms"] == pytest.approx(300)


def test_two_step_records_are_both_counted(tmp_path):
    run = tool.load_run(make_run(tmp_path / "a", step(1, tokens_per_sec=100), step(2, tokens_per_sec=200)))
    assert run["tokens_per_sec"] == 150


def test_peak_memory_is_the_maximum_of_all_steps(tmp_path):
    run = tool.load_run(make_run(tmp_path / "a", step(1, memory={"peak": 5}), step(2, memory={"peak": 7}),
                                 step(3, memory={"peak": 6}), step(4, memory=None)))
    assert run["peak_memory"] == 7


def test_of_a_step_that_a_resumed_run_repeats_the_last_record_counts(tmp_path):
    run = tool.load_run(make_run(tmp_path / "a", step(100), evaluation(100, 1.0), evaluation(200, 2.2),
                                 evaluation(100, 2.4), step(100, tokens_per_sec=7)))
    assert (run["val_loss"], run["final_val_loss"], run["tokens_per_sec"]) == (2.2, 2.2, 7)


def test_a_killed_run_is_derived_from_its_metrics_not_from_stale_results(tmp_path):
    stale = {"step": 100, "tokens": 100 * 2048, "val_loss": 9.0, "best_val_loss": 8.0, "tokens_per_sec": 1.0}
    for name, results in (("missing", None), ("stale", stale)):
        run = tool.load_run(make_run(tmp_path / name, status="running", results=results))
        assert (run["val_loss"], run["final_val_loss"], run["tokens"]) == (2.0, 2.0, 200 * 2048), name
        assert run["tokens_per_sec"] == 20000, name


def test_without_an_evaluation_the_results_are_used_with_a_warning(tmp_path):
    results = {"tokens": 9999999, "val_loss": 2.2, "best_val_loss": 2.1, "best_val_bpb": 3.1, "tokens_per_sec": 11.0,
               "mfu": 0.5, "step_time": 0.25, "peak_memory": 77}
    run = tool.load_run(make_run(tmp_path / "a", {"kind": "gradients", "step": 1}, results=results))
    assert [run[k] for k in ("tokens", "val_loss", "final_val_loss", "val_bpb", "tokens_per_sec", "mfu", "step_ms",
                             "peak_memory")] == [9999999, 2.1, 2.2, 3.1, 11.0, 0.5, 250.0, 77]
    assert run["status"] == "finished" and "run.json" in run["warnings"][0]


def test_unreadable_lines_are_skipped_and_counted(tmp_path):
    path = make_run(tmp_path / "a", evaluation(100, 2.0), b"\xff\xfe\x00garbage", evaluation(200, "1.0"), "[1]", "",
                    {"kind": "eval", "val_loss": 1.0}, {"kind": ["eval"]}, {"kind": "gradients"}, '{"kind": "ev')
    run = tool.load_run(path)
    assert run["val_loss"] == 2.0 and run["status"] == "finished"
    assert run["warnings"] == ["5 unreadable lines of metrics.jsonl skipped"]
    assert "a: 5 unreadable lines of metrics.jsonl skipped" in compared(path)["warnings"]


def test_a_loss_that_is_not_finite_is_never_the_best_and_brings_a_warning(tmp_path):
    path = make_run(tmp_path / "a", evaluation(100, 2.0), '{"kind": "eval", "step": 200, "val_loss": NaN}',
                    '{"kind": "eval", "step": 300, "val_loss": -Infinity}',
                    '{"kind": "eval", "step": 400, "val_loss": -1e999}')
    run = tool.load_run(path)
    assert (run["val_loss"], run["final_val_loss"]) == (2.0, None)
    assert run["warnings"] == ["the last evaluation gave no finite val_loss"]


# ---- unfinished runs ----

def age(path, seconds):
    for file in path.iterdir():
        os.utime(file, (time.time() - seconds,) * 2)


@pytest.mark.parametrize("minutes, status", [(0, "running"), (14, "running"), (16, "running?"), (600, "running?")])
def test_a_run_that_writes_nothing_for_a_quarter_of_an_hour_may_have_been_killed(tmp_path, minutes, status):
    path = make_run(tmp_path / "a", status="running")
    age(path, 60 * minutes)
    assert tool.load_run(path)["status"].split(":")[0] == status


def test_one_recent_file_is_enough_for_a_running_run(tmp_path):
    path = make_run(tmp_path / "a", status="running")
    age(path, 3600)
    os.utime(path / "metrics.jsonl")
    assert tool.load_run(path)["status"] == "running"


def test_a_run_without_an_evaluation_is_listed_after_the_ranked_ones(tmp_path):
    early = make_run(tmp_path / "a", step(1), status="running")
    just_begun = make_run(tmp_path / "b", status="running")
    (just_begun / "metrics.jsonl").unlink()
    comparison = compared(tmp_path / "0", early, just_begun, make_run(tmp_path / "c"))
    assert names(comparison) == ["c", "a", "b", "0"]
    assert [run["rank"] for run in comparison["runs"]] == [1, None, None, None]
    assert [run["status"].split(":")[0] for run in comparison["runs"]] == ["finished", "running", "running", "broken"]


def test_an_interrupted_run_is_ranked_and_says_why_it_stopped(tmp_path):
    path = make_run(tmp_path / "a", status="interrupted", status_reason="SIGTERM\nat step 3")
    comparison = compared(path)
    assert comparison["runs"][0]["rank"] == 1 and comparison["runs"][0]["status"] == "interrupted: SIGTERM at step 3"
    assert "interrupted: SIGTERM at step 3" in tool.render(comparison)


# ---- broken logs ----

def with_sections(**sections):
    return lambda path: (path / "run.json").write_text(json.dumps({**document(), **sections}))


def without(section):
    rest = {key: value for key, value in document().items() if key != section}
    return lambda path: (path / "run.json").write_text(json.dumps(rest))


def with_content(file, content):
    return lambda path: (path / file).write_bytes(content)


def missing(file):
    return lambda path: (path / file).unlink()


def as_directory(file):
    return lambda path: ((path / file).unlink(), (path / file).mkdir())


def as_circular_link(file):
    return lambda path: ((path / file).unlink(), (path / file).symlink_to(path / file))


BROKEN = {
    "no run.json": (missing("run.json"), "run.json is missing"),
    "empty run.json": (with_content("run.json", b" \n"), "run.json is empty"),
    "truncated run.json": (with_content("run.json", json.dumps(document()).encode()[:-40]), "run.json is not JSON"),
    "text": (with_content("run.json", b"hello"), "run.json is not JSON"),
    "binary": (with_content("run.json", bytes(range(256))), "run.json is not JSON"),
    "zeros, as after a power cut": (with_content("run.json", b"\0" * 512), "run.json is not JSON"),
    "too deep": (with_content("run.json", b"[" * 100_000), "run.json is not JSON"),
    "a number of 5000 digits": (with_content("run.json", b'{"a": ' + b"1" * 5000 + b"}"), "run.json is not JSON"),
    "a list": (with_content("run.json", b"[]"), "run.json is not an object"),
    "null": (with_content("run.json", b"null"), "run.json is not an object"),
    "NaN": (with_content("run.json", b"NaN"), "run.json is not an object"),
    "an empty object": (with_content("run.json", b"{}"), "schema_version is missing"),
    "run.json a directory": (as_directory("run.json"), "run.json cannot be read"),
    "run.json a circle of links": (as_circular_link("run.json"), "run.json cannot be read"),
    "newer schema": (with_sections(schema_version=2), "schema_version 2 is newer"),
    "schema a string": (with_sections(schema_version="1"), "schema_version"),
    "schema null": (with_sections(schema_version=None), "schema_version is not a number"),
    "status unknown": (with_sections(status="done"), "status 'done' is unknown"),
    "status null": (with_sections(status=None), "status is not text"),
    "status reason a list": (with_sections(status_reason=[1]), "status_reason is not text"),
    "arch_name a number": (with_sections(arch_name=7), "arch_name is not text"),
    "model a list": (with_sections(model=[1, 2]), "model is not an object"),
    "no model": (without("model"), "model is missing"),
    "config null": (with_sections(config=None), "config is not an object"),
    "no data": (without("data"), "data is missing"),
    "created_at a number": (with_sections(created_at=1763712000), "created_at is not text"),
    "parameters a string": (with_sections(parameters="124M"), "parameters is not an object"),
    "total a string": (with_sections(parameters={"total": "124M"}), "total is 124M"),
    "total a list": (with_sections(parameters={"total": [1]}), "total is [1]"),
    "total true": (with_sections(parameters={"total": True}), "total is true"),
    "total beyond every number": (with_sections(parameters={"total": 10**400}), "total is 1000"),
    "results a list": (with_sections(results=[]), "results is not an object"),
    "a string in results": (with_sections(results={"tokens": "many"}), "tokens is many"),
    "hardware a string": (with_sections(hardware="gpu"), "hardware is not an object"),
    "no metrics": (missing("metrics.jsonl"), "metrics.jsonl is missing"),
    "metrics a directory": (as_directory("metrics.jsonl"), "metrics.jsonl cannot be read"),
    "metrics binary": (with_content("metrics.jsonl", bytes(range(256)) * 9), "not one of its 10 lines"),
    "metrics other JSON": (with_content("metrics.jsonl", b"[1]\n2\nnull\n"), "not one of its 3 lines"),
    "metrics too deep": (with_content("metrics.jsonl", b'{"kind": "eval", "step": ' + b"[" * 100_000),
                         "not one of its 1 lines"),
}


@pytest.mark.parametrize("format", tool.FORMATS)
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_log_is_listed_with_its_reason_after_the_ranked_ones(tmp_path, capsys, name, format):
    damage, reason = BROKEN[name]
    damage(make_run(tmp_path / "a-broken", losses=(0.1,)))
    make_run(tmp_path / "b-sound")
    broken = tool.load_run(tmp_path / "a-broken")
    assert broken["status"].startswith("broken: ") and reason in broken["status"] and broken["val_loss"] is None
    comparison = compared(tmp_path / "a-broken", tmp_path / "b-sound")
    assert names(comparison) == ["b-sound", "a-broken"] and comparison["differences"] == {}
    out, _ = main(capsys, "--out_dir", tmp_path, "--format", format)
    assert out.index("b-sound") < out.index("a-broken") < out.index("broken: ")


@pytest.mark.slow
def test_deep_nesting_never_stops_the_comparison(tmp_path):
    path = make_run(tmp_path / "a")
    sound = (path / "run.json").read_text()
    for depth in range(500, 1000):  # near the end reading fails; where writing would fail is up to the interpreter
        (path / "run.json").write_text(sound.replace('"bias": false', f'"bias": {"[" * depth + "]" * depth}'))
        run = tool.load_run(path)
        assert run["status"] == "finished" or "recursion" in run["status"]


def test_odd_values_are_printed_as_text_without_terminal_escapes(tmp_path, capsys):
    odd = {"bias": [1, {"a": None}], "dropout": "\x1b[2J\nred", "\ud800key": "\udcff", "rope_theta": 10**300}
    make_run(tmp_path / "a", arch_name="arch\x1b]0;x\x07", model={**document()["model"], **odd})
    make_run(tmp_path / "b|c")
    for format in tool.FORMATS:
        out = main(capsys, "--out_dir", tmp_path, "--format", format).out
        assert "\x1b" not in out and out.encode()
    differences = json.loads(main(capsys, "--out_dir", tmp_path, "--format", "json").out)["differences"]
    assert differences["bias"] == {"a": '[1, {"a": null}]', "b|c": False}


def test_a_directory_of_only_broken_logs_is_still_a_table(tmp_path, capsys):
    for i, (damage, _) in enumerate(BROKEN.values()):
        damage(make_run(tmp_path / f"run-{i}"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "not-a-run.txt").write_text("x")
    out = main(capsys, "--out_dir", tmp_path).out
    assert sum("broken: " in line for line in out.splitlines()) == len(BROKEN) + 1
    assert "not-a-run" not in out


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)), max_leaves=8)
record_keys = st.sampled_from(["step", *tool.RECORD_FIELDS["step"], *tool.RECORD_FIELDS["eval"], "memory"])
metric_lines = st.builds(lambda kind, fields: json.dumps({**fields, "kind": kind}).encode(),
                         st.sampled_from(["step", "eval", "gradients"]), st.dictionaries(record_keys, values))
metric_files = st.binary() | st.lists(st.binary(max_size=20) | metric_lines, max_size=6).map(b"\n".join)
section_keys = st.sampled_from(["total", "tokens", "best_val_loss", "val_loss", "seed", "name", "fingerprint"])
sections = values | st.dictionaries(section_keys, values)
changes = st.dictionaries(st.sampled_from([*document(), "results"]), sections, max_size=3)
run_files = st.binary() | changes.map(lambda changed: json.dumps({**document(), **changed}).encode())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(run_files, metric_files), min_size=1, max_size=3),
       st.sampled_from([column.key for column in tool.COLUMNS]))
def test_no_bytes_in_a_log_stop_a_comparison(files, sort):
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for i, (run_json, metrics) in enumerate(files):
            paths.append(make_run(Path(folder) / str(i), metrics, run=""))
            (paths[-1] / "run.json").write_bytes(run_json)
        comparison = compared(*paths, sort=sort)
        assert sorted(names(comparison)) == [str(i) for i in range(len(files))]
        for format in tool.FORMATS:
            text = tool.render(comparison, format)
            assert text.encode() and "Infinity" not in text
        json.loads(tool.render(comparison, "json"), parse_constant=pytest.fail)


# ---- the ranking ----

def test_runs_are_ranked_by_their_best_val_loss_and_measured_against_the_best(tmp_path):
    comparison = compared(make_run(tmp_path / "worst", losses=(3.0,)), make_run(tmp_path / "best", losses=(2.0, 5.0)),
                          make_run(tmp_path / "middle", losses=(2.5, 2.25)))
    assert [(r["name"], r["rank"], r["delta"]) for r in comparison["runs"]] == [
        ("best", 1, 0.0), ("middle", 2, 0.25), ("worst", 3, 1.0)]


@pytest.mark.parametrize("key, expected", [
    ("tokens_per_sec", ["b", "a", "c", "d"]),  # the fastest first
    ("tokens/s", ["b", "a", "c", "d"]),  # as the header spells it
    ("MFU", ["a", "b", "c", "d"]),  # the highest first; unknown last
    ("step_ms", ["a", "c", "b", "d"]),
    ("name", ["a", "b", "c", "d"]),
    ("val_loss", ["c", "a", "b", "d"]),
])
def test_any_column_sorts_and_runs_without_a_loss_stay_last(tmp_path, key, expected):
    for name, loss, speed, mfu, seconds in (("a", 2.1, 20, 0.5, 0.1), ("b", 2.2, 30, 0.4, 0.3),
                                            ("c", 2.0, 10, None, 0.2)):
        make_run(tmp_path / name, step(1, tokens_per_sec=speed, mfu=mfu, step_time=seconds), evaluation(1, loss))
    make_run(tmp_path / "d", step(1, tokens_per_sec=99, mfu=0.9, step_time=0.01))
    comparison = compared(*sorted(tmp_path.iterdir()), sort=key)
    assert names(comparison) == expected
    assert {r["name"]: r["rank"] for r in comparison["runs"]} == {"c": 1, "a": 2, "b": 3, "d": None}


def test_every_column_can_be_sorted_by(tmp_path):
    paths = [make_run(tmp_path / "a"), make_run(tmp_path / "b", step(1)), tmp_path / "none"]
    for column in tool.COLUMNS:
        assert len(compared(*paths, sort=column.key)["runs"]) == len(compared(*paths, sort=column.header)["runs"]) == 3


def test_runs_of_one_name_are_named_by_their_paths(tmp_path):
    comparison = compared(make_run(tmp_path / "x" / "same", preset="gpt2"), make_run(tmp_path / "y" / "same"))
    assert sorted(comparison["differences"]["norm_position"]) == sorted(names(comparison))
    assert sorted(names(comparison)) == [str(tmp_path / "x" / "same"), str(tmp_path / "y" / "same")]


# ---- differences and comparability ----

def test_only_differences_are_listed(tmp_path):
    comparison = compared(make_run(tmp_path / "a"),
                          make_run(tmp_path / "b", preset="team", config={"learning_rate": 3e-4}))
    assert comparison["differences"] == {"arch_preset": {"a": "llama", "b": "team"},
                                         "weight_tying": {"a": False, "b": True},
                                         "learning_rate": {"a": 1e-3, "b": 3e-4}}
    table = tool.render(comparison)
    assert "weight_tying   false" in table and "normalization" not in table and "batch_size" not in table


def test_config_keys_that_are_not_of_the_experiment_are_not_listed(tmp_path):
    comparison = compared(make_run(tmp_path / "a", config={"log_interval": 1}), make_run(tmp_path / "b"))
    assert comparison["differences"] == {}


def test_an_integer_equals_a_float_of_the_same_value(tmp_path):
    model = document()["model"]
    assert compared(make_run(tmp_path / "a", model={**model, "dropout": 0}),
                    make_run(tmp_path / "b", model={**model, "dropout": 0.0}))["differences"] == {}


def test_a_key_that_only_one_run_has_is_a_difference(tmp_path):
    new = make_run(tmp_path / "a", model={**document()["model"], "new_key": True})
    assert compared(new, make_run(tmp_path / "b"))["differences"] == {"new_key": {"a": True, "b": None}}


def test_different_hardware_is_listed(tmp_path):
    gpu = make_run(tmp_path / "a", hardware={"name": "NVIDIA H200", "world_size": 8, "dtype": "bfloat16"})
    assert compared(gpu, make_run(tmp_path / "b"))["differences"] == {
        "hardware": {"a": "NVIDIA H200", "b": "cpu"}, "world_size": {"a": 8, "b": 1},
        "dtype": {"a": "bfloat16", "b": "float32"}}


@pytest.mark.parametrize("what, other", [
    ("data fingerprint", dict(data={"fingerprint": "def"})),
    ("seed", dict(seed=1)),
    ("tokens seen", dict(losses=(2.4, 2.3, 2.2))),
    ("block_size", dict(model={**document("gpt2")["model"], "block_size": 512})),
    ("sequences per step", dict(data={"sequences_per_step": 16})),
])
def test_a_warning_names_why_runs_did_not_see_the_same_tokens(tmp_path, what, other):
    comparison = compared(make_run(tmp_path / "a"), make_run(tmp_path / "b", **{"preset": "gpt2", **other}))
    assert len(comparison["warnings"]) == 1, comparison["warnings"]
    assert f"did not see the same tokens: {what} differs" in comparison["warnings"][0]
    assert " in a; " in comparison["warnings"][0] and comparison["warnings"][0].endswith(" in b")
    assert not any("one seed" in note for note in comparison["notes"])


def test_equal_tokens_bring_no_warning_but_a_note_about_one_seed(tmp_path):
    comparison = compared(make_run(tmp_path / "a"), make_run(tmp_path / "b", preset="gpt2"))
    assert comparison["warnings"] == [] and len(comparison["notes"]) == 1
    assert "one seed each" in comparison["notes"][0] and "noise" in comparison["notes"][0]


def test_unranked_runs_bring_no_warning(tmp_path):
    comparison = compared(make_run(tmp_path / "a"),
                          make_run(tmp_path / "b", step(1), seed=7, data={"fingerprint": "z"}))
    assert comparison["warnings"] == comparison["notes"] == []


def test_the_spread_over_the_seeds_of_one_architecture_is_printed(tmp_path):
    paths = [make_run(tmp_path / f"{preset}-{seed}", preset=preset, seed=seed, losses=(loss,),
                      config={"run_name": f"{preset}-{seed}", "init_from": "resume" if seed else "scratch"})
             for preset, losses in (("llama", (2.0, 2.2, 2.1)), ("gpt2", (2.3, 2.25, 2.4)))
             for seed, loss in enumerate(losses)]
    comparison = compared(*paths)
    assert comparison["warnings"] == []  # the same three seeds on either side
    assert comparison["notes"] == [
        "4L-4H-128D-RoPE-RMS-SwiGLU-PreNorm: best val loss 2.0000..2.2000 over 3 seeds "
        "(n=3: llama-0, llama-2, llama-1)",
        "4L-4H-128D-AbsPos-LN-NB-GELU-PostNorm: best val loss 2.2500..2.4000 over 3 seeds "
        "(n=3: gpt2-1, gpt2-0, gpt2-2)"]


RENAMED = {"fsdp_replicas": "dp_replicate", "keep_checkpoints": "keep_last", "peer_timeout": "rank_timeout"}


def test_runs_before_and_after_keys_were_renamed_are_repeats(tmp_path):
    old = json.loads((FIXTURES / "llama-fsdp" / "run.json").read_text())
    config = {RENAMED.get(key, key): value for key, value in old["config"].items() if key != "init_from"}
    new = {**old, "config": {**config, "seed": 7, "resume": "never"}}
    assert old["config"].keys() - new["config"].keys() == {*RENAMED, "init_from"}
    runs = [make_run(tmp_path / name, run=json.dumps(run)) for name, run in (("old", old), ("new", new))]
    first, second = map(tool.load_run, runs)
    assert tool.experiment(first) == tool.experiment(second)
    assert "over 2 seeds" in compared(*runs)["notes"][0]


def test_runs_of_earlier_versions_are_read():
    for path in sorted(FIXTURES.iterdir()):
        run, document = tool.load_run(path), json.loads((path / "run.json").read_text())
        assert (run["status"], run["warnings"], run["architecture"]) == ("finished", [], document["arch_name"])
        assert run["val_loss"] == document["results"]["best_val_loss"]


# Keys of a config that make another experiment. Every key must be here or in NOT_THE_EXPERIMENT.
OF_THE_EXPERIMENT = {
    "objective", "init_from", "eval_only", "dataset", "dataset_schedule", "max_epochs", "packing", "tokenizer",
    "batch_size", "gradient_accumulation_steps", "max_iters", "learning_rate", "lr_schedule", "warmup_iters",
    "lr_decay_iters", "min_lr", "weight_decay", "beta1", "beta2", "grad_clip", "patience", "eval_interval",
    "eval_tokens", "skip_spikes", "spike_threshold", "device", "dtype", "tf32", "compile", "mfu_peak", "dry_run",
    "dry_run_gpus", "dry_run_gpu", "dry_run_mfu",
}


def test_every_config_key_is_of_the_experiment_or_not():
    keys = {f.name for f in fields(configurator.Config) if f.metadata}
    former = {*RENAMED}
    assert keys == OF_THE_EXPERIMENT | (set(tool.NOT_THE_EXPERIMENT) - former)
    assert not OF_THE_EXPERIMENT & set(tool.NOT_THE_EXPERIMENT) and not former & keys


def test_runs_are_ranked_by_the_criterion_that_they_record(tmp_path, capsys):
    accuracy = {"metric": "accuracy", "more_is_better": True}
    paths = [make_run(tmp_path / name, step(1), *(evaluation(i, 3.0, accuracy=value) for i, value in enumerate(values)),
                      criterion=accuracy) for name, values in (("a", (0.2, 0.5, 0.4)), ("b", (0.6, 0.1)))]
    other = make_run(tmp_path / "c")
    comparison = compared(*paths, other)
    b, a, c = comparison["runs"]
    assert (b["name"], b["rank"], b["accuracy"], b["final_accuracy"], b["delta"]) == ("b", 1, 0.6, 0.1, 0)
    assert (a["name"], a["accuracy"], a["delta"]) == ("a", 0.5, pytest.approx(-0.1)) and a["val_bpb"] is not None
    assert (c["name"], c["rank"], c["delta"]) == ("c", None, None)
    assert "c: not ranked, its criterion is val_loss and not accuracy (compare such runs apart)" in \
        comparison["warnings"]
    table = tool.render(comparison)
    assert "accuracy" in table.splitlines()[0] and "val loss" not in table.splitlines()[0]
    as_json = json.loads(tool.render(comparison, "json"))
    assert as_json["criterion"] == accuracy and as_json["runs"][0]["accuracy"] == 0.6
    assert names(compared(*paths, other, sort="final_accuracy")) == ["a", "b", "c"]
    assert "best accuracy" in compared(paths[0], make_run(tmp_path / "d", evaluation(2, 3.0, accuracy=0.1), seed=1,
                                                          criterion=accuracy))["notes"][0]


@pytest.mark.parametrize("criterion", [{"metric": 3, "more_is_better": True}, {"metric": "x"},
                                       {"metric": "tokens", "more_is_better": True}, {"metric": "\x1b"}])
def test_a_criterion_that_cannot_be_used_is_a_broken_log(tmp_path, criterion):
    assert tool.load_run(make_run(tmp_path / "a", criterion=criterion))["status"].startswith(
        "broken: run.json: criterion ")


def test_unequal_seeds_are_a_warning(tmp_path):
    comparison = compared(make_run(tmp_path / "a0"), make_run(tmp_path / "a1", seed=1),
                          make_run(tmp_path / "b", preset="gpt2"))
    assert [w for w in comparison["warnings"] if "seed differs: 0 in a0, b; 1 in a1" in w]
    assert len(comparison["notes"]) == 1 and "over 2 seeds (n=2: a0, a1)" in comparison["notes"][0]


def test_runs_with_different_learning_rates_are_not_repeats(tmp_path):
    comparison = compared(make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1, config={"learning_rate": 1.0}))
    assert comparison["notes"] == [] and "seed differs" in comparison["warnings"][0]


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
    assert [tool.human_count(n) for n in (0, 999, 17_230.4, 124_300_000, 999_999, 1.5e9, 3e12)] == [
        "0", "999", "17.23k", "124.3M", "1M", "1.5B", "3T"]


def test_csv_parses_back_and_warns_on_stderr(tmp_path, capsys):
    make_run(tmp_path / "a,\"b", losses=(2.123456789,), seed=3)
    make_run(tmp_path / "c", preset="gpt2", losses=(2.5,))
    (tmp_path / "d").mkdir()
    out, err = main(capsys, "--out_dir", tmp_path, "--format", "csv")
    rows = list(csv.DictReader(out.splitlines()))
    assert list(rows[0]) == [c.key for c in tool.COLUMNS]
    assert [row["name"] for row in rows] == ["a,\"b", "c", "d"]
    assert float(rows[0]["val_loss"]) == 2.123456789 and int(rows[0]["parameters"]) == 124_300_000
    assert rows[2]["val_loss"] == "" and rows[2]["status"] == "broken: run.json is missing"
    assert err.startswith("warning: these runs did not see the same tokens: seed")


def test_json_parses_back_with_raw_numbers_differences_and_warnings(tmp_path, capsys):
    make_run(tmp_path / "a", losses=(2.123456789,), seed=3)
    make_run(tmp_path / "b", preset="gpt2", losses=(2.5,))
    out, err = main(capsys, "--out_dir", tmp_path, "--format", "json")
    result = json.loads(out)
    assert set(result) == {"criterion", "runs", "differences", "warnings", "notes"}
    assert result["criterion"] == {"metric": "val_loss", "more_is_better": False}
    assert result["runs"][0] == {
        "rank": 1, "name": "a", "architecture": "4L-4H-128D-RoPE-RMS-SwiGLU-PreNorm", "parameters": 124_300_000,
        "tokens": 100 * 2048, "val_loss": 2.123456789, "delta": 0.0, "final_val_loss": 2.123456789,
        "val_bpb": 2.123456789, "tokens_per_sec": 20000.0, "mfu": 0.4, "step_ms": 100.0, "peak_memory": 2**30,
        "status": "finished", "path": str(tmp_path / "a"), "created_at": "2026-11-21T08:00:00Z"}
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
    (["--out_dir", "nowhere"], "no such directory: nowhere (train one: python train.py config/arch_llama.py"),
    (["--out_dir", "empty"], "no runs in empty (train one: python train.py config/arch_llama.py config/size_demo.py)"),
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
    assert done.returncode == 0 and b"gr??te" in done.stdout


def test_the_command_imports_neither_torch_nor_numpy(tmp_path):
    make_run(tmp_path / "runs" / "a")
    code = ("import sys, compare_architectures as tool\n"
            "tool.main([])\n"
            "assert not {'torch', 'numpy'} & set(sys.modules), 'imported'")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
