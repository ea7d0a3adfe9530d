"""Reading a run: its columns, and that no log, however broken, stops the comparison."""

import json
import os
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_helpers import compared, document, evaluation, main, make_run, names, step

import compare_architectures as tool
from blockgpt.experiments import comparison as comparison_module
from blockgpt.experiments import log_values, records

# ---- one run ----

def test_a_run_is_described_by_the_model_that_was_built(tmp_path):
    run = tool.load_run(make_run(tmp_path / "a", preset="llama", config={"normalization": "layernorm"}))
    assert run["architecture"] == "4L-4H-128D-RoPE-RMS-SwiGLU-PreNorm"
    assert run["model"]["normalization"] == comparison_module.compared_values(run)["normalization"] == "rmsnorm"


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


LINES = [b'{"kind": "step", "step": 1}', b'{"kind": "step", "st', b'{"loss": NaN, "norm": 1e999}', b"[{}]", b"3",
         b"null", b'{"a": [1, 2]}', b'{"a": "\xff"}', b'{"a": 1},{"b": 2}', b"\x00", "{\"a\": \"Ż\"}".encode(), b"{}"]


@given(st.lists(st.sampled_from(LINES), max_size=6))
def test_lines_parsed_at_once_are_those_parsed_one_by_one(lines):
    one_by_one = [found for line in lines for found in log_values.parse_lines([line])]
    assert log_values.parse_lines(lines) == one_by_one
    assert log_values.parse_lines([b'{"a": 1},{"b": 2}']) == [None] and log_values.parse_lines(LINES[2:3]) == [
        {"loss": None, "norm": None}]


def test_a_loss_that_is_not_finite_is_never_the_best_and_brings_a_warning(tmp_path):
    path = make_run(tmp_path / "a", evaluation(100, 2.0), '{"kind": "eval", "step": 200, "val_loss": NaN}',
                    '{"kind": "eval", "step": 300, "val_loss": -Infinity}',
                    '{"kind": "eval", "step": 400, "val_loss": -1e999}')
    run = tool.load_run(path)
    assert (run["val_loss"], run["final_val_loss"]) == (2.0, None)
    assert run["warnings"] == ["the last evaluation gave no finite val_loss"]


def test_records_of_abandoned_training_are_dropped_at_the_resume_that_goes_back(tmp_path):
    def resume(at):
        return {"kind": "resume", "step": at, "changed": {}, "forced": []}

    lines = [step(100), evaluation(100, 2.5), step(200), evaluation(200, 1.0), resume(100),  # 200 is abandoned
             step(150), evaluation(150, 2.4), {"kind": "spike", "step": 160}, "garbage", resume(150), step(160),
             evaluation(300, 2.6)]
    path = make_run(tmp_path / "a", *lines)
    run = tool.load_run(path)
    assert (run["val_loss"], run["final_val_loss"], run["tokens"]) == (2.4, 2.6, 300 * 2048)
    log, broken = records.read_log(path / "metrics.jsonl")
    assert broken == 1 and [(r["kind"], r["step"]) for r in log] == [
        ("step", 100), ("eval", 100), ("resume", 100), ("step", 150), ("eval", 150), ("resume", 150), ("step", 160),
        ("eval", 300)]
    ended = make_run(tmp_path / "b", *lines[:5], results={"tokens": 200 * 2048, "best_val_loss": 1.0})
    assert (tool.load_run(ended)["val_loss"], tool.load_run(ended)["tokens"]) == (2.5, 100 * 2048)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=12))
def test_the_log_read_is_that_of_a_run_that_never_went_back(events):
    """Whatever was trained and abandoned: after it, the steps are 1, 2, 3 … up to the newest one."""
    lines, done = [], 0
    for goes_back, amount in events:
        if goes_back:
            done = min(done, amount)
            lines.append({"kind": "resume", "step": done})
        else:
            lines += [{"kind": "step", "step": done + i, "line": len(lines) + i} for i in range(1, amount + 1)]
            done += amount
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        log, _ = records.read_log(path)
    assert [record["step"] for record in log if record["kind"] == "step"] == [*range(1, done + 1)]


def test_an_evaluation_of_eval_only_is_not_read(tmp_path):
    path = make_run(tmp_path / "a", evaluation(100, 2.0), {**evaluation(100, 1.0), "kind": "eval_only"})
    assert (tool.load_run(path)["val_loss"], tool.load_run(path)["final_val_loss"]) == (2.0, 2.0)


def test_evaluations_on_other_data_than_the_last_one_do_not_count(tmp_path):
    other = {"val_data": {"tokens": 64, "digest": "0ther"}}
    run = tool.load_run(make_run(tmp_path / "a", evaluation(100, 1.0, **other), evaluation(200, 2.0)))
    assert run["val_loss"] == 2.0 and run["val_data"].digest == "5eed"
    assert run["warnings"] == ["its first 1 evaluations were made on other validation data and do not count"]
    plain = {"val_data": None}
    changed = {"resumes": [{"step": 100, "changed": {"eval_tokens": [64, 65536]}, "forced": [], "world_size": 1}]}
    old = (evaluation(100, 1.0, **plain), evaluation(200, 2.0, **plain))
    assert tool.load_run(make_run(tmp_path / "b", *old, **changed))["val_loss"] == 2.0
    assert tool.load_run(make_run(tmp_path / "c", *old))["val_loss"] == 1.0
    continued = tool.load_run(make_run(tmp_path / "d", old[0], evaluation(200, 2.0)))  # by a version that records it
    assert (continued["val_loss"], continued["val_data"].digest) == (1.0, "5eed")


@pytest.mark.parametrize("sections", [
    {"resumes": [1]}, {"resumes": [{"step": "x", "changed": {}, "forced": []}]},
    {"resumes": [{"step": 1, "changed": {"a": [1]}, "forced": []}]}, {"resumes": [{"step": 1, "changed": 3}]},
    {"resumes": [{"step": 1, "changed": {}, "forced": []}], "launches": [1, 2]}, {"launches": 3},
    {"val_data": {"tokens": "x"}}, {"val_data": 3}, {"initial_weights": []}])
def test_damaged_records_of_launches_are_a_broken_log(tmp_path, sections):
    assert tool.load_run(make_run(tmp_path / "a", **sections))["status"].startswith("broken: run.json: ")


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


def as_link_to_nowhere(file, **sections):
    """As of a disk that is not mounted."""
    return lambda path: (with_sections(**sections)(path), (path / file).unlink(),
                         (path / file).symlink_to("/no/such/disk"))


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
    "run.json a link to nowhere": (as_link_to_nowhere("run.json"), "run.json is a link to /no/such/disk, which"),
    "metrics a link to nowhere": (as_link_to_nowhere("metrics.jsonl"), "metrics.jsonl is a link to /no/such/disk"),
    "metrics of a running run a link to nowhere": (as_link_to_nowhere(
        "metrics.jsonl", status="running", results={"best_val_loss": 0.1}), "metrics.jsonl is a link to /no/such/disk"),
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


@pytest.mark.grid(8)
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
record_keys = st.sampled_from(["step", *records.RECORD_FIELDS["step"], *records.RECORD_FIELDS["eval"], "memory",
                                "val_data"])
metric_lines = st.builds(lambda kind, fields: json.dumps({**fields, "kind": kind}).encode(),
                         st.sampled_from(["step", "eval", "gradients", "resume"]), st.dictionaries(record_keys, values))
metric_files = st.binary() | st.lists(st.binary(max_size=20) | metric_lines, max_size=6).map(b"\n".join)
section_keys = st.sampled_from(["total", "tokens", "best_val_loss", "val_loss", "seed", "name", "fingerprint"])
sections = values | st.dictionaries(section_keys, values)
launch_keys = st.sampled_from(["step", "changed", "forced", "git_commit", "versions", "hardware"])
launches = st.lists(st.dictionaries(launch_keys, values | st.dictionaries(st.text(max_size=3), values)), max_size=3)
section_names = st.sampled_from([*document(), "results", "resumes", "launches", "val_data", "initial_weights"])
changes = st.dictionaries(section_names, sections | launches, max_size=3)
run_files = st.binary() | changes.map(lambda changed: json.dumps({**document(), **changed}).encode())


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(run_files, metric_files), min_size=1, max_size=3),
       st.sampled_from([column.key for column in records.COLUMNS]))
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


