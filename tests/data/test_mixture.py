"""A mixture serves what was asked: less than a sequence off anywhere, exactly on it after every table."""

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import ROOT, records, run_python
from hypothesis import given
from hypothesis import strategies as st
from test_loader import dataset, same

from blockgpt.data.dataset import open_dataset
from blockgpt.data.loader import TrainBatches
from blockgpt.data.mixture import (
    MixedBatches,
    Mixture,
    balanced_table,
    check_epochs,
    describe_phases,
    exact_shares,
    source_seed,
)
from blockgpt.data.prepare import write_dataset
from blockgpt.data.tokenizer import ByteTokenizer
from blockgpt.errors import ConfigError

RATIOS = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from([0.05, 0.1, 0.25, 0.3, 0.7, 1, 2, 3.5, 7]),
                         min_size=1, max_size=6)
FAR = st.integers(0, 10**15)


def mixture(*phases, sequences_per_step=1):
    return Mixture(list(phases), sequences_per_step)


# The shares


@pytest.mark.parametrize("ratios, expected", [
    ({"a": 0.7, "b": 0.3}, ["7/10", "3/10"]), ({"a": 1, "b": 2}, ["1/3", "2/3"]), ({"a": 5}, ["1"]),
    ({"a": 0.3333333333, "b": 0.6666666667}, ["1/3", "2/3"]), ({"a": 0.12345, "b": 1}, ["2469/22469", "20000/22469"]),
])
def test_a_ratio_means_the_fraction_it_was_written_for(ratios, expected):
    assert list(exact_shares(ratios).values()) == list(map(Fraction, expected))


@given(RATIOS)
def test_every_prefix_of_a_table_is_less_than_one_off(ratios):
    shares = list(exact_shares(ratios).values())
    period = int(np.lcm.reduce([s.denominator for s in shares]))
    counts = [int(s * period) for s in shares]
    table = balanced_table(counts)
    assert np.bincount(table, minlength=len(counts)).tolist() == counts
    consumed = np.zeros(len(counts), np.int64)
    bound = 1 - Fraction(1, 2 * len(counts) - 2) if len(counts) > 1 else 0
    for place, source in enumerate(table.tolist()):
        consumed[source] += 1
        off = [abs(int(n) * period - c * (place + 1)) for n, c in zip(consumed, counts, strict=True)]
        assert max(off) <= bound * period


@given(RATIOS, FAR, st.integers(0, 300))
def test_every_block_of_a_run_is_less_than_two_off_and_every_whole_table_exact(ratios, start, length):
    m = mixture((0, ratios))
    period = len(m.phases[0].table)
    first, last, whole = m.consumed(start), m.consumed(start + length), m.consumed(start + 3 * period)
    for name, share in m.shares[0].items():
        assert abs(first[name] - share * start) < 1
        assert abs(last[name] - first[name] - share * length) < 2
        assert whole[name] - first[name] == 3 * period * share


@given(st.lists(RATIOS, min_size=1, max_size=3), st.lists(st.integers(1, 200), min_size=2, max_size=2),
       st.integers(1, 9))
def test_each_source_is_read_in_order_without_gap_through_all_phases(ratios, gaps, sequences_per_step):
    steps = [0, *itertools.accumulate(gaps)][:len(ratios)]
    m = Mixture(list(zip(steps, ratios, strict=True)), sequences_per_step)
    n = (steps[-1] + 50) * sequences_per_step
    source, index = m.assign(np.arange(n))
    for number, name in enumerate(m.names):
        assert index[source == number].tolist() == list(range(m.consumed(n)[name]))
    for (step, _), shares, end in zip(zip(steps, ratios, strict=True), m.shares, [*steps[1:], steps[-1] + 50],
                                      strict=True):
        here = np.bincount(source[step * sequences_per_step:end * sequences_per_step], minlength=len(m.names))
        for number, name in enumerate(m.names):  # a phase starts its table anew
            assert abs(here[number] - shares[name] * (end - step) * sequences_per_step) < 1


@given(RATIOS, FAR, st.permutations(range(20)))
def test_the_source_of_a_sequence_depends_on_its_number_alone(ratios, start, order):
    m = mixture((0, ratios))
    source, index = m.assign(start + np.arange(20))
    again = mixture((0, dict(reversed(ratios.items()))))
    shuffled = again.assign(start + np.array(order))
    assert np.array_equal(shuffled[0], source[order]) and np.array_equal(shuffled[1], index[order])


def test_the_order_is_the_same_in_every_release():
    """Else a run resumed with newer code would read on elsewhere."""
    m = mixture((0, {"x": 0.5, "y": 0.3, "z": 0.2}))
    assert m.assign(np.arange(10))[0].tolist() == [0, 1, 0, 2, 0, 1, 0, 2, 1, 0]
    assert source_seed(1337, "fineweb") == 18016313618298617


def test_ratios_that_never_come_out_even_are_refused():
    for ratios in ({"a": 0.12345678, "b": 0.87654321}, {"a": 1e-10, "b": 1}):  # the latter is not taken for 0
        with pytest.raises(ConfigError, match="round them"):
            mixture((0, ratios))


def test_a_mixture_in_words():
    phases = [(0, {"fineweb": 7, "pycode": 3}), (2000, {"pycode": 1})]
    assert describe_phases(phases) == "70% fineweb + 30% pycode, from step 2000 pycode" and describe_phases([(0, {"x": 1})]) == "x"


# The batches


def batches(ratios, lengths, batch_size=6, accumulation=1, seed=5):
    sources = {name: TrainBatches(dataset([n]), source_seed(seed, name), 8, batch_size, accumulation)
               for name, n in lengths.items()}
    return MixedBatches(sources, mixture((0, ratios), sequences_per_step=batch_size * accumulation), batch_size,
                        accumulation)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("step", [0, 77, 10**9])
def test_any_number_of_processes_and_micro_batches_reads_the_same_global_batch(world_size, step):
    lengths = {"a": 500, "b": 90, "c": 3000}
    ratios = {"a": 0.5, "b": 0.2, "c": 0.3}
    whole = batches(ratios, lengths, 48).micro_batch(step)
    shared = batches(ratios, lengths, 48 // world_size // 2, 2 * world_size)
    parts = [shared.micro_batch(step, m, rank, world_size) for m in range(2) for rank in range(world_size)]
    assert same([torch.cat([p[j] for p in parts]) for j in (0, 1)], whole)
    assert shared.step_targets(step) == 48 * 8


def test_each_source_keeps_its_own_epochs():
    lengths = {"a": 200, "b": 1000}
    b = batches({"a": 0.5, "b": 0.5}, lengths)
    windows = {name: s.n_sequences for name, s in zip(b.mixture.names, b.sources, strict=True)}
    n = 2 * windows["b"]
    source, _ = b.mixture.assign(np.arange(n))
    x, y = b.sequences(np.arange(n))
    assert torch.equal(y, x + 1)
    for number, name in enumerate("ab"):
        mine = x[torch.from_numpy(source == number)]
        starts = mine[:windows[name], 0].tolist()
        assert sorted(starts) == [8 * i for i in range(windows[name])]  # the first epoch, each window once


def test_sources_of_one_size_are_read_in_different_orders():
    b = batches({"a": 0.5, "b": 0.5}, {"a": 900, "b": 900})
    source, _ = b.mixture.assign(np.arange(100))
    x = b.sequences(np.arange(100))[0]
    assert x[torch.from_numpy(source == 0), 0].tolist() != x[torch.from_numpy(source == 1), 0].tolist()


# Epochs


@given(RATIOS, st.integers(1, 50), st.integers(1, 30), st.floats(0.1, 5), st.integers(1, 2000))
def test_what_the_refusal_proposes_is_accepted(ratios, windows, sequences, most, max_iters):
    m = mixture((0, ratios), sequences_per_step=sequences)
    windows = dict.fromkeys(m.names, windows)
    try:
        check_epochs(m, windows, most, max_iters, sequences)
    except ConfigError as error:
        steps = int(str(error).split("max_iters at most ")[1].split(",")[0].rstrip(")"))
        assert 0 <= steps < max_iters
        check_epochs(m, windows, most, steps, sequences)
        with pytest.raises(ConfigError):
            check_epochs(m, windows, most, steps + 1, sequences)
    else:
        assert all(n <= most * windows[name] for name, n in m.consumed(max_iters * sequences).items())


def test_epochs_are_limited_by_name():
    m = mixture((0, {"a": 0.5, "b": 0.5}))
    check_epochs(m, {"a": 10, "b": 10}, {"a": 5}, 100, 1)
    with pytest.raises(ConfigError, match="b would be read 5 times by step 100, and may be 2 times"):
        check_epochs(m, {"a": 10, "b": 10}, {"b": 2}, 100, 1)
    with pytest.raises(ConfigError, match="c is not among the sources"):
        check_epochs(m, {"a": 10, "b": 10}, {"c": 2}, 100, 1)


# A run


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, sources):
    """Two datasets of different text and sizes by one tokenizer, and one by another."""
    folder = tmp_path_factory.mktemp("corpora")
    docs = [p.read_text() for p in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]]
    write_dataset(folder / "code", ByteTokenizer(), [("train", t) for t in sources] + [("val", sources[0])], source="x")
    write_dataset(folder / "prose", ByteTokenizer(), [("train", docs[0]), ("val", docs[-1])], source="x")
    return folder


MIX = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_size=5", "--eval_tokens=256",
       "--device=cpu", "--mfu_peak=1", "--log_interval=1", "--eval_interval=5"]


def train(place, corpora, name, *flags):
    return run_python(ROOT / "train.py", *MIX, f"--data_dir={corpora}", f"--run_name={name}", *flags, cwd=place)


def test_a_mixed_run_accounts_for_every_token_and_resumes_bit_for_bit(tmp_path, corpora):
    asked = ["--dataset_schedule=[(0, {'code': 0.7, 'prose': 0.3}), (6, {'prose': 1})]"]
    whole = train(tmp_path, corpora, "whole", "--max_iters=10", "--lr_decay_iters=10", "--warmup_iters=2", *asked)
    assert whole.returncode == 0, whole.stderr
    run = json.loads((tmp_path / "runs/whole/run.json").read_text())
    consumed = run["results"]["tokens_per_source"]
    assert sum(consumed.values()) == run["results"]["tokens"] == 10 * 5 * 32
    assert abs(consumed["code"] - 0.7 * 6 * 5 * 32) < 32  # within one sequence
    assert run["data"]["sources"]["prose"]["planned_tokens"] == consumed["prose"]
    assert run["data"]["dataset"] == "70% code + 30% prose, from step 6 prose"
    assert run["config"]["dataset_schedule"] == [[0, {"code": 0.7, "prose": 0.3}], [6, {"prose": 1}]]
    evals = records(tmp_path / "runs/whole", "eval")
    for record in evals.values():
        assert record["val_loss"] == record["val_loss/prose"] and record["val_loss/code"] != record["val_loss/prose"]
        assert record["val_bpb/code"] > 0 and record["val_bpb"] == pytest.approx(record["val_bpb/prose"])
    assert "val_loss/code" in whole.stdout and "epochs" in whole.stdout

    cut = train(tmp_path, corpora, "cut", "--max_iters=5", "--lr_decay_iters=10", "--warmup_iters=2", *asked)
    assert cut.returncode == 0, cut.stderr
    resumed = train(tmp_path, corpora, "cut", "--max_iters=10", "--resume=must")
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "runs/cut/model.safetensors").read_bytes() == \
        (tmp_path / "runs/whole/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "runs/cut/run.json").read_text())["results"]["tokens_per_source"] == consumed
    compared = run_python(ROOT / "compare_architectures.py", cwd=tmp_path)
    assert compared.returncode == 0 and "whole" in compared.stdout and "finished" in compared.stdout


def test_one_dataset_in_a_mixture_is_that_dataset(corpora):
    from test_objectives import runtime

    from blockgpt.training.objectives import LanguageModeling
    from configurator import load_config
    flags = [f"--data_dir={corpora}", *MIX]
    alone = LanguageModeling(load_config(["--dataset=code", *flags]), runtime())
    mixed = LanguageModeling(load_config(["--dataset={'code': 3}", *flags]), runtime())
    assert alone.fingerprint == mixed.fingerprint == open_dataset("code", corpora).fingerprint
    for step in (0, 7):
        for a, b in zip(alone.micro_batches(step), mixed.micro_batches(step), strict=True):
            assert same(a, b)
