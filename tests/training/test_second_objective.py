"""A second objective is one class and one line: masked tokens, predicted from both sides by the hidden states.

It is throw-away. It is trained, evaluated, resumed, stopped early and compared without a change anywhere else.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, config_error, records

import compare_architectures
import train
from blockgpt.training.criterion import Criterion
from blockgpt.training.objectives import TokenObjective
from configurator import OBJECTIVES, ObjectiveOption, load_config


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
    monkeypatch.setitem(OBJECTIVES, "masked_tokens", ObjectiveOption(lambda: MaskedTokens, "predict hidden tokens"))

    def run_objective(name, *flags):
        train.main(load_config([*TINY, *flags, f"--data_dir={data_dir}", f"--run_name={name}"]))
        return tmp_path / "runs" / name
    return run_objective


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


def test_the_metrics_of_a_step_are_over_all_its_micro_batches(run, monkeypatch):
    seen = []
    loss = MaskedTokens.loss
    monkeypatch.setattr(MaskedTokens, "loss", lambda *args: seen.append(loss(*args)) or seen[-1])
    step = records(run("short", *FLAGS, "--max_iters=1"))[1]
    assert len(seen) == 2
    correct, count = (sum(int(metrics["accuracy"][i]) for _, metrics in seen) for i in (0, 1))
    assert step["metrics"] == {"accuracy": pytest.approx(correct / count)}
    assert step["loss"] == pytest.approx(sum(term.item() for term, _ in seen))


def test_its_criterion_stops_a_run_early(run):
    flags = [*FLAGS, "--max_iters=40", "--eval_interval=1", "--learning_rate=1e-12", "--min_lr=0", "--patience=2"]
    run_json = json.loads((run("early", *flags) / "run.json").read_text())
    assert run_json["results"]["step"] == 3 and "accuracy has not improved" in run_json["status_reason"]


def test_it_starts_from_the_weights_of_a_run_of_another_objective(run):
    run("causal", "--arch_preset=llama", "--max_iters=1")
    fine_tuned = run("fine_tuned", "--init_from=runs/causal", *FLAGS, "--max_iters=1")
    assert json.loads((fine_tuned / "run.json").read_text())["initial_weights"]["step"] == 1


def test_an_objective_that_is_not_in_the_table_is_refused():
    assert config_error("--objective=masked_tokens").startswith("--objective: 'masked_tokens' is unknown")
