"""A mixture reads each source by its weight: less than one sequence off at any time, exact after every whole table."""

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, records
from dataset_helpers import concatenate, counting_dataset, equal, pair, single_process
from forked import run_train
from hypothesis import given
from hypothesis import strategies as st

import compare_architectures
from blockgpt.data.dataset import open_dataset
from blockgpt.data.loader import TrainBatches
from blockgpt.data.mixture import (
    MixedBatches,
    Mixture,
    balanced_table,
    check_epochs,
    describe_phases,
    exact_fractions,
    source_seed,
)
from blockgpt.data.prepare import write_dataset
from blockgpt.data.tokenizer import ByteTokenizer
from blockgpt.errors import ConfigError

WEIGHTS = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from([0.05, 0.1, 0.25, 0.3, 0.7, 1, 2, 3.5, 7]),
                          min_size=1, max_size=6)
LARGE = st.integers(0, 10**15)


def mixture(*phases, sequences_per_step=1):
    return Mixture(list(phases), sequences_per_step)


# The source of each sequence


@pytest.mark.parametrize("weights, expected", [
    ({"a": 0.7, "b": 0.3}, ["7/10", "3/10"]), ({"a": 1, "b": 2}, ["1/3", "2/3"]), ({"a": 5}, ["1"]),
    ({"a": 0.3333333333, "b": 0.6666666667}, ["1/3", "2/3"]), ({"a": 0.12345, "b": 1}, ["2469/22469", "20000/22469"]),
])
def test_a_weight_means_the_fraction_that_it_approximates(weights, expected):
    assert list(exact_fractions(weights).values()) == list(map(Fraction, expected))


@given(WEIGHTS)
def test_every_prefix_of_a_table_is_less_than_one_sequence_off(weights):
    fractions = list(exact_fractions(weights).values())
    period = int(np.lcm.reduce([f.denominator for f in fractions]))
    counts = [int(f * period) for f in fractions]
    table = balanced_table(counts)
    assert np.bincount(table, minlength=len(counts)).tolist() == counts
    consumed = np.zeros(len(counts), np.int64)
    bound = 1 - Fraction(1, 2 * len(counts) - 2) if len(counts) > 1 else 0
    for position, source in enumerate(table.tolist()):
        consumed[source] += 1
        off = [abs(int(n) * period - c * (position + 1)) for n, c in zip(consumed, counts, strict=True)]
        assert max(off) <= bound * period


@given(WEIGHTS, LARGE, st.integers(0, 300))
def test_every_interval_of_a_run_is_less_than_two_off_and_every_whole_table_exact(weights, start, length):
    m = mixture((0, weights))
    period = len(m.phases[0].table)
    before, after, whole = m.consumed(start), m.consumed(start + length), m.consumed(start + 3 * period)
    for name, fraction in m.fractions[0].items():
        assert abs(before[name] - fraction * start) < 1
        assert abs(after[name] - before[name] - fraction * length) < 2
        assert whole[name] - before[name] == 3 * period * fraction


@given(st.lists(WEIGHTS, min_size=1, max_size=3), st.lists(st.integers(1, 200), min_size=2, max_size=2),
       st.integers(1, 9))
def test_each_source_is_read_in_order_without_gap_through_all_phases(weights, gaps, sequences_per_step):
    steps = [0, *itertools.accumulate(gaps)][:len(weights)]
    m = Mixture(list(zip(steps, weights, strict=True)), sequences_per_step)
    n = (steps[-1] + 50) * sequences_per_step
    source, source_ids = m.assign(np.arange(n))
    for i, name in enumerate(m.names):
        assert source_ids[source == i].tolist() == list(range(m.consumed(n)[name]))
    for step, fractions, end in zip(steps, m.fractions, [*steps[1:], steps[-1] + 50], strict=True):
        counts = np.bincount(source[step * sequences_per_step:end * sequences_per_step], minlength=len(m.names))
        for i, name in enumerate(m.names):  # the table of a phase begins with the phase
            assert abs(counts[i] - fractions[name] * (end - step) * sequences_per_step) < 1


@given(WEIGHTS, LARGE, st.permutations(range(20)))
def test_the_source_of_a_sequence_depends_on_its_id_alone(weights, start, order):
    source, source_ids = mixture((0, weights)).assign(start + np.arange(20))
    again = mixture((0, dict(reversed(weights.items()))))
    shuffled = again.assign(start + np.array(order))
    assert np.array_equal(shuffled[0], source[order]) and np.array_equal(shuffled[1], source_ids[order])


def test_the_order_is_the_same_in_every_release():
    """Otherwise a run resumed with newer code would read other sequences."""
    m = mixture((0, {"x": 0.5, "y": 0.3, "z": 0.2}))
    assert m.assign(np.arange(10))[0].tolist() == [0, 1, 0, 2, 0, 1, 0, 2, 1, 0]
    assert source_seed(1337, "fineweb") == 18016313618298617


def test_weights_that_need_too_long_a_table_are_refused():
    for weights in ({"a": 0.12345678, "b": 0.87654321}, {"a": 1e-10, "b": 1}):  # the latter is not rounded to 0
        with pytest.raises(ConfigError, match="round them"):
            mixture((0, weights))


def test_phases_are_described_in_words():
    phases = [(0, {"fineweb": 7, "pycode": 3}), (2000, {"pycode": 1})]
    assert describe_phases(phases) == "70% fineweb + 30% pycode, from step 2000 pycode"
    assert describe_phases([(0, {"x": 1})]) == "x"


# The batches


def mixed_batches(weights, lengths, batch_size=6, accumulation=1, seed=5):
    sources = {name: TrainBatches(counting_dataset([n]), source_seed(seed, name), 8, batch_size, accumulation)
               for name, n in lengths.items()}
    return MixedBatches(sources, mixture((0, weights), sequences_per_step=batch_size * accumulation), batch_size,
                        accumulation)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("step", [0, 77, 10**9])
def test_any_number_of_processes_and_micro_batches_reads_the_same_global_batch(world_size, step):
    lengths = {"a": 500, "b": 90, "c": 3000}
    weights = {"a": 0.5, "b": 0.2, "c": 0.3}
    whole = mixed_batches(weights, lengths, 48).micro_batch(step)
    sharded = mixed_batches(weights, lengths, 48 // world_size // 2, 2 * world_size)
    micro_batches = [sharded.micro_batch(step, m, rank, world_size) for m in range(2) for rank in range(world_size)]
    assert equal(concatenate(micro_batches), whole)
    assert sharded.step_targets(step) == 48 * 8


def test_each_source_keeps_its_own_epochs():
    b = mixed_batches({"a": 0.5, "b": 0.5}, {"a": 200, "b": 1000})
    n = 2 * max(source.n_sequences for source in b.sources)
    source, _ = b.mixture.assign(np.arange(n))
    x, y = pair(b.read(np.arange(n)))
    assert torch.equal(y, x + 1)
    assert [token for _, token in b.offsets(np.arange(n))] == x[:, 0].tolist()
    for i, batches in enumerate(b.sources):
        firsts = x[torch.from_numpy(source == i)][:batches.n_sequences, 0].tolist()
        assert sorted(firsts) == [8 * k for k in range(batches.n_sequences)]  # the first epoch, each sequence once


def test_sources_of_the_same_size_are_read_in_different_orders():
    b = mixed_batches({"a": 0.5, "b": 0.5}, {"a": 900, "b": 900})
    source, _ = b.mixture.assign(np.arange(100))
    x = b.read(np.arange(100))["tokens"]
    assert x[torch.from_numpy(source == 0), 0].tolist() != x[torch.from_numpy(source == 1), 0].tolist()


# Epochs


@given(WEIGHTS, st.integers(1, 50), st.integers(1, 30), st.floats(0.1, 5), st.integers(1, 2000))
def test_the_max_iters_that_a_refusal_proposes_is_the_largest_accepted(weights, n, sequences, max_epochs, max_iters):
    m = mixture((0, weights), sequences_per_step=sequences)
    epoch_sequences = dict.fromkeys(m.names, n)
    try:
        check_epochs(m, epoch_sequences, max_epochs, max_iters, sequences)
    except ConfigError as error:
        steps = int(str(error).split("max_iters at most ")[1].split(",")[0].rstrip(")"))
        assert 0 <= steps < max_iters
        check_epochs(m, epoch_sequences, max_epochs, steps, sequences)
        with pytest.raises(ConfigError):
            check_epochs(m, epoch_sequences, max_epochs, steps + 1, sequences)
    else:
        assert all(count <= max_epochs * n for count in m.consumed(max_iters * sequences).values())


def test_epochs_are_limited_by_name():
    m = mixture((0, {"a": 0.5, "b": 0.5}))
    check_epochs(m, {"a": 10, "b": 10}, {"a": 5}, 100, 1)
    check_epochs(m, {"a": 10, "b": 10}, None, 100, 1)
    with pytest.raises(ConfigError, match="b would be read 5 times by step 100, more than 2 times"):
        check_epochs(m, {"a": 10, "b": 10}, {"b": 2}, 100, 1)
    with pytest.raises(ConfigError, match="c is not among the sources"):
        check_epochs(m, {"a": 10, "b": 10}, {"c": 2}, 100, 1)


# A run


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, sources):
    """A folder with two datasets of different text and size, by the same tokenizer."""
    folder = tmp_path_factory.mktemp("corpora")
    docs = [p.read_text() for p in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]]
    write_dataset(folder / "code", ByteTokenizer(), [("train", t) for t in sources] + [("val", sources[0])], source="x")
    write_dataset(folder / "prose", ByteTokenizer(), [("train", docs[0]), ("val", docs[-1])], source="x")
    return folder


MIX = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_size=5", "--eval_tokens=256",
       "--device=cpu", "--mfu_peak=1", "--log_interval=1", "--eval_interval=5"]


@pytest.mark.slow
def test_a_mixed_run_accounts_for_every_token_and_resumes_bitwise_equal(tmp_path, tmp_path_factory, corpora, capsys):
    def train(name, *flags):
        output = tmp_path_factory.mktemp("output") / "train"
        done = run_train([*MIX, f"--data_dir={corpora}", f"--run_name={name}", *flags], tmp_path, environment(), output)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def tokens_per_source(name):
        return json.loads((tmp_path / f"runs/{name}/run.json").read_text())["results"]["tokens_per_source"]

    flags = ["--lr_decay_iters=10", "--warmup_iters=2",
             "--dataset_schedule=[(0, {'code': 0.7, 'prose': 0.3}), (6, {'prose': 1})]"]
    stdout = train("whole", "--max_iters=10", *flags)
    run, consumed = json.loads((tmp_path / "runs/whole/run.json").read_text()), tokens_per_source("whole")
    assert sum(consumed.values()) == run["results"]["tokens"] == 10 * 5 * 32
    assert abs(consumed["code"] - 0.7 * 6 * 5 * 32) < 32  # within one sequence
    assert run["data"]["sources"]["prose"]["planned_tokens"] == consumed["prose"]
    assert run["data"]["dataset"] == "70% code + 30% prose, from step 6 prose"
    assert run["config"]["dataset_schedule"] == [[0, {"code": 0.7, "prose": 0.3}], [6, {"prose": 1}]]
    for record in records(tmp_path / "runs/whole", "eval").values():
        assert record["val_loss"] == record["val_loss/prose"] and record["val_loss/code"] != record["val_loss/prose"]
        assert record["val_bpb/code"] > 0 and record["val_bpb"] == pytest.approx(record["val_bpb/prose"])
    assert "val_loss/code" in stdout and "epochs" in stdout

    train("cut", "--max_iters=5", *flags)
    train("cut", "--max_iters=10", "--resume=must")
    assert (tmp_path / "runs/cut/model.safetensors").read_bytes() == \
        (tmp_path / "runs/whole/model.safetensors").read_bytes()
    assert tokens_per_source("cut") == consumed
    compare_architectures.main(["--out_dir", str(tmp_path / "runs")])
    table = capsys.readouterr().out
    assert "whole" in table and "finished" in table


def test_a_mixture_of_one_dataset_is_that_dataset(corpora):
    from blockgpt.training.objectives import LanguageModeling
    from configurator import load_config
    flags = [f"--data_dir={corpora}", *MIX]
    alone = LanguageModeling(load_config(["--dataset=code", *flags]), single_process())
    mixed = LanguageModeling(load_config(["--dataset={'code': 3}", *flags]), single_process())
    assert alone.fingerprint == mixed.fingerprint == open_dataset("code", corpora).fingerprint
    for step in (0, 7):
        for a, b in zip(alone.micro_batches(step), mixed.micro_batches(step), strict=True):
            assert equal(a, b)
