"""The hint after an out-of-memory error: in which order, and that it keeps the step as it is."""

import pytest

from blockgpt.accounting.out_of_memory import out_of_memory_hint


@pytest.mark.parametrize("state, changes", [
    ((16, 2, 1, "none", False, False), "halve batch_size (--batch_size=8), then double gradient_accumulation_steps "
     "(--gradient_accumulation_steps=4), then --activation_checkpointing=full"),
    ((15, 2, 1, "full", False, False), "--batch_size=5 with --gradient_accumulation_steps=6"),
    ((1, 8, 8, "selective", False, False), "--activation_checkpointing=full, then --use_zero1=True, then "
     "--use_fsdp=True"),
    ((1, 8, 8, "full", True, False), "--use_fsdp=True"),
    ((1, 8, 8, "full", False, True), "a smaller block_size, n_embd or n_layer, or more processes"),
    ((1, 1, 1, "full", False, False), "a smaller block_size, n_embd or n_layer, or more processes"),
])
def test_the_hint_names_the_cheapest_change_first_and_none_that_is_in_use(state, changes):
    assert out_of_memory_hint(*state) == f"out of memory: {changes}"


def test_the_hint_keeps_the_sequences_per_step():
    for batch_size in range(2, 50):
        text = out_of_memory_hint(batch_size, 6, 2, "none", False, False)
        sizes = {key: int(text.split(f"--{key}=")[1].split()[0].strip("),"))
                 for key in ("batch_size", "gradient_accumulation_steps")}
        assert sizes["batch_size"] * sizes["gradient_accumulation_steps"] == batch_size * 6
        assert sizes["batch_size"] < batch_size and sizes["gradient_accumulation_steps"] % 2 == 0
