"""tools.attention_memory: the memory of each backend that supports a request, and the backend that `auto` takes."""

import re

import pytest

from blockgpt.errors import UserError
from tools import attention_memory

FLAGS = ["--n_layer=2", "--n_head=16", "--n_embd=32", "--vocab_size=32"]


@pytest.mark.slow
def test_only_manual_grows_with_the_square_of_the_length_and_auto_avoids_it_on_cuda(capsys, monkeypatch):
    monkeypatch.setattr(attention_memory, "DTYPES", ("float32",))
    tables = []
    for block_size in (512, 1024):
        attention_memory.main([*FLAGS, f"--block_size={block_size}"])
        lines = capsys.readouterr().out.splitlines()[3:]
        tables.append({row[0]: row[1:] for row in (re.split(r"  +", line) for line in lines)})
    assert tables[0].keys() == {"causal", "window", "documents", "ALiBi", "softcap", "softcap, dropout"}
    for name, (sdpa, manual, flex, auto) in tables[1].items():
        assert (sdpa == "–") == ("softcap" in name) and (flex == "–") == ("dropout" in name)
        scores = 2 * 16 * 1024**2 * 4 / 2**30  # of both layers and heads
        assert float(manual) > scores - 0.01 and (flex == "–" or float(flex) < scores / 4)
        assert float(manual) > 3 * float(tables[0][name][1])
        assert auto.split(", ")[0] == ("manual" if "dropout" in name else "sdpa" if name == "causal" else "flex")


def test_an_invalid_key_is_named_in_the_error():
    with pytest.raises(UserError, match="--n_layers"):
        attention_memory.main(["--n_layers=2"])
