"""tools/simulate_studies.py --runs: real runs of a baseline against itself (simulations: test_verdicts.py)."""

import re

import pytest
from scipy import stats

from blockgpt.errors import UserError
from tools.bench_compare import write_runs
from tools.simulate_studies import binomial_interval, compare_with_itself, main


def test_every_seed_is_in_one_side_of_one_comparison():
    values = {seed: 2 + 0.01 * (seed * 7 % 11) for seed in (*range(10, 0, -1), 11, 12, 13)}
    first, second = compare_with_itself(values, 3)
    expected = stats.ttest_ind([values[s] for s in (4, 5, 6)], [values[s] for s in (1, 2, 3)], equal_var=False)
    assert first.p == pytest.approx(expected.pvalue) and "Welch" in first.method
    assert second.difference.mean == pytest.approx(sum(values[s] for s in (10, 11, 12)) / 3
                                                   - sum(values[s] for s in (7, 8, 9)) / 3)


def test_real_runs_are_compared_with_themselves(tmp_path, capsys):
    write_runs(tmp_path, 13, seeds=13)
    main(["--runs", f"{tmp_path}/*", "--seeds=3"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(re.match(r"\| [+-]\d", line) is not None for line in lines) == 2
    assert re.fullmatch(r"better or worse: \d of 2 \(.*% \[.*\]\)", lines[-1])


def test_other_runs_are_refused(tmp_path):
    write_runs(tmp_path, 12, seeds=6)
    with pytest.raises(UserError, match="has 2 experiments"):
        main(["--runs", f"{tmp_path}/*"])
    with pytest.raises(UserError, match="has 6 finished runs, but needs 8 or more"):
        main(["--runs", f"{tmp_path}/0000[0-5]", "--seeds=4"])


@pytest.mark.parametrize("successes", [0, 1, 7, 20])
def test_the_interval_of_a_rate_is_the_exact_one(successes):
    expected = stats.binomtest(successes, 20).proportion_ci(method="exact")
    assert binomial_interval(successes, 20) == pytest.approx((expected.low, expected.high))
