"""What is observed in a pass: the category of a module, bytes alive, and the imitation of CUDA's operators."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import flex_attention

from blockgpt.accounting.memory import MemoryAccount
from blockgpt.accounting.memory_trace import (
    HEAD,
    CudaOperators,
    LiveBytes,
    SavedTensorRecorder,
    block_index,
    category_of,
    eager_flex_attention,
    run_only_blocks,
)
from model_builder import build_model
from model_config import get_preset


@pytest.mark.parametrize("path, is_embedding, stage, category", [
    ("token_embedding", True, None, "embeddings"), ("embedding_norm", False, "before", "embeddings"),
    ("blocks.0.attn.q_proj", False, "in", "attention"), ("blocks.11.ffn", False, "in", "ffn"),
    ("blocks.1.norm", False, "in", "norms and residual"), ("blocks.1", False, "in", "norms and residual"),
    ("final_norm", False, "after", "norms and residual"), ("lm_head", False, "after", HEAD), ("", False, "after", HEAD),
])
def test_the_category_of_a_module_follows_from_its_path(path, is_embedding, stage, category):
    assert category_of(path, is_embedding, stage) == category


def test_the_block_of_a_module_follows_from_its_path():
    assert [block_index(path) for path in ("", "blocks", "blocks.3", "blocks.12.attn.q_proj", "lm_head")] == [
        None, None, 3, 12, None]


# ---- what is saved, what is alive


class Square(nn.Module):
    def forward(self, x):
        return x * x


class TwoBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Square(), Square()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.exp().sum()


def test_each_saved_storage_is_recorded_once_with_its_module_and_stage():
    model, x = TwoBlocks(), torch.ones(10, requires_grad=True)
    with SavedTensorRecorder(model) as recorder:
        loss = model(x)
        saved = recorder.alive()
    assert [(s.module, s.stage, s.bytes) for s in saved] == [
        ("blocks.0", "in", 40), ("blocks.1", "in", 40), ("", "after", 40)]  # x twice in each product, exp's output
    del loss
    assert [s.module for s in recorder.alive()] == ["blocks.0"]  # x, to which this test has a reference


def test_bytes_are_counted_while_they_are_alive():
    existing = torch.ones(100)
    with LiveBytes([existing]) as live:
        a = existing + 1
        b = a.view(10, 10)  # the same storage
        live.phase = "head"
        a = b = b.double()
        del a, b
        existing + existing
    assert live.events[0] == ("forward", 400)
    assert max(live.events) == ("head", 1200)  # float32 and float64 together
    assert live.bytes == 0


def test_only_the_traced_blocks_run_and_the_phases_follow_the_passes():
    model, x = TwoBlocks(), torch.full((10,), 3.0, requires_grad=True)
    with LiveBytes([x]) as live, run_only_blocks(model, [1], live):
        loss = model(x * 1)  # a block's input must have been allocated in the context
        assert loss.item() == pytest.approx(10 * torch.tensor(9.0).exp().item())
        assert live.by_stage()[1] == 40  # the input of the block, allocated before it
        live.phase = "head"
        loss.backward()
    phases = [phase for phase, _ in live.events]
    assert list(dict.fromkeys(phases)) == ["forward", "head", 1, "embeddings"]
    assert model(x).item() == pytest.approx(10 * torch.tensor(81.0).exp().item())


# ---- CUDA's operators


def account(dtype, **overrides):
    sizes = dict(n_layer=1, n_head=2, n_embd=32, d_ff=48, block_size=64, vocab_size=16)
    return MemoryAccount(build_model, get_preset("llama", **{**sizes, **overrides}), dtype, gpu=True)


def test_cudas_attention_saves_no_weights_for_dropout():
    plain, dropout = account(torch.float32), account(torch.float32, dropout=0.1)
    more = dropout.saved_in("blocks.0").per_sequence - plain.saved_in("blocks.0").per_sequence
    assert more == 2 * 64 * 32  # one bool for each output of attention and FFN


def test_cudas_rmsnorm_saves_its_input_and_one_value_per_row():
    assert account(torch.float32).saved_in("final_norm").per_sequence == 4 * 64 * (32 + 1)


def test_cudas_autocast_runs_the_softmax_in_float32():
    manual = account(torch.bfloat16, attention_backend="manual").saved_in("blocks.0.attn").per_sequence
    fused = account(torch.bfloat16).saved_in("blocks.0.attn").per_sequence
    weights = 2 * 64 * 64
    # The weights in both dtypes; no logsumexp and no second output.
    assert manual - fused == weights * (4 + 2) - 4 * 2 * 64 - 2 * 64 * 32


def test_flex_attention_saves_what_the_fused_kernel_does():
    fused = account(torch.bfloat16, n_layer=3).saved_by_category()
    assert account(torch.bfloat16, n_layer=3, attention_backend="flex", attn_softcap=5.0).saved_by_category() == fused


def test_autocast_functions_take_float32_only_under_autocast():
    x = torch.ones(4, dtype=torch.bfloat16)
    with CudaOperators(autocast=True):
        assert F.softmax(x, dim=0).dtype == torch.float32 and (x + x).dtype == torch.bfloat16
    with CudaOperators(autocast=False):
        assert F.softmax(x, dim=0).dtype == torch.bfloat16


def test_flex_attention_is_restored_after_the_context_also_after_an_error():
    names = ("_validate_device", "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG")
    originals = [getattr(flex_attention, name) for name in names]
    with pytest.raises(RuntimeError), eager_flex_attention():
        assert [getattr(flex_attention, name) for name in names] != originals
        raise RuntimeError
    assert [getattr(flex_attention, name) for name in names] == originals
