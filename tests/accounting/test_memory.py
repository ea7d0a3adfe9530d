"""model_memory: the account of a step against steps that torch really takes, storage by storage."""

import contextlib
import gc
import itertools

import architectures
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._tools.mem_tracker import MemTracker

import model_components
from blockgpt.accounting.memory import LinearBytes, MemoryAccount
from blockgpt.accounting.memory_trace import PARTS
from blockgpt.training.optimizers import build_optimizer
from blockgpt.training.recompute import CHECKPOINTING_MODES, recompute
from configurator import load_config
from model_builder import build_model
from model_config import PRESETS, ModelConfig, get_preset

SIZES = (dict(n_layer=3, n_head=4, n_embd=64, vocab_size=96, block_size=32),
         dict(n_layer=1, n_head=6, n_kv_head=2, n_embd=48, head_dim=16, d_ff=99, vocab_size=5, block_size=7, bias=True))
DTYPES = (torch.float32, torch.bfloat16)


def autocast(dtype, device="cpu"):
    return torch.autocast(device, dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext()


def batch(config, sequences):
    return torch.randint(0, config.vocab_size, (sequences, config.block_size))


def really_saved(config, dtype, sequences):
    """Bytes that autograd keeps of a forward pass on this CPU: every storage once, the parameters left out."""
    model, kept = build_model(config), {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    idx = batch(config, sequences)
    with autocast(dtype), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(idx, idx, documents=torch.zeros_like(idx))
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)


def really_needed(config, dtype, sequences, accumulating=False, checkpointing="none"):
    """The peak of torch's own `MemTracker` in a step on this CPU, after a step that made the optimizer's state."""
    model = build_model(config)
    optimizer = build_optimizer(model, load_config(["--device=cpu"]), torch.device("cpu"))
    idx = batch(config, sequences)
    recompute(model, checkpointing)

    def backward():
        with autocast(dtype):
            loss = model(idx, idx)[1]
        loss.backward()

    backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if accumulating:
        backward()
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        backward()
        optimizer.step()
    snapshot, = tracker.get_tracker_snapshot("peak").values()
    return snapshot["Total"]


def peak(account, sequences, accumulating=False, checkpointing="none"):
    """The account's parameters and optimizer state, and the fullest moment of a step."""
    moments = account.moments(sequences, checkpointing, accumulating)
    held = account.gradient_bytes if accumulating else None
    return (account.parameter_bytes + account.optimizer_bytes
            + max((made if held is None else held) + activations + logits for made, activations, logits in moments))


# ---- what stays from step to step


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", PRESETS)
def test_parameters_gradients_and_optimizer_state_are_those_of_a_step(name, tied):
    config = get_preset(name, **SIZES[0], weight_tying=tied)
    account, model = MemoryAccount(build_model, config, torch.float32, gpu=False), build_model(config)
    optimizer = build_optimizer(model, load_config(["--device=cpu"]), torch.device("cpu"))
    idx = batch(config, 2)
    model(idx, idx)[1].backward()
    optimizer.step()

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    assert account.parameter_bytes == size(model.parameters())
    assert account.gradient_bytes == size(p.grad for p in model.parameters())
    assert account.optimizer_bytes == size(t for state in optimizer.state.values() for t in state.values())
    assert sum(account.parameters_by_part().values()) == model.parameter_counts()["total"]


def test_parameters_are_told_by_their_place():
    config = get_preset("llama", n_layer=2, n_head=2, n_embd=8, d_ff=16, block_size=4, vocab_size=10)
    parts = MemoryAccount(build_model, config, torch.float32, gpu=False).parameters_by_part()
    assert parts == dict(zip(PARTS, (80, 2 * 4 * 64, 2 * 3 * 128, 2 * 2 * 8 + 8, 80), strict=True))


# ---- what the forward pass saves


@pytest.mark.parametrize("size", SIZES, ids=["usual", "odd"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("backend", ["sdpa", "manual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_saved_bytes_are_those_that_autograd_keeps(name, dtype, backend, dropout, size):
    if backend not in get_preset(name).supported_backends():
        backend = "auto"  # Gemma 2's softcaps
    config = get_preset(name, **size, attention_backend=backend, dropout=dropout)
    account = MemoryAccount(build_model, config, dtype, gpu=False)
    for sequences in (1, 5):
        assert account.saved_in()(sequences) == really_saved(config, dtype, sequences)


@pytest.mark.parametrize("part", [0, 1, *(pytest.param(i, marks=pytest.mark.long) for i in range(2, 8))])
def test_parameters_and_saved_bytes_are_true_for_all_pairs_of_options(part):
    space = {**architectures.SPACE, "attention_backend": ("sdpa", "manual")}  # flex has no backward pass on a CPU
    for i, chosen in enumerate(architectures.covering(space, at_least=200)[0][part::8]):
        config = ModelConfig(**architectures.TINY | chosen)
        account, dtype = MemoryAccount(build_model, config, DTYPES[i % 2], gpu=False), DTYPES[i % 2]
        assert sum(account.parameters_by_part().values()) == sum(p.numel() for p in build_model(config).parameters())
        # Equal, but for a LayerNorm in bfloat16: its kernel keeps its statistics in float32, its fake one does not say.
        assert account.saved_in()(2) == pytest.approx(really_saved(config, dtype, 2), rel=0.02), chosen


@pytest.mark.parametrize("name", PRESETS)
def test_parents_add_up(name):
    account = MemoryAccount(build_model, get_preset(name, **SIZES[0]), torch.bfloat16, gpu=False)
    whole = account.saved_in()
    assert whole.per_sequence > 0
    assert sum(account.saved_by_part().values(), LinearBytes()) == whole
    parents = {parent for s in account.saved for parent in (s.module, s.module.rpartition(".")[0])} - {""}
    for parent in parents:
        children = {s.module for s in account.saved if s.module.startswith(f"{parent}.")}
        nearest = {f"{parent}.{path.removeprefix(f'{parent}.').split('.')[0]}" for path in children}
        own = sum((s.bytes for s in account.saved if s.module == parent), LinearBytes())
        assert account.saved_in(parent) == sum((account.saved_in(child) for child in nearest), own)
    for i, block in enumerate(account.blocks):
        assert block.held == account.saved_in(f"blocks.{i}")
    assert account.shell + sum((b.held for b in account.blocks), LinearBytes()) + sum(
        (s.bytes for s in account.saved if s.stage == "after"), LinearBytes()) == whole


def test_each_part_of_a_known_block_is_what_can_be_counted_by_hand():
    T, C, F, V = 8, 16, 40, 12
    account = MemoryAccount(build_model, get_preset("gpt2_openai", n_layer=2, n_head=2, n_embd=C, d_ff=F, block_size=T, vocab_size=V,
                                       bias=False), torch.float32, gpu=False)
    parts = {part: line.per_sequence for part, line in account.saved_by_part().items()}
    assert parts["ffn"] == 2 * 4 * T * (C + F + F)  # what comes in; before and behind the activation
    assert parts["attention"] == 2 * 4 * T * (C + 3 * C + 2 + C)  # what comes in; q, k, v; logsumexp; what goes out
    assert parts["norms and residual"] == 5 * 4 * T * (C + 2)  # what comes in, its mean and deviation
    assert parts["output head and loss"] == 4 * T * (C + V)  # what comes in, log-probabilities; the targets are tokens
    assert parts["embeddings"] == 8 * T  # the tokens


def test_a_component_that_nobody_told_of_is_counted(monkeypatch):
    class Cubed(nn.Module):
        def forward(self, x):
            return x.exp().sin()  # saves both of what it computes on the way

    config = get_preset("gpt2", **SIZES[0], activation="relu")
    before = MemoryAccount(build_model, config, torch.float32, gpu=False).saved_by_part()
    monkeypatch.setattr(model_components, "ReLU", Cubed)
    after = MemoryAccount(build_model, config, torch.float32, gpu=False).saved_by_part()
    assert after.pop("ffn") - before.pop("ffn") == LinearBytes(0, 3 * 4 * 32 * 256)  # a layer: one d_ff wide tensor more
    assert after == before


# ---- what lives while it runs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_peak_is_that_of_torchs_tracker(name, dtype):
    for sequences, overrides in ((6, dict(n_layer=3, n_head=4, n_embd=128, block_size=64, vocab_size=512)),
                                 (1, dict(n_layer=5, n_head=2, n_embd=256, block_size=16, vocab_size=99, dropout=0.1))):
        config = get_preset(name, **overrides)
        account = MemoryAccount(build_model, config, dtype, gpu=False)
        for accumulating, checkpointing in itertools.product((False, True), CHECKPOINTING_MODES):
            measured = really_needed(config, dtype, sequences, accumulating, checkpointing)
            assert peak(account, sequences, accumulating, checkpointing) == pytest.approx(measured, rel=1e-3)


def test_blocks_of_several_kinds_are_each_run(monkeypatch):
    even = build_model

    def uneven(config, **kwargs):
        model = even(config, **kwargs)
        model.blocks[1].ffn = nn.Sequential(nn.Linear(64, 640, device=model.lm_head.weight.device), nn.Sigmoid(),
                                            nn.Linear(640, 64, device=model.lm_head.weight.device))
        return model

    config = get_preset("gpt2", n_layer=4, n_head=2, n_embd=64, vocab_size=32, block_size=32)
    account = MemoryAccount(uneven, config, torch.float32, gpu=False)
    kinds = [block.kind for block in account.blocks]
    assert kinds[0] == kinds[2] == kinds[3] != kinds[1]
    monkeypatch.setitem(globals(), "build_model", uneven)
    for checkpointing in CHECKPOINTING_MODES:
        assert peak(account, 4, checkpointing=checkpointing) == pytest.approx(
            really_needed(config, torch.float32, 4, checkpointing=checkpointing), rel=0.02)


sizes = st.fixed_dictionaries(dict(n_layer=st.integers(1, 3), n_head=st.sampled_from([1, 2]), vocab_size=st.integers(
    1, 70), block_size=st.integers(1, 33), n_embd=st.sampled_from([32, 48, 64])))


@settings(max_examples=8, deadline=None)
@given(name=st.sampled_from(sorted(PRESETS)), size=sizes, sequences=st.integers(1, 9), accumulating=st.booleans(),
       checkpointing=st.sampled_from(sorted(CHECKPOINTING_MODES)), dtype=st.sampled_from(DTYPES))
def test_memory_grows_with_the_batch_and_the_layers(name, size, sequences, accumulating, checkpointing, dtype):
    how = (accumulating, checkpointing)
    account = MemoryAccount(build_model, get_preset(name, **size), dtype, gpu=True)
    deeper = MemoryAccount(build_model, get_preset(name, **{**size, "n_layer": size["n_layer"] + 1}), dtype, gpu=True)
    assert peak(account, sequences, *how) <= peak(account, sequences + 1, *how)  # equal: in the optimizer's step
    assert account.saved_in()(sequences) < account.saved_in()(sequences + 1)
    assert peak(account, sequences, *how) < peak(deeper, sequences, *how)


# ---- as on a GPU


def llama(dtype, **overrides):
    sizes = dict(n_layer=1, n_head=2, n_embd=32, d_ff=48, block_size=64, vocab_size=16)
    return MemoryAccount(build_model, get_preset("llama", **{**sizes, **overrides}), dtype, gpu=True)


def test_a_gpus_attention_keeps_no_weights_for_dropout():
    plain, dropped = llama(torch.float32), llama(torch.float32, dropout=0.1)
    more = dropped.saved_in("blocks.0").per_sequence - plain.saved_in("blocks.0").per_sequence
    assert more == 2 * 64 * 32  # a bool for each output of attention and FFN


def test_a_gpus_rmsnorm_keeps_its_input_and_a_number_a_row():
    saved = llama(torch.float32).saved_in("final_norm").per_sequence
    assert saved == 4 * 64 * (32 + 1)


def test_a_gpus_autocast_takes_the_softmax_in_float32():
    manual = llama(torch.bfloat16, attention_backend="manual").saved_in("blocks.0.attn").per_sequence
    fused = llama(torch.bfloat16).saved_in("blocks.0.attn").per_sequence
    weights = 2 * 64 * 64
    assert manual - fused == weights * (4 + 2) - 4 * 2 * 64 - 2 * 64 * 32  # both types; no logsumexp, no second output


def test_flex_attention_costs_what_the_fused_kernel_does():
    fused = llama(torch.bfloat16, n_layer=3).saved_by_part()
    assert llama(torch.bfloat16, n_layer=3, attention_backend="flex", attn_softcap=5.0).saved_by_part() == fused


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", CHECKPOINTING_MODES)
@pytest.mark.parametrize("name", PRESETS)
def test_the_estimate_is_within_a_tenth_of_a_gpus_peak(name, checkpointing):
    config = get_preset(name, n_layer=6, n_head=12, n_embd=768, block_size=1024, vocab_size=50304)
    account, device = MemoryAccount(build_model, config, torch.bfloat16, gpu=True), torch.device("cuda")
    model = build_model(config, device=device)
    optimizer = build_optimizer(model, load_config(["--device=cuda"]), device)
    idx = batch(config, 8).to(device)
    recompute(model, checkpointing)
    for _ in range(2):
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        with autocast(torch.bfloat16, "cuda"):
            loss = model(idx, idx)[1]
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert peak(account, 8, checkpointing=checkpointing) == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)
