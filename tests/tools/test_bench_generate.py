"""tools.bench_generate: it generates with and without the cache, and takes the keys of train.py."""

import re

import pytest

from blockgpt.errors import UserError
from tools import bench_generate


def test_it_prints_the_seconds_with_and_without_the_cache(capsys):
    bench_generate.main(["--n_layer=2", "--n_embd=32", "--n_head=2", "--block_size=16", "--vocab_size=64",
                         "--device=cpu", "--new_tokens=3"])
    assert re.search(r"2L-2H-32D.*3 new tokens on cpu: .* s with the cache, .* s without", capsys.readouterr().out)


@pytest.mark.parametrize("flag, message", [
    ("--new_tokens=many", "--new_tokens: invalid int value: 'many'"), ("--n_layers=2", "--n_layers")])
def test_an_invalid_flag_is_named_in_the_error(flag, message):
    with pytest.raises(UserError, match=message):
        bench_generate.main([flag])
