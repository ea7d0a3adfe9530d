"""A criterion orders values, and nothing is better than the best that was measured."""

import math

import pytest

from blockgpt.training.criterion import Criterion


@pytest.mark.parametrize("more_is_better", [False, True])
def test_only_a_strictly_better_value_is_better(more_is_better):
    criterion, worse, better = Criterion("x", more_is_better), *((1.0, 2.0) if more_is_better else (2.0, 1.0))
    assert criterion.is_better(better, worse) and criterion.is_better(worse, None)
    assert not criterion.is_better(worse, better) and not criterion.is_better(worse, worse)
    assert not criterion.is_better(math.nan, worse) and not criterion.is_better(math.nan, None)
    assert sorted([worse, better], key=criterion.sort_key) == [better, worse]
