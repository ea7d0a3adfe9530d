"""The loss of a step and of an evaluation are what their definitions say."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from dataset_helpers import concatenate, exact_losses, pair, write_shards

from blockgpt.data.loader import segments_by_eot
from blockgpt.errors import DataError
from blockgpt.files import sha256_of
from blockgpt.training.launch import Runtime
from blockgpt.training.objectives import LanguageModeling, MetricSums
from configurator import load_config
from model_builder import build_model

BLOCK = 16


class Isolated(Runtime):
    """A process without a process group: its sums are its own, and it finds the datasets itself."""

    calls_on_rank_zero = 0

    def all_reduce_sum(self, *values):
        return list(map(float, values))

    def on_rank_zero(self, function):
        self.calls_on_rank_zero += 1
        return function()


def runtime(rank=0, world_size=1):
    return Isolated(rank, rank, world_size, torch.device("cpu"), torch.float32, False, False)


@pytest.fixture
def config(data_dir):
    """config(**keys) -> the Config of a small model on the test's dataset."""
    def make(dataset="text", **keys):
        keys = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": BLOCK, "vocab_size": 320, "batch_size": 4,
                "device": "cpu", **keys}
        return load_config([f"--data_dir={data_dir}", f"--dataset={dataset}", *(f"--{k}={v}" for k, v in keys.items())])
    return make


def test_the_micro_losses_of_a_step_sum_to_the_mean_over_its_tokens(config):
    c = config(batch_size=3, gradient_accumulation_steps=4)
    model = build_model(c.model)
    one = LanguageModeling(c, runtime())
    batches = list(one.micro_batches(5))
    assert len(batches) == one.micro_steps == 4 and one.tokens_per_step == 4 * 3 * BLOCK
    mean = exact_losses(model, *pair(concatenate(batches))).mean().item()
    assert sum(one.loss(model, b)[0].item() for b in batches) == pytest.approx(mean, rel=1e-6)
    micro_losses = []
    for rank in range(2):  # two processes split the same step
        half = LanguageModeling(c, runtime(rank, 2))
        assert half.micro_steps == 2 and half.tokens_per_step == one.tokens_per_step
        micro_losses += [half.loss(model, b)[0].item() for b in half.micro_batches(5)]
    assert sorted(micro_losses) == sorted(one.loss(model, b)[0].item() for b in batches)


@pytest.mark.slow
def test_an_evaluation_is_the_mean_over_the_whole_split(config):
    c = config(eval_tokens=0, dropout=0.5)
    model, objective = build_model(c.model), LanguageModeling(c, runtime())
    data = np.fromfile(objective.datasets["text"].directory / "val.bin", "<u2").astype(np.int64)
    n = (len(data) - 1) // BLOCK
    x, y = (torch.from_numpy(data[i:i + n * BLOCK].reshape(n, BLOCK)) for i in (0, 1))
    mean = exact_losses(model, x, y).mean().item()
    metrics = objective.evaluate(model)
    assert metrics["val_loss"] == pytest.approx(mean, rel=1e-6)
    text_bytes = int((data < 256).sum())  # an end-of-text token has none
    assert metrics["val_bpb"] == pytest.approx(mean / math.log(2) * len(data) / text_bytes, rel=1e-6)


def test_an_evaluation_does_not_depend_on_batches_or_processes(config):
    c = config(eval_tokens=37 * BLOCK)
    model = build_model(c.model)
    whole = LanguageModeling(c, runtime()).evaluate(model)["val_loss"]
    for batch_size in (1, 3, 64):
        other = LanguageModeling(config(eval_tokens=37 * BLOCK, batch_size=batch_size), runtime())
        assert other.evaluate(model)["val_loss"] == pytest.approx(whole, rel=1e-6)
    c = config(eval_tokens=37 * BLOCK, gradient_accumulation_steps=2)
    halves = [LanguageModeling(c, runtime(rank, 2)).evaluate(model)["val_loss"] for rank in range(2)]
    assert (19 * halves[0] + 18 * halves[1]) / 37 == pytest.approx(whole, rel=1e-6)


def test_an_evaluation_has_one_shape_adds_up_in_float64_and_waits_for_nothing(config, monkeypatch):
    """Of another shape, torch.compile would compile again; a number in place of a tensor would wait for the GPU."""
    c = config(eval_tokens=37 * BLOCK, batch_size=8)
    model, objective = build_model(c.model), LanguageModeling(c, runtime())
    evaluate_batch, seen = objective.evaluate_batch, []
    monkeypatch.setattr(objective, "evaluate_batch",
                        lambda model, batch: seen.append((batch, evaluate_batch(model, batch))) or seen[-1][1])
    value = objective.evaluate(model)["val_loss"]
    assert [batch["tokens"].shape for batch, _ in seen] == 5 * [(8, BLOCK)]
    assert all(isinstance(v, torch.Tensor) for _, metrics in seen for values in metrics.values() for v in values)
    assert value == math.fsum(metrics["val_loss"][0].item() for _, metrics in seen) / (37 * BLOCK)


def test_masked_documents_give_the_logits_of_each_document_alone(config):
    c = config(mask_documents=True, position_encoding="none", n_layer=2, init_std=0.3)
    model, objective = build_model(c.model).eval(), LanguageModeling(c, runtime())
    eot = objective.datasets["text"].meta["eot"]
    x = torch.randint(0, 256, (2, BLOCK), generator=torch.Generator().manual_seed(0))
    x[0, [3, 4, 9]] = eot  # a document that is nothing but its end, too
    x[1, BLOCK - 1] = eot
    segment_ids = segments_by_eot(x, eot)
    assert segment_ids.tolist() == [[0] * 4 + [1] + [2] * 5 + [3] * 6, [0] * BLOCK]
    logits = model(x, segment_ids=segment_ids)
    for row, first, last in ((0, 0, 4), (0, 4, 5), (0, 5, 10), (0, 10, BLOCK), (1, 0, BLOCK)):
        alone = model(x[row:row + 1, first:last])
        torch.testing.assert_close(logits[row:row + 1, first:last], alone, rtol=1e-4, atol=1e-5)
    y = x.roll(-1, 1)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    objective.step_targets = y.numel()
    batch = {"tokens": x, "targets": y, "segment_ids": segment_ids}
    assert objective.loss(model, batch)[0].item() * y.numel() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_the_boundaries_of_documents_travel_with_the_batches(config, packing, monkeypatch):
    """Training and validation batches have them with mask_documents, and the model gets those of the batch."""
    c = config(mask_documents=True, packing=packing, eval_tokens=64, block_size=1500)
    model, objective = build_model(c.model), LanguageModeling(c, runtime())
    for batch in objective.micro_batches(0):
        assert batch["segment_ids"].shape == batch["tokens"].shape
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, y, s, **kwargs: seen.append((x, s)) or forward(x, y, s, **kwargs))
    objective.loss(model, batch)
    objective.evaluate(model)
    assert seen[0][1] is batch["segment_ids"]
    eot = objective.datasets["text"].meta["eot"]
    assert all(torch.equal(s, segments_by_eot(x, eot)) for x, s in seen[1:]) and len(seen) > 1


def test_metrics_are_weighted_means_over_micro_batches_and_ranks():
    class Twice(Isolated):
        def all_reduce_sum(self, *values):
            return [2 * value + (i % 2) for i, value in enumerate(map(float, values))]  # weights grow by one more

    sums = MetricSums()
    assert sums.means(Twice(0, 0, 2, torch.device("cpu"), torch.float32, False, False)) == {}
    graph = torch.ones(1, requires_grad=True).sum()
    sums.add({"b": (3 * graph, 1), "a": (torch.tensor(2.0), torch.tensor(2))})
    sums.add({"b": (1.0, 3), "a": (6.0, 0)})
    assert not any(isinstance(v, torch.Tensor) and v.requires_grad
                   for lists in sums.sums.values() for terms in lists for v in terms)
    assert sums.means(runtime()) == {"b": 1.0, "a": 4.0} and list(sums.means(runtime())) == ["b", "a"]
    assert sums.means(Twice(0, 0, 2, torch.device("cpu"), torch.float32, False, False)) == {"b": 8 / 9, "a": 16 / 5}
    sums.add({"c": (0.0, 0)})
    assert math.isnan(sums.means(runtime())["c"])


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_has_no_dropout_and_restores_training_mode(config, training):
    c = config(eval_tokens=64, dropout=0.5)
    model, objective = build_model(c.model).train(training), LanguageModeling(c, runtime())
    assert objective.evaluate(model) == objective.evaluate(model)
    assert all(m.training == training for m in model.modules())


def test_a_missing_dataset_is_an_error_on_every_rank(config):
    """Rank zero looks for it through `on_rank_zero`: if rank zero alone raised, the others would wait for it."""
    for rank in range(2):
        process = runtime(rank, 2)
        with pytest.raises(DataError, match="does not exist"):
            LanguageModeling(config("nothing", gradient_accumulation_steps=2), process)
        assert process.calls_on_rank_zero == 1


def test_an_evaluation_that_fails_restores_training_mode(config, monkeypatch):
    c = config(eval_tokens=64)
    model, objective = build_model(c.model).train(), LanguageModeling(c, runtime())
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        objective.evaluate(model)
    assert model.training


@pytest.mark.slow
def test_the_digest_of_the_validation_data_says_what_an_evaluation_reads(config, tmp_path):
    def val_data(rank=0, world_size=1, **keys):
        return LanguageModeling(config(**{"eval_tokens": 40 * BLOCK, **keys}), runtime(rank, world_size)).val_data

    same = val_data()
    assert same["tokens"] == 40 * BLOCK
    for keys in ({"seed": 5}, {"batch_size": 2}, {"eval_tokens": 40 * BLOCK + 3}, {"packing": "documents"},
                 {"n_embd": 32}, {"rank": 1, "world_size": 2, "gradient_accumulation_steps": 2}):
        assert val_data(**keys) == same, keys
    others = [val_data(eval_tokens=39 * BLOCK), val_data(eval_tokens=0), val_data(block_size=2 * BLOCK)]
    assert len({data["digest"] for data in (same, *others)}) == 4
    data_dir = tmp_path / "copy"
    shutil.copytree(LanguageModeling(config(), runtime()).datasets["text"].directory, data_dir / "renamed")
    copy = {"dataset": "renamed", "data_dir": str(data_dir)}
    assert val_data(**copy) == same
    meta = json.loads((data_dir / "renamed/meta.json").read_text())
    shard = data_dir / "renamed/val.bin"
    shard.write_bytes(b"".join(reversed([shard.read_bytes()[i:i + 2] for i in range(0, shard.stat().st_size, 2)])))
    meta["splits"]["val"]["files"]["val.bin"]["sha256"] = sha256_of(shard)
    (data_dir / "renamed/meta.json").write_text(json.dumps(meta))
    assert val_data(**copy)["digest"] != same["digest"]


def test_the_digest_of_a_mixture_has_the_weights_of_its_last_phase(tmp_path, data_dir):
    for name in ("a", "b"):
        shutil.copytree(data_dir / "text", tmp_path / name)

    def digest(*phases):
        config = load_config([f"--data_dir={tmp_path}", f"--dataset_schedule={[*enumerate(phases)]}", "--device=cpu",
                              "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4"])
        return LanguageModeling(config, runtime()).val_data["digest"]

    alone = digest({"a": 1})
    assert digest({"a": 1}, {"b": 2}) == alone  # the same text, and nothing else counts
    assert digest({"a": 1, "b": 3}) != digest({"a": 1, "b": 1}) != alone


def test_a_validation_split_that_is_too_short_is_refused_at_once_though_its_source_does_not_count_in_the_end(tmp_path):
    write_shards(tmp_path / "a", {"train.bin": range(90), "val.bin": range(50)})
    write_shards(tmp_path / "b", {"train.bin": range(90), "val.bin": range(16)})
    config = load_config([f"--data_dir={tmp_path}", '--dataset_schedule=[[0, {"a": 1, "b": 1}], [2, {"a": 1}]]',
                          "--device=cpu", "--max_iters=4", "--n_layer=1", "--n_head=2", "--n_embd=16",
                          "--block_size=16", "--batch_size=1", "--gradient_accumulation_steps=1"])
    with pytest.raises(DataError, match="block_size=16 is too long for the val split of dataset 'b'"):
        LanguageModeling(config, runtime())
