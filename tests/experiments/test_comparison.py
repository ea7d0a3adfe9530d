"""The ranking, what runs differ in, and how far the ranking can be trusted."""

import json

import pytest
from run_helpers import FIXTURES, compared, document, evaluation, make_run, names, step

import compare_architectures as tool
from blockgpt.experiments import comparison as comparison_module
from blockgpt.experiments import records
from configurator import KEYS, RENAMED_KEYS

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
    for column in records.COLUMNS:
        assert len(compared(*paths, sort=column.key)["runs"]) == len(compared(*paths, sort=column.header)["runs"]) == 3


def test_runs_of_one_name_are_named_by_their_paths(tmp_path):
    comparison = compared(make_run(tmp_path / "x" / "same", preset="gpt2"), make_run(tmp_path / "y" / "same"))
    assert sorted(comparison["differences"]["norm_position"]) == sorted(names(comparison))
    assert sorted(names(comparison)) == [str(tmp_path / "x" / "same"), str(tmp_path / "y" / "same")]


# ---- differences and comparability ----

def test_only_differences_are_listed(tmp_path):
    comparison = compared(make_run(tmp_path / "a"),
                          make_run(tmp_path / "b", preset="team", config={"learning_rate": 3e-4}))
    assert comparison["differences"] == {"weight_tying": {"a": False, "b": True},
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
    gpu = make_run(tmp_path / "a", hardware={"device": "cuda:0", "name": "NVIDIA H200", "world_size": 8,
                                             "dtype": "bfloat16"})
    assert compared(gpu, make_run(tmp_path / "b"))["differences"] == {
        "device": {"a": "cuda", "b": "cpu"}, "hardware": {"a": "NVIDIA H200", "b": "cpu"},
        "world_size": {"a": 8, "b": 1}, "dtype": {"a": "bfloat16", "b": "float32"}}


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


RENAMED = {"fsdp_replicas": "dp_replicate", "keep_checkpoints": "keep_last", "peer_timeout": "rank_timeout",
           "wandb_log": "tracker", "wandb_project": "tracker_project"}


def test_runs_before_and_after_keys_were_renamed_are_repeats(tmp_path):
    old = json.loads((FIXTURES / "llama-fsdp" / "run.json").read_text())
    config = {RENAMED.get(key, key): value for key, value in old["config"].items() if key != "init_from"}
    new = {**old, "config": {**config, "seed": 7, "resume": "never", "tracker": "none"}}
    assert old["config"].keys() - new["config"].keys() == {*RENAMED, "init_from"}
    runs = [make_run(tmp_path / name, run=json.dumps(run)) for name, run in (("old", old), ("new", new))]
    first, second = map(tool.load_run, runs)
    assert comparison_module.experiment(first) == comparison_module.experiment(second)
    assert "over 2 seeds" in compared(*runs)["notes"][0]


def test_runs_of_earlier_versions_are_read():
    for path in sorted(FIXTURES.iterdir()):
        run, document = tool.load_run(path), json.loads((path / "run.json").read_text())
        assert (run["status"], run["warnings"], run["architecture"]) == ("finished", [], document["arch_name"])
        assert run["val_loss"] == document["results"]["best_val_loss"]


# Keys of a run that is no repeat where they differ. Every other key is in a table of comparison.py, with its reason.
OF_THE_EXPERIMENT = {
    "objective", "init_from", "eval_only", "packing", "tokenizer", "max_iters", "learning_rate",
    "lr_schedule", "warmup_iters", "lr_decay_iters", "min_lr", "weight_decay", "beta1", "beta2", "grad_clip",
    "patience", "eval_interval", "eval_tokens", "skip_spikes", "spike_threshold", "device", "dtype", "tf32", "compile",
} | {name for name, f in KEYS.items() if f.metadata["group"] in ("architecture", "size")} - {"arch_preset"}
OF_THE_ENVIRONMENT = {"world_size", "hardware", "threads", "git_commit", "python", "numpy", "torch"}  # not of a config


def test_every_key_is_compared_or_has_a_reason_not_to_be():
    ignored, may_differ = set(comparison_module.NOT_COMPARED), set(comparison_module.REPEATS_MAY_DIFFER)
    assert not OF_THE_EXPERIMENT & ignored and not OF_THE_EXPERIMENT & may_differ and not ignored & may_differ
    assert OF_THE_EXPERIMENT | ignored | may_differ - OF_THE_ENVIRONMENT == set(KEYS)
    assert all({**comparison_module.NOT_COMPARED, **comparison_module.REPEATS_MAY_DIFFER}.values())


@pytest.mark.grid(5)
@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_can_matter_is_shown_and_makes_other_runs_no_repeats(tmp_path, key):
    """Every key, in one run with an example in place of its value."""
    example = KEYS[key].metadata["example"] if KEYS[key].metadata["example"] is not None else "other"
    model = document()["model"]
    a, b = (tool.load_run(make_run(tmp_path / name, config=values, hardware={},
                                   model=model | {k: v for k, v in values.items() if k in model}))
            for name, values in (("a", {"seed": 1, "batch_size": 2}),
                                 ("b", {"seed": 2, "batch_size": 2, key: example})))
    assert tool.compare([a, b])["differences"].keys() - {"seed"} == {key} - {"seed"} - \
        comparison_module.NOT_COMPARED.keys()
    assert (comparison_module.experiment(a) == comparison_module.experiment(b)) == (key not in OF_THE_EXPERIMENT)


def test_a_key_that_an_old_run_lacks_had_its_default(tmp_path):
    """Absent from the config, the default as it is; absent from the model that was built, what is derived from it."""
    model = document()["model"]
    later = {"config": {}, "model": {k: v for k, v in model.items() if k not in ("d_ff", "qkv_bias", "dropout")}}
    old = make_run(tmp_path / "old", run=json.dumps({**document(), **later}))
    defaults = {name: f.default for name, f in KEYS.items()}
    new = make_run(tmp_path / "new", run=json.dumps({**document(), "config": defaults}))
    assert compared(old, new)["differences"] == {}
    other = make_run(tmp_path / "other", run=json.dumps({**document(), "config": {**defaults, "beta1": 0.5}}))
    assert compared(old, other)["differences"] == {"beta1": {"old": 0.9, "other": 0.5}}
    assert RENAMED_KEYS.keys() == RENAMED.keys()


def test_keys_that_only_follow_from_others_are_not_listed(tmp_path):
    """d_ff and head_dim follow n_embd if no run sets them; they are listed if one does, or if nothing else differs."""
    model, config = document()["model"], {"d_ff": None, "head_dim": None}
    wide = {**model, "n_embd": 256, "d_ff": 2 * model["d_ff"], "head_dim": 64}
    narrow = make_run(tmp_path / "a", config=config)
    derived = compared(narrow, make_run(tmp_path / "b", config={**config, "n_embd": 256}, model=wide))
    assert derived["differences"].keys() == {"n_embd"}
    explicit = compared(narrow, make_run(tmp_path / "c", config={"n_embd": 256, "head_dim": None}, model=wide))
    assert explicit["differences"].keys() == {"n_embd", "d_ff"}
    other_code = compared(narrow, make_run(tmp_path / "d", config=config, model={**model, "d_ff": 7}))
    assert other_code["differences"].keys() == {"d_ff"}


# ---- what an evaluation was made on ----

def val_data(digest, tokens=64):
    return {"val_data": {"tokens": tokens, "digest": digest}}


def test_runs_that_were_evaluated_on_other_data_are_not_ranked_with_the_rest(tmp_path):
    runs = [make_run(tmp_path / name, evaluation(100, loss, **data)) for name, loss, data in (
        ("a", 2.0, {}), ("b", 1.0, val_data("0ther")), ("c", 3.0, {}), ("d", 0.5, val_data("th1rd")))]
    comparison = compared(*runs)
    assert [(run["name"], run["rank"], run["delta"]) for run in comparison["runs"]] == [
        ("a", 1, 0.0), ("c", 2, 1.0), ("d", None, None), ("b", None, None)]
    assert [w for w in comparison["warnings"] if "not ranked" in w] == [
        f"{name}: not ranked, it was evaluated on other validation data (64 tokens, digest {digest}) than a (65,536 "
        "tokens, digest 5eed) (compare such runs apart)" for name, digest in (("b", "0ther"), ("d", "th1rd"))]
    assert "1.0000" in tool.render(comparison)  # its value is shown
    assert names(compared(*runs, sort="name")) == ["a", "c", "b", "d"]


@pytest.mark.parametrize("other", [
    {"config": {"eval_tokens": 64}}, {"data": {"fingerprint": "def"}}, {"config": {"objective": "masked"}},
    {"model": {**document()["model"], "block_size": 512}},
    {"data": {"sources": {"x": {"fingerprint": "def", "share": 1.0}}}}])
def test_runs_that_recorded_no_digest_are_told_apart_by_what_decides_the_windows(tmp_path, other):
    plain = {"val_data": None}
    runs = [make_run(tmp_path / "a", evaluation(1, 2.0, **plain)), make_run(tmp_path / "b", evaluation(1, 1.0, **plain),
                                                                            **other)]
    assert sorted(run["rank"] or 0 for run in compared(*runs)["runs"]) == [0, 1]
    same = make_run(tmp_path / "c", evaluation(1, 2.5, **plain), data={"train_tokens": 7})
    assert [run["rank"] for run in compared(runs[0], same)["runs"]] == [1, 2]


def test_a_source_without_weight_at_the_end_is_not_a_part_of_the_validation_data(tmp_path):
    used, unused = {"fingerprint": "u", "share": 1.0}, {"fingerprint": "x", "share": 0.0}
    runs = [make_run(tmp_path / str(i), evaluation(1, 2.0, val_data=None), data={"sources": sources})
            for i, sources in enumerate(({"a": used}, {"a": used, "b": unused}))]
    assert [run["rank"] for run in compared(*runs)["runs"]] == [1, 2]


def test_an_old_run_ranks_with_a_new_one_whose_run_json_describes_the_same_data(tmp_path):
    old = make_run(tmp_path / "old", evaluation(1, 2.0, val_data=None))
    new, other = make_run(tmp_path / "new"), make_run(tmp_path / "x", evaluation(1, 1.0, **val_data("0ther")))
    assert [run["rank"] for run in compared(old, new)["runs"]] == [1, 2]
    assert sorted(run["rank"] or 0 for run in compared(old, new, other)["runs"]) == [0, 0, 1]  # which one is not known


def test_the_same_validation_data_ranks_whatever_the_training_data(tmp_path):
    comparison = compared(make_run(tmp_path / "a"), make_run(tmp_path / "b", data={"fingerprint": "def"}))
    assert [run["rank"] for run in comparison["runs"]] == [1, 2]
    assert "did not see the same tokens: data fingerprint" in comparison["warnings"][0]


# ---- changes at a resume ----

def resumed(*resumes, launches=()):
    """The sections of a run that was resumed: (step, {key: [before, now]}, forced keys) each."""
    return {"resumes": [{"step": at, "changed": changed, "forced": list(forced), "world_size": 1}
                        for at, changed, *forced in resumes], "launches": list(launches)}


def test_a_change_at_a_resume_is_a_fact_of_the_run_and_makes_it_no_repeat(tmp_path):
    changed = make_run(tmp_path / "a", seed=1, config={"learning_rate": 1e-4}, hardware={},
                       **resumed((40, {"learning_rate": [0.01, 0.0001], "log_interval": [1, 2]})))
    plain = make_run(tmp_path / "b", seed=2, config={"learning_rate": 1e-4})
    comparison = compared(changed, plain)
    assert "a: learning_rate: 0.01 → 0.0001 at step 40" in comparison["notes"]
    assert comparison["differences"]["learning_rate"] == {"a": "0.01 → 0.0001 at step 40", "b": 1e-4}
    assert "log_interval" not in tool.render(comparison)
    assert not any("over 2 seeds" in note for note in comparison["notes"])
    alone = compared(changed)
    assert "a: learning_rate: 0.01 → 0.0001 at step 40" in alone["notes"] and alone["warnings"] == []
    twins = [make_run(tmp_path / name, seed=seed, **resumed((40, {"learning_rate": [0.01, 0.0001]})))
             for name, seed in (("c", 1), ("d", 2))]
    assert any("over 2 seeds" in note for note in compared(*twins)["notes"])  # changed in the same way


def test_a_forced_change_is_a_warning(tmp_path):
    changed = {"seed": [1, 2], "max_iters": [50, 60], "data": ["e" * 64, "f" * 64]}
    forced = make_run(tmp_path / "a", **resumed((40, changed, "seed", "data")))
    comparison = compared(forced, make_run(tmp_path / "b", seed=3))
    assert "a: resume_force changed seed: 1 → 2 at step 40; data: eeeeeeeeeeee → ffffffffffff at step 40" in \
        comparison["warnings"]
    assert "a: max_iters: 50 → 60 at step 40" in comparison["notes"]
    assert not any("over 2 seeds" in note for note in comparison["notes"])


def test_values_that_are_equal_and_of_several_types_keep_their_texts():
    assert [comparison_module.value_text(value) for value in (1, 1.0, True, [1], "1", None, 0, False, 0.0)] == [
        "1", "1.0", "true", "[1]", "1", "-", "0", "false", "0.0"]


def test_a_seed_that_changed_on_the_way_is_no_repeat(tmp_path):
    comparison = compared(make_run(tmp_path / "a", **resumed((40, {"seed": [1, 0]}, "seed"))),
                          make_run(tmp_path / "b", seed=3))
    assert not any("over 2 seeds" in note for note in comparison["notes"])
    assert comparison["differences"]["seed"] == {"a": "1 → 0 at step 40", "b": 3}


def test_a_forced_change_stays_forced_if_the_run_is_resumed_at_the_same_step_again(tmp_path):
    run = make_run(tmp_path / "a", **resumed((40, {"dropout": [0.1, 0.2]}, "dropout"), (40, {"dropout": [0.2, 0.3]})))
    assert compared(run)["warnings"] == ["a: resume_force changed dropout: 0.1 → 0.3 at step 40"]


@pytest.mark.parametrize("resumes, changes", [
    ([(0, {"learning_rate": [1, 2]})], ""),  # nothing was trained before it
    ([(40, {"learning_rate": [1, 2]}), (60, {"learning_rate": [2, 3]})], "1 → 2 at step 40, 2 → 3 at step 60"),
    ([(40, {"learning_rate": [1, 2]}), (40, {"learning_rate": [2, 3]})], "1 → 3 at step 40"),
    ([(40, {"learning_rate": [1, 2]}), (40, {"learning_rate": [2, 1]})], ""),
    ([(40, {"learning_rate": [1, 2]}), (30, {})], "1 → 2 at step 30"),  # the steps 30 to 40 were trained again
    ([(40, {"learning_rate": [1, 2]}), (30, {"learning_rate": [2, 3]})], "1 → 3 at step 30"),
    ([(40, {"learning_rate": [1, 2]}), (0, {})], ""),
    ([(40, {"peer_timeout": [1, 2], "fsdp_replicas": [1, 2]})], "1 → 2 at step 40"),  # by the present names
    ([(40, {"device": ["cuda:1", "cuda:2"]})], ""),
])
def test_changes_are_those_of_the_training_that_counts(tmp_path, resumes, changes):
    run = tool.load_run(make_run(tmp_path / "a", **resumed(*resumes)))
    compared_changes = comparison_module.changes_of(run)
    assert ", ".join(f"{c.before} → {c.now} at step {c.step}" for c in compared_changes) == changes


def test_what_changed_between_launches_is_shown(tmp_path):
    first = {"step": 0, "command": ["train.py"], "git_commit": "a" * 40 + "-dirty",
             "versions": {"torch": "2.12", "platform": "x"},
             "hardware": {"device": "cuda:0", "name": "H100", "dtype": "bfloat16", "world_size": 1}}
    second = {**first, "step": 40, "git_commit": "b" * 40, "versions": {"torch": "2.13", "platform": "y"},
              "hardware": {"device": "cuda:1", "name": "A100", "dtype": "float32", "world_size": 2}}
    run = make_run(tmp_path / "a", hardware=second["hardware"], **resumed(
        (40, {"dtype": ["auto", "float32"], "world_size": [1, 2]}), launches=(first, second)))
    assert compared(run)["notes"] == [
        "a: git_commit: aaaaaaaaaaaa-dirty → bbbbbbbbbbbb at step 40; torch: 2.12 → 2.13 at step 40; hardware: H100 → "
        "A100 at step 40; world_size: 1 → 2 at step 40; dtype: bfloat16 → float32 at step 40"]
    other = make_run(tmp_path / "b", seed=2, hardware=second["hardware"])
    assert compared(run, other)["differences"]["dtype"] == {"a": "bfloat16 → float32 at step 40", "b": "float32"}


def test_resumes_of_a_version_without_launches_come_before_those_with(tmp_path):
    launches = [{"step": 10, "git_commit": "a"}, {"step": 20, "git_commit": "b"}]
    run = tool.load_run(make_run(tmp_path / "a", **resumed((10, {}), (20, {}), launches=launches)))
    assert [(c.step, c.key, c.before, c.now) for c in run["changes"]] == [(20, "git_commit", "a", "b")]


# ---- where a run was made ----

@pytest.mark.parametrize("where", [
    {"config": {"device": "cuda:1"}, "hardware": {"device": "cuda:1", "name": "H100"}},
    {"config": {"out_dir": "/mnt/runs", "data_dir": "/mnt/data", "run_name": "y"}},
    {"config": {"device": "cuda"}, "hardware": {"device": "cuda:0", "name": "H100", "world_size": 8}},
    {"config": {"batch_size": 4, "gradient_accumulation_steps": 2}},
    {"config": {"dataset": "a_copy"}},
    {"launches": [{"step": 0, "git_commit": "abc", "versions": {"torch": "9", "platform": "elsewhere"}}]},
    {"initial_weights": {"path": "/mnt/runs/a/checkpoints/step_00000008", "step": 8, "sha256": "ab"},
     "config": {"init_from": "/mnt/runs/a"}},
])
def test_seeds_that_ran_elsewhere_are_repeats(tmp_path, where):
    hardware = {"device": "cuda:2", "name": "A100", "world_size": 1, "dtype": "float32"}
    common = {"hardware": hardware, "config": {"device": "cuda:2"}}
    if "initial_weights" in where:
        common |= {"initial_weights": {"path": "runs/a", "step": 8, "sha256": "ab"}}
        common["config"]["init_from"] = "runs/a@8"
    other = {**common, **where, "hardware": {**hardware, **where.get("hardware", {})},
             "config": {**common["config"], **where.get("config", {})}}
    comparison = compared(make_run(tmp_path / "a", seed=1, **common), make_run(tmp_path / "b", seed=2, **other))
    assert comparison["warnings"] == [] and any("over 2 seeds" in note for note in comparison["notes"])


def test_the_index_of_a_gpu_that_was_asked_for_does_not_matter(tmp_path):
    runs = [make_run(tmp_path / str(i), hardware={}, seed=i, config={"device": f"cuda:{i}"}) for i in (1, 2)]
    comparison = compared(*runs)
    assert comparison["differences"].keys() == {"seed"} and "over 2 seeds" in comparison["notes"][0]


def test_runs_with_larger_steps_are_no_repeats(tmp_path):
    runs = [make_run(tmp_path / str(size), seed=size, config={"batch_size": size}, data={"sequences_per_step": size})
            for size in (4, 8)]
    assert not any("over 2 seeds" in note for note in compared(*runs)["notes"])


def test_other_initial_weights_of_the_same_path_are_a_difference(tmp_path):
    runs = [make_run(tmp_path / digest, initial_weights={"path": "runs/a", "step": 8, "sha256": digest})
            for digest in ("aa", "bb")]
    assert compared(*runs)["differences"] == {"initial_weights": {"aa": "aa@8", "bb": "bb@8"}}


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


