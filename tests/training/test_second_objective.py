"""A second objective is one class and one line: masked tokens, predicted from both sides by the hidden states.

It is throw-away. It is trained, evaluated, resumed, stopped early and compared without a change anywhere else.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, config_error, environment, records
from dataset_helpers import single_process
from forked import SERVER, exec_train

import compare_architectures
from blockgpt.checkpoints import checkpoint
from blockgpt.data.loader import IGNORE_INDEX
from blockgpt.training.criterion import Criterion
from blockgpt.training.objectives import LanguageModeling, TokenObjective
from configurator import OBJECTIVES, ObjectiveOption, load_config
from model_builder import build_model


class MaskedTokens(TokenObjective):
    """Classify the tokens that a mask hides, a fixed sixth of them. Devlin et al. 2019."""

    criterion = Criterion("accuracy", more_is_better=True)

    def check_model(self):
        assert not self.config.model.causal, "masked tokens are predicted from both sides"
        super().check_model()

    def classify(self, model, batch):
        """(sum of the losses, correct predictions, count) of the masked tokens."""
        tokens = batch["tokens"]
        is_masked = (7 * tokens + torch.arange(tokens.shape[1], device=tokens.device)) % 6 == 0
        is_masked &= batch["targets"] != IGNORE_INDEX  # else it is padding
        hidden_tokens = tokens.masked_fill(is_masked, self.vocab_size)  # the first id that is no token
        logits = model(hidden_tokens, segment_ids=batch.get("segment_ids"),
                       head=lambda model, h: model.lm_head(h[is_masked]).float())  # (masked, V)
        loss = F.cross_entropy(logits, tokens[is_masked], reduction="sum")
        return loss, (logits.argmax(-1) == tokens[is_masked]).sum(), is_masked.sum()

    def loss(self, model, batch):
        loss, correct, count = self.classify(model, batch)
        return loss / count / self.config.gradient_accumulation_steps, {"accuracy": (correct, count)}

    def evaluate_batch(self, model, batch):
        loss, correct, count = self.classify(model, batch)
        return {"accuracy": (correct, count), "val_loss": (loss, count)}


FLAGS = ["--objective=masked_tokens", "--causal=False", "--arch_preset=llama", "--gradient_accumulation_steps=2",
         "--eval_interval=4", "--lr_decay_iters=8", "--warmup_iters=1", "--dropout=0.1"]


@pytest.fixture
def run(monkeypatch, tmp_path, data_dir):
    """run(name, *flags) -> the directory of a finished run of the objective."""
    monkeypatch.chdir(tmp_path)
    for name, option in ADDED.items():
        monkeypatch.setitem(OBJECTIVES, name, option)

    def run_objective(name, *flags):
        argv = [*TINY, *flags, f"--data_dir={data_dir}", f"--run_name={name}"]
        process = SERVER.Process(target=exec_objective, args=(argv, str(tmp_path), environment(), f"{tmp_path}/output"))
        process.start()
        process.join(240)
        assert process.exitcode == 0, (tmp_path / "output.err").read_text()
        return tmp_path / "runs" / name
    return run_objective


def exec_objective(*args):
    """`exec_train` with the objectives of this file."""
    OBJECTIVES.update(ADDED)
    exec_train(*args)


@pytest.mark.slow
def test_it_is_trained_evaluated_resumed_and_compared(run, capsys):
    whole = run("whole", *FLAGS, "--max_iters=8", "--learning_rate=3e-3")
    assert run("cut", *FLAGS, "--max_iters=4", "--learning_rate=3e-3").is_dir()
    cut = run("cut", "--resume=must", "--max_iters=8")
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    steps = records(whole)
    assert [r["loss"] for r in steps.values()] == [r["loss"] for r in records(cut).values()]
    assert steps[8]["loss"] < steps[1]["loss"] and 0 <= steps[8]["metrics"]["accuracy"] <= 1
    evals = records(whole, "eval")
    assert evals == records(cut, "eval") and set(evals[8]) >= {"accuracy", "val_loss"} and evals[8]["accuracy"] > 0

    run_json = json.loads((whole / "run.json").read_text())
    assert run_json["criterion"] == {"metric": "accuracy", "more_is_better": True}
    assert run_json["config"]["objective"] == "masked_tokens"
    best = max(r["accuracy"] for r in evals.values())
    assert run_json["results"]["best_accuracy"] == best
    worse = run("worse", *FLAGS, "--max_iters=4", "--learning_rate=1e-9", "--min_lr=0")
    capsys.readouterr()
    compare_architectures.main([str(worse), str(whole), "--format=json"])
    ranked = json.loads(capsys.readouterr().out)
    assert ranked["criterion"]["metric"] == "accuracy"
    assert [r["name"] for r in ranked["runs"]] == ["whole", "worse"] and ranked["runs"][0]["accuracy"] == best
    assert config_error("--resume=must", "--run_name=cut", "--objective=language_modeling").startswith(
        "--objective: the run was made with 'masked_tokens'")


def test_the_metrics_of_a_step_are_over_all_its_micro_batches(run, data_dir):
    flags = [*FLAGS, "--max_iters=1", "--dropout=0"]
    step = records(run("short", *flags))[1]
    config = load_config([*TINY, *flags, f"--data_dir={data_dir}"])
    objective = config.build_objective(single_process())
    model = build_model(config.for_vocabulary(objective.vocab_size).model, config.seed)
    terms = [objective.loss(model, batch) for batch in objective.micro_batches(0)]
    assert len(terms) == 2
    correct, count = (sum(int(metrics["accuracy"][i]) for _, metrics in terms) for i in (0, 1))
    assert step["metrics"] == {"accuracy": pytest.approx(correct / count)}
    assert step["loss"] == pytest.approx(sum(term.item() for term, _ in terms), rel=1e-6)


def test_its_criterion_stops_a_run_early(run):
    flags = [*FLAGS, "--max_iters=40", "--eval_interval=1", "--learning_rate=1e-12", "--min_lr=0", "--patience=2"]
    run_json = json.loads((run("early", *flags) / "run.json").read_text())
    assert run_json["results"]["step"] == 3 and "accuracy has not improved" in run_json["status_reason"]


@pytest.mark.slow
def test_it_starts_from_the_weights_of_a_run_of_another_objective(run):
    run("causal", "--arch_preset=llama", "--max_iters=1")
    fine_tuned = run("fine_tuned", "--init_from=runs/causal", *FLAGS, "--max_iters=1")
    assert json.loads((fine_tuned / "run.json").read_text())["initial_weights"]["step"] == 1


class Distillation(LanguageModeling):
    """The teacher's probabilities of the next token as targets (Hinton et al. 2015)."""

    @classmethod
    def companion_runs(cls, config):
        return ["runs/teacher"]

    def micro_batches(self, step, model=None, generator=None):
        assert isinstance(model, torch.nn.Module)
        with open("drawn", "a") as file:
            print(step, torch.rand(1, generator=generator).item(), file=file)
        return super().micro_batches(step, model, generator)

    def loss(self, model, batch):
        teacher, = self.companions
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
        with torch.no_grad():
            p = teacher(batch["tokens"]).softmax(-1)
        loss = -(p * model(batch["tokens"]).log_softmax(-1)).sum(-1).mean()
        return loss / self.config.gradient_accumulation_steps, {}


ADDED = {"masked_tokens": ObjectiveOption(lambda: MaskedTokens, "predict hidden tokens"),
         "distillation": ObjectiveOption(lambda: Distillation, "learn from a teacher")}


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--use_fsdp"]])
def test_a_frozen_teacher_is_built_and_is_in_no_checkpoint(run, tmp_path, flags):
    run("teacher", "--max_iters=2", "--arch_preset=llama", "--n_layer=3")
    flags = ["--objective=distillation", "--lr_decay_iters=4", "--warmup_iters=1", "--eval_interval=2", *flags]
    whole = run("whole", *flags, "--max_iters=4")
    drawn = (tmp_path / "drawn").read_text().splitlines()
    assert len(drawn) == len({line.split()[1] for line in drawn}) == 4
    run("cut", *flags, "--max_iters=2")
    cut = run("cut", "--resume=must", "--max_iters=4")
    assert (tmp_path / "drawn").read_text().splitlines() == 2 * drawn  # the generator is a function of the step
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    names = checkpoint.read_weights(checkpoint.find_newest(whole)).keys()
    assert any(name.startswith("blocks.1.") for name in names) and not any("blocks.2." in name for name in names)


def test_an_objective_that_is_not_in_the_table_is_refused():
    assert config_error("--objective=masked_tokens").startswith("--objective: 'masked_tokens' is unknown")
