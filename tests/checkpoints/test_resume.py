"""Resuming by the record: a run inherits its keys, and refuses to become another experiment."""

import json

import pytest
from conftest import ROOT, config_error

from blockgpt.checkpoints.resume import FORMER_VALUES
from configurator import RENAMED_KEYS, load_config
from model_config import ModelConfig


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """recorded(*argv): record the run runs/mine of these arguments; its keys."""
    monkeypatch.chdir(tmp_path)

    def record(*argv):
        run = tmp_path / "runs/mine"
        run.mkdir(parents=True)
        config = load_config(argv).for_vocabulary(257).flat()
        (run / "run.json").write_text(json.dumps({"config": config}))
        return config
    return record


RESUME = ("--resume=must", "--run_name=mine")


def test_a_resumed_run_inherits_its_keys(recorded):
    before = recorded("config/arch_llama.py", "config/size_tiny.py", "--learning_rate=1", "--eval_only", "--data_dir=x",
                    "--profile=1:3")
    again = load_config(RESUME)
    assert again.flat() == {**before, "resume": "must", "run_name": "mine", "eval_only": False, "profile": None}
    assert again.resuming and not load_config(["--run_name=mine"]).resuming
    assert again.for_vocabulary(300).model.vocab_size == 320  # what the run has, not what the data would get
    assert again.keys_without_effect() == {}
    free = ("--max_iters=9", "--learning_rate=2", "--attention_backend=manual", "--dtype=bfloat16", "--out_dir=runs")
    assert load_config([*RESUME, *free]).max_iters == 9
    assert load_config([*RESUME, "config/arch_llama.py", "config/size_tiny.py", "--seed=1337"]).model == again.model


def test_a_resumed_run_refuses_changes_that_make_it_another_experiment(recorded, tmp_path):
    recorded("config/arch_llama.py", "--batch_size=4", "--gradient_accumulation_steps=2")
    for flag in ("--n_layer=9", "--normalization=layernorm", "--arch_preset=gpt2", "--dropout=0.5", "--seed=1",
                 "--dataset=other", "--vocab_size=999", "--batch_size=8", "--gradient_accumulation_steps=3"):
        key = flag[2:].partition("=")[0]
        assert config_error(*RESUME, flag).startswith(f"--{key}: the run ")
    (tmp_path / "other.py").write_text("n_layer = 9")
    assert config_error(*RESUME, "other.py").startswith("other.py: n_layer: the run was made")
    assert load_config([*RESUME, "--batch_size=2", "--gradient_accumulation_steps=4"]).batch_size == 2  # the same step


FORCED = ("--n_layer=9", "--normalization=layernorm", "--dropout=0.5", "--seed=1", "--dataset=other",
          "--packing=documents", "--batch_size=8", "--gradient_accumulation_steps=3")


@pytest.mark.parametrize("flag", FORCED)
def test_a_refused_change_can_be_forced_and_is_listed(recorded, flag):
    before = recorded("config/arch_llama.py", "--batch_size=4", "--gradient_accumulation_steps=2")
    name = flag[2:].partition("=")[0]
    assert config_error(*RESUME, flag).endswith(", or --resume_force)")
    config = load_config([*RESUME, flag, "--resume_force"])
    assert config.forced == (name,) and config.changed[name] == [before[name], config.flat()[name]]
    assert set(config.changed) == {name} and config.for_vocabulary(257).changed == config.changed


def test_an_allowed_change_is_listed_and_not_forced(recorded):
    recorded("--learning_rate=1", "--tracker=wandb")
    config = load_config([*RESUME, "--learning_rate=2", "--tracker=wandb", "--max_iters=2000", "--keep_last=3"])
    assert config.changed == {"learning_rate": [1.0, 2.0], "keep_last": [2, 3]} and config.forced == ()
    assert load_config(["--learning_rate=3"]).changed == {}


AUTO = ("--resume=auto", "--run_name=mine")


def test_auto_resumes_an_existing_run_and_otherwise_starts_it(recorded, tmp_path):
    assert not load_config([*AUTO, "--seed=3"]).resuming
    recorded("--seed=3")
    assert load_config(AUTO).resuming and load_config(AUTO).seed == 3
    assert config_error(*AUTO, "--seed=4").startswith("--seed: the run was made with 3")
    (tmp_path / "runs/mine/run.json").unlink()  # killed before it was written
    assert not load_config([*AUTO, "--seed=4"]).resuming
    (tmp_path / "runs/mine/checkpoints/step_00000001").mkdir(parents=True)
    assert config_error(*AUTO).startswith("--run_name: runs/mine/run.json is missing, though the folder has")
    assert config_error("--resume=auto").startswith("--resume: 'auto' needs --run_name=NAME")
    assert load_config(["--resume_force"]).keys_without_effect() == {"resume_force": "nothing is resumed"}


def test_a_restarted_run_continues(recorded):
    assert load_config(["--run_name=mine"], restarted="mine").resume == "auto"
    recorded("--seed=3")
    for argv in (["--run_name=mine"], [], ["--run_name=mine", "--resume=must"]):
        config = load_config(argv, restarted="mine")
        assert (config.run_name, config.resuming, config.resume, config.seed) == ("mine", True, "auto", 3)
    assert not load_config(["--run_name=mine"]).resuming


def test_a_run_recorded_before_a_key_existed_gets_its_default(recorded):
    before = recorded("config/size_tiny.py", "--batch_size=16")
    old = {k: v for k, v in before.items() if k not in ("batch_size", "bias")} | {"once": 1}
    with open("runs/mine/run.json", "w") as f:
        json.dump({"config": old}, f)
    assert load_config(RESUME).flat() == {**before, "resume": "must", "run_name": "mine"}


@pytest.mark.parametrize("run_dir", sorted((ROOT / "tests/fixtures/runs").iterdir()), ids=lambda path: path.name)
def test_a_recorded_run_with_keys_of_an_earlier_version_is_read_as_it_is(monkeypatch, run_dir):
    document = json.loads((run_dir / "run.json").read_text())
    old = document["config"]
    monkeypatch.setenv("WORLD_SIZE", str(document["hardware"]["world_size"]))
    config = load_config(["--resume=must", f"--run_name={run_dir.name}", f"--out_dir={run_dir.parent}"])
    assert config.resuming and config.changed == {} and set(RENAMED_KEYS) <= set(old)
    for name, new_name in RENAMED_KEYS.items():
        value = FORMER_VALUES[name][old[name]] if name in FORMER_VALUES else old[name]
        assert new_name == "resume" or config.flat()[new_name] == value
    model, default = config.model.flat(), ModelConfig().flat()
    assert model == {**default, **{name: value for name, value in old.items() if name in model}}
