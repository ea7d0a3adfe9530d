"""A study as it is declared: its grid, the order of its runs, and what their ids depend on."""

import dataclasses
import itertools
import json

import pytest
from conftest import ROOT
from dataset_helpers import refusal
from hypothesis import given
from hypothesis import strategies as st

from blockgpt.config_fields import example_value
from blockgpt.errors import UserError
from blockgpt.experiments.comparison import NOT_COMPARED
from blockgpt.experiments.sweeps.identity import NOT_EXECUTED, Program, code_version, run_id, source_stamp
from blockgpt.experiments.sweeps.plan import (
    COPY,
    OF_THE_RUNNER,
    Plan,
    Planner,
    base_values,
    grid,
    parse_vary,
    plan_record,
    pooled_spread,
    read_plan,
    split_values,
    with_control,
    write_plan,
)
from configurator import KEYS, TYPES, load_config
from tools.ablate import build_parser, declared_plan, own_and_rest, seeds_of

PROGRAM = Program(load_config, KEYS, TYPES, "version")
BASE = ("config/arch_gpt2.py", "config/size_tiny.py", "--max_iters=100")
NORMS = {"ln": {}, "rms": {"normalization": "rmsnorm"}}


def plan(**fields):
    return Plan(**{"name": "x", "base": BASE, "variants": NORMS, "baseline": "ln", **fields})


def planner(**fields):
    return Planner(plan(**fields), PROGRAM)


def declared(*argv):
    return declared_plan(*own_and_rest([*BASE, *argv]), PROGRAM)


def plan_file(tmp_path, text):
    path = tmp_path / "study.py"
    path.write_text(text)
    return str(path)


# ---- declaring


def test_a_grid_has_every_combination_once_and_the_base_is_its_baseline():
    study = declared("--vary", "normalization=rmsnorm,layernorm_nobias",
                     "--vary=position_encoding=learned_absolute,rope")
    assert list(study.variants) == ["rmsnorm+learned_absolute", "rmsnorm+rope", "layernorm_nobias+learned_absolute",
                                    "layernorm_nobias+rope"]
    assert study.baseline == "layernorm_nobias+learned_absolute"
    assert study.variants["rmsnorm+rope"] == {"normalization": "rmsnorm", "position_encoding": "rope"}


def test_one_at_a_time_departs_from_the_base_in_one_key_each():
    study = declared("--vary=normalization=rmsnorm,layernorm_nobias", "--vary=beta2=0.95,0.99", "--one_at_a_time")
    assert study.variants == {"baseline": {}, "rmsnorm": {"normalization": "rmsnorm"}, "beta2=0.95": {"beta2": 0.95}}


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=3, unique=True), min_size=1, max_size=3))
def test_a_grid_is_the_product(values):
    vary = {f"k{i}": v for i, v in enumerate(values)}
    variants, baseline = grid(vary, {name: v[-1] for name, v in vary.items()})
    assert [tuple(keys.values()) for keys in variants.values()] == list(itertools.product(*values))
    assert variants[baseline] == {name: v[-1] for name, v in vary.items()}


@given(st.lists(st.text("ab{}[](),'\" 1", max_size=8)))
def test_values_that_need_no_comma_are_split_and_joined(texts):
    assert ",".join(split_values(",".join(texts))) == ",".join(texts)


def test_a_comma_in_brackets_separates_nothing():
    assert split_values("{'a': 1, 'b': 2},code,(1,2)") == ["{'a': 1, 'b': 2}", "code", "(1,2)"]
    assert parse_vary(["dataset={'a': 0.5, 'b': 0.5},pycode"], PROGRAM) == {"dataset": [{"a": 0.5, "b": 0.5}, "pycode"]}


@pytest.mark.parametrize("argv, message", [
    ([], "nothing varies: --vary key=value,value"),
    (["--vary=norm=a,b"], "--vary: norm: no such key (did you mean "),
    (["--vary=seed=1,2"], "--vary: seed: cannot vary: --seeds sets it"),
    (["--vary=log_interval=1,2"], "--vary: log_interval: cannot vary: it does not change what a run learns"),
    (["--vary=norm_position"], "'norm_position' is not key=value,value"),
    (["--vary=norm_position=pre,front"], "--vary norm_position=pre,front: norm_position: 'front' is unknown"),
    (["--vary=norm_position=pre,pre"], "norm_position has a value twice"),
    (["--vary=n_head=2,4", "--vary=n_head=1,2"], "n_head is given twice"),
    (["--vary=norm_position=pre,post", "--seeds=many"], "--seeds: 'many' is neither a number of seeds nor a list"),
    (["--vary=norm_position=pre,post", "--seeds=1,1"], "seeds: (1, 1) is out of range"),
    (["--vary=norm_position=pre,post", "--level=0.7"], "level: 0.7 is out of range"),
    (["--vary=norm_position=pre,post", "--margin=0"], "margin: 0.0 is out of range, must be above 0"),
    (["--vary=norm_position=pre,post", "--lr_sweep=1e-3"], "at least two learning rates"),
    (["--vary=norm_position=pre,post", "--horizons=0"], "horizons: (0.0,) is out of range"),
    (["--vary=norm_position=pre,post", "--baseline=x"], "baseline: 'x' is out of range, must be one of pre, post"),
    (["--vary=norm_position=pre,post", "--run_name=x"], "run_name: must not be set in a study"),
    (["--vary=norm_position=pre,post", "--seed=3"], "seed: must not be set in a study: --seeds sets it"),
    (["--vary=norm_position=pre,post", "--halving"], "--halving: needs --budget, or --judge=N"),
    (["--vary=norm_position=pre,post", "--workers=0"], "--workers: 0 is out of range"),
    (["--vary=norm_position=pre,post", "--study=../x"], "name: '../x' is out of range"),
])
def test_a_mistake_is_one_line(argv, message):
    assert message in refusal(declared, *argv, error=UserError)


@pytest.mark.parametrize("text, message", [
    ("seed = 3\nvary = {}", "seed: no such field of a plan (did you mean seeds?)"),
    ("variants = {'a': {}, 'b': {'n_hed': 2}}", "n_hed: no such key (did you mean n_head?)"),
    ("variants = ['a']", "variants: ['a'] is list, not dict"),
    ("variants = {'a': 3}", "'a' is not a name with a dict of keys"),
    ("vary = {'n_head': 2}", "vary: 'n_head' has no list of values"),
    ("vary = {'n_head': [1, 2]}\nvariants = {'a': {}, 'b': {}}", "vary: is incompatible with variants"),
    ("vary = {'n_head': [1, 2]}\nseeds = [1, 2.5]", "seeds: 2.5 is float, not int"),
    ("vary = {'n_head': [1, 2]}\nsizes = {'s': 3}", "'s' is not a name with a list of words or a dict"),
    ("vary = {'n_head': [1, 2]}\ncontrol = 1", "control: 1 is int, not bool"),
    ("1 / 0", "line 1: ZeroDivisionError"),
])
def test_a_mistake_in_a_plan_file_names_the_file(tmp_path, text, message):
    path = plan_file(tmp_path, text)
    found = refusal(declared, f"--plan={path}", error=UserError)
    assert found.startswith(path) and message in found


def test_a_plan_file_declares_everything_and_flags_override_it(tmp_path):
    path = plan_file(tmp_path, """
question = "is it?"
base = ["config/arch_llama.py"]
variants = {"a": {}, "b": {"dropout": 0.1}}
sizes = {"s": {"n_layer": 2}, "t": ["config/size_tiny.py", "--max_iters=9"]}
seeds = [4, 5]
horizons = [0.5, 2]
margin = 0.01
level = 0.1
""")
    study = declared_plan(*own_and_rest([f"--plan={path}", "--margin=0.02", "--seeds=2", "--max_iters=7"]), PROGRAM)
    assert study == Plan("study", ("config/arch_llama.py",), {"a": {}, "b": {"dropout": 0.1}}, "a", "is it?",
                         {"s": ("--n_layer=2",), "t": ("config/size_tiny.py", "--max_iters=9")}, (1, 2), (0.5, 2), 0.02,
                         0.1, overrides=("--max_iters=7",))
    config = Planner(study, PROGRAM).config("b", "t")
    assert (config.max_iters, config.model.dropout, config.model.n_embd) == (7, 0.1, 64)


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.py")), ids=lambda path: path.stem)
def test_the_plans_of_the_project_can_be_read(path):
    study = declared_plan(*own_and_rest([f"--plan={path}"]), PROGRAM)
    assert len(study.sizes) >= 2 and len(study.seeds) >= 3 and study.margin and study.question
    assert read_plan(str(path), ROOT)
    Planner(study, PROGRAM).judged()


def test_every_flag_of_the_command_is_no_key_of_train_but_for_those_it_takes_over():
    own = {name.lstrip("-") for action in build_parser()._actions for name in action.option_strings}
    assert own & KEYS.keys() == {"dry_run", "out_dir"}
    assert OF_THE_RUNNER.keys() <= KEYS.keys()


def test_seeds_are_counted_or_listed():
    assert seeds_of("3") == (1, 2, 3)
    assert seeds_of("7,") == (7,)
    assert seeds_of("4,9") == (4, 9)


# ---- the order of the runs


def test_pairs_are_next_to_each_other_in_alternating_order():
    runs = planner(sizes={"s": (), "t": ("--n_layer=1",)}, seeds=(1, 2, 3)).judged()
    assert [(run.seed, run.size, run.variant) for run in runs] == [
        (1, "s", "ln"), (1, "s", "rms"), (1, "t", "ln"), (1, "t", "rms"),
        (2, "s", "rms"), (2, "s", "ln"), (2, "t", "rms"), (2, "t", "ln"),
        (3, "s", "ln"), (3, "s", "rms"), (3, "t", "ln"), (3, "t", "rms")]
    assert len({run.block for run in runs}) == 6


def test_horizons_are_the_baselines_alone_and_come_last():
    runs = planner(horizons=(0.5, 1, 2), seeds=(1, 2)).judged()
    assert [(run.variant, run.horizon, run.steps, run.seed) for run in runs[4:]] == [
        ("ln", 0.5, 50, 1), ("ln", 0.5, 50, 2), ("ln", 2, 200, 1), ("ln", 2, 200, 2)]
    assert {run.purpose for run in runs[4:]} == {"horizon"}
    assert len(runs) == 8


def test_another_variant_or_seed_adds_runs_and_changes_none():
    few = planner(seeds=(1, 2)).judged()
    many = planner(seeds=(1, 2, 3), variants={**NORMS, "post": {"norm_position": "pre"}}).judged()
    assert {run.id for run in few} < {run.id for run in many}
    assert {run.name for run in few} < {run.name for run in many}
    assert len(many) == 9


def test_every_variant_gets_the_same_tries_on_seeds_that_judge_nothing():
    study = planner(lr_sweep=(1e-3, 3e-3), tuning_seeds=2, seeds=(1, 2))
    tries = {}
    for run in study.tuning():
        tries.setdefault(run.variant, []).append((run.seed, load_config(run.words).learning_rate, run.steps))
    assert tries["ln"] == tries["rms"] and len(tries["ln"]) == 4
    screening = study.screening(["ln", "rms"], 0.5)
    judged = study.judged(learning_rates={("ln", "base"): 1e-3, ("rms", "base"): 3e-3})
    seeds = [{run.seed for run in runs} for runs in (study.tuning(), screening, judged)]
    assert not (seeds[0] & seeds[1] or seeds[0] & seeds[2] or seeds[1] & seeds[2])
    assert {run.variant: load_config(run.words).learning_rate for run in judged} == {"ln": 1e-3, "rms": 3e-3}
    assert {run.steps for run in screening} == {50}


def test_two_variants_that_are_one_run_are_refused():
    same = {"a": {}, "b": {"normalization": "layernorm_nobias"}}
    assert "variants a and b are the same run" in refusal(planner(variants=same, baseline="a").judged, error=UserError)


def test_a_mistake_of_a_variant_names_it():
    wrong = planner(variants={"ln": {}, "three": {"n_head": 3}})
    assert refusal(wrong.judged, error=UserError).startswith("variant three: --n_head: 3 does not divide")


def test_horizons_refuse_a_decay_that_does_not_follow_them():
    study = planner(base=(*BASE, "--lr_decay_iters=90"), horizons=(0.5,))
    assert "lr_decay_iters=90 does not follow max_iters" in refusal(study.judged, error=UserError)


def test_the_control_has_a_copy_with_runs_of_its_own_and_shuffled_tokens(tmp_path):
    study = Planner(with_control(plan(control=True)), PROGRAM, control_data=tmp_path)
    runs = {run.variant: run for run in study.judged() if run.seed == 1}
    assert list(runs) == ["ln", "rms", COPY, "shuffled-tokens"]
    assert runs[COPY].words == runs["ln"].words and runs[COPY].id != runs["ln"].id
    shuffled = load_config(runs["shuffled-tokens"].words)
    assert (shuffled.dataset, shuffled.data_dir) == ("pycode-shuffled", str(tmp_path))
    assert "is the name of a variant of --control" in refusal(
        with_control, plan(variants={**NORMS, COPY: {}}, control=True), error=UserError)


# ---- ids


def test_an_id_depends_on_every_key_that_is_compared_and_on_no_other(tmp_path):
    base = load_config([*BASE, f"--data_dir={tmp_path}", "--d_ff=128", "--head_dim=16"])
    model_keys = {f.name for f in dataclasses.fields(base.model)}

    def identifier(name, value):
        config = dataclasses.replace(base)
        if name in model_keys:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, **{name: value}))
        else:
            object.__setattr__(config, name, value)  # in any combination, also one that is refused
        return run_id(config, PROGRAM, {})

    depends, same, refused = set(), set(), set()
    for name, f in KEYS.items():
        own = base.flat()[name]
        values = [example_value(f, TYPES[name]), *(f.metadata["choices"] or ()), f.default]
        others = [value for value in values if value is not None and value != own]
        if not others:
            continue  # the only value
        try:  # a value may be what auto stands for
            ids = {identifier(name, value) for value in (own, *others)}
            (same if len(ids) == 1 else depends).add(name)
        except UserError:
            refused.add(name)
    assert not refused & set(NOT_COMPARED)
    assert len(refused) < 10, refused
    assert same == set(NOT_COMPARED) & (same | depends)
    assert len(same) > 15 and len(depends) > 60


def test_an_id_depends_on_code_data_and_environment_but_not_on_how_a_default_is_spelled(tmp_path):
    def identifier(*flags, program=PROGRAM, environment=(), salt=""):
        return run_id(load_config([*BASE, f"--data_dir={tmp_path}", *flags]), program, dict(environment), salt)

    base = identifier()
    assert identifier("--d_ff=256", "--n_kv_head=2", "--normalization=layernorm_nobias") == base
    assert identifier(program=PROGRAM._replace(version="other")) != base
    assert identifier(environment={"threads": 2}) != base
    assert identifier(salt="copy") != base
    (tmp_path / "pycode").mkdir()
    (tmp_path / "pycode/meta.json").write_text(json.dumps({"dtype": "uint16", "vocab_size": 257, "splits": {"a": 1}}))
    with_data = identifier()
    assert with_data != base
    (tmp_path / "pycode/meta.json").write_text(json.dumps({"dtype": "uint16", "vocab_size": 257, "splits": {"a": 2}}))
    assert identifier() not in (base, with_data)


def test_the_version_of_the_code_is_that_of_what_a_run_executes(tmp_path):
    def version(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return code_version(tmp_path, packages=())

    base = version({"train.py": "x = 1\n", "blockgpt/data/loader.py": "y = 1\n", "docs/a.md": "a",
                    "blockgpt/experiments/sweeps/plan.py": "z = 1\n", "tools/a.py": "a = 1\n"})
    assert version({"train.py": "x = 1  # a comment\n\n"}) == base
    assert version({"blockgpt/experiments/sweeps/plan.py": "z = 2\n", "tools/a.py": "", "docs/a.md": "b"}) == base
    other = version({"blockgpt/data/loader.py": "y = 2\n"})
    assert other != base
    assert version({"blockgpt/data/more/deep.py": "y = 2\n"}) != other
    assert code_version(ROOT) != code_version(ROOT, packages=())
    for name in NOT_EXECUTED:
        assert (ROOT / name).exists()


def test_a_run_whose_config_file_changes_is_another_run(tmp_path):
    config = tmp_path / "size.py"
    config.write_text("n_layer = 1\n")
    study = planner(base=(*BASE, str(config)))
    run = study.judged()[0]
    study.check(run)
    config.write_text("n_layer = 1  # the same\n")
    study.check(run)
    config.write_text("n_layer = 2\n")
    assert "a config file or the data have changed" in refusal(study.check, run, error=UserError)


def test_the_stamp_changes_with_every_file_that_is_executed(tmp_path):
    (tmp_path / "blockgpt/data").mkdir(parents=True)
    for name in ("train.py", "blockgpt/data/loader.py"):
        (tmp_path / name).write_text("x = 1")
        before = source_stamp(tmp_path)
        (tmp_path / name).write_text("x = 12")
        assert source_stamp(tmp_path) != before == [*before]
    (tmp_path / "sample.py").write_text("x = 1")
    assert len(source_stamp(tmp_path)) == 2


# ---- the record


def test_study_json_has_every_field_and_every_run(tmp_path):
    study = planner(margin=0.01)
    runs = study.judged()
    write_plan(tmp_path, study.plan, runs)
    record = json.loads((tmp_path / "study.json").read_text())
    assert record == json.loads(json.dumps(plan_record(study.plan, runs)))
    assert record["margin"] == 0.01 and record["variants"] == NORMS
    assert [run["run"] for run in record["runs"]] == [run.name for run in runs]
    assert load_config(record["runs"][1]["command"][1:]).model.normalization == "rmsnorm"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal(write_plan, tmp_path / "file/study", plan(), [], error=UserError)
    assert message == f"{tmp_path}/file/study: cannot be written: Not a directory (--out_dir=…)"


def test_a_pooled_spread_is_that_of_all_pairs_about_their_own_means():
    assert pooled_spread([]) is None and pooled_spread([[1.0]]) is None
    assert pooled_spread([[1.0, 3.0], [10.0, 12.0]]) == pytest.approx(2**0.5)
    assert pooled_spread([[1.0, 3.0], [5.0]]) == pytest.approx(2**0.5)


def test_the_base_of_a_grid_has_its_derived_keys():
    assert base_values(BASE, PROGRAM)["d_ff"] == 256
