"""The memory of a training step, compared byte by byte with steps that torch really runs on this CPU."""

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
from blockgpt.accounting.memory_trace import CATEGORIES
from blockgpt.training.optimizers import build_optimizer
from blockgpt.training.recompute import CHECKPOINTING_MODES, recompute
from configurator import load_config
from model_builder import build_model
from model_config import PRESETS, ModelConfig, get_preset

SIZES = {
    "usual": dict(n_layer=3, n_head=4, n_embd=64, vocab_size=96, block_size=32),
    "odd": dict(n_layer=1, n_head=6, n_kv_head=2, n_embd=48, head_dim=16, d_ff=99, vocab_size=5, block_size=7,
                bias=True),
}
DTYPES = (torch.float32, torch.bfloat16)


def autocast(dtype, device="cpu"):
    return torch.autocast(device, dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext()


def batch(config, sequences):
    return torch.randint(0, config.vocab_size, (sequences, config.block_size))


def saved_by_autograd(config, dtype, sequences):
    """Bytes that autograd saves in a forward pass on this CPU: every storage once, without the parameters."""
    model, saved = build_model(config), {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def save(t):
        saved[t.untyped_storage().data_ptr()] = t
        return t

    idx = batch(config, sequences)
    with autocast(dtype), torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        model(idx, idx, segment_ids=torch.zeros_like(idx))
    return sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in parameters)


def tracked_peak(config, dtype, sequences, accumulating=False, checkpointing="none", build=build_model):
    """The peak that torch's `MemTracker` measures in a step on this CPU. The optimizer state exists before it."""
    model = build(config)
    optimizer = build_optimizer(model, load_config(["--device=cpu"]), torch.device("cpu"))
    idx = batch(config, sequences)
    recompute(model, checkpointing)

    def backward():
        with autocast(dtype):
            loss = model(idx, idx)
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


def computed_peak(account, sequences, accumulating=False, checkpointing="none"):
    """The account's parameters and optimizer state, and its largest phase."""
    phases = account.phases(sequences, checkpointing, accumulating)
    return (account.parameter_bytes + account.optimizer_bytes
            + max((account.gradient_bytes if accumulating else phase.gradients) + phase.activations + phase.logits
                  for phase in phases))


# ---- what exists between steps


@pytest.mark.grid(4)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", PRESETS)
def test_parameters_gradients_and_optimizer_state_equal_those_of_a_step(name, tied):
    config = get_preset(name, **SIZES["usual"], weight_tying=tied)
    account, model = MemoryAccount(build_model, config, torch.float32, gpu=False), build_model(config)
    optimizer = build_optimizer(model, load_config(["--device=cpu"]), torch.device("cpu"))
    idx = batch(config, 2)
    model(idx, idx).backward()
    optimizer.step()

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    assert account.parameter_bytes == size(model.parameters())
    assert account.gradient_bytes == size(p.grad for p in model.parameters())
    assert account.optimizer_bytes == size(t for state in optimizer.state.values() for t in state.values())
    assert sum(account.parameters_by_category().values()) == model.parameter_counts()["total"]


def test_parameters_are_counted_by_category():
    config = get_preset("llama", n_layer=2, n_head=2, n_embd=8, d_ff=16, block_size=4, vocab_size=10)
    counts = MemoryAccount(build_model, config, torch.float32, gpu=False).parameters_by_category()
    assert counts == dict(zip(CATEGORIES, (80, 2 * 4 * 64, 2 * 3 * 128, 2 * 2 * 8 + 8, 80), strict=True))


# ---- what the forward pass saves


GRID = list(itertools.product(SIZES, (0.0, 0.1), ("sdpa", "manual")))  # 8 ways for each preset and dtype


@pytest.mark.grid(4)
@pytest.mark.parametrize("name, dtype, size, dropout, backend", [
    pytest.param(name, dtype, *case, marks=() if i == (4 * j + n) % 8 else pytest.mark.long)  # one of the 8 is short
    for n, name in enumerate(PRESETS) for j, dtype in enumerate(DTYPES) for i, case in enumerate(GRID)], ids=str)
def test_saved_bytes_equal_those_that_autograd_saves(name, dtype, size, dropout, backend):
    if backend not in get_preset(name).supported_backends():
        backend = "auto"  # Gemma 2's softcaps
    config = get_preset(name, **SIZES[size], attention_backend=backend, dropout=dropout)
    account = MemoryAccount(build_model, config, dtype, gpu=False)
    assert account.saved_in()(5) == saved_by_autograd(config, dtype, 5)
    # Of one sequence, `manual`'s products take views of the joint projection where they copy its parts of several.
    exact = config.resolve("cpu").attention_backend == "sdpa"
    assert account.saved_in()(1) == pytest.approx(saved_by_autograd(config, dtype, 1), rel=0 if exact else 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("residue", [0, *(pytest.param(i, marks=pytest.mark.long) for i in range(1, 8))])
def test_parameters_and_saved_bytes_equal_torchs_for_all_pairs_of_options(residue):
    space = {**architectures.SPACE, "attention_backend": ("sdpa", "manual")}  # flex has no backward pass on a CPU
    for i, options in enumerate(architectures.covering(space, at_least=200)[0][residue::8]):
        config = ModelConfig(**architectures.TINY | options)
        account, dtype = MemoryAccount(build_model, config, DTYPES[i % 2], gpu=False), DTYPES[i % 2]
        counts = account.parameters_by_category()
        assert sum(counts.values()) == sum(p.numel() for p in build_model(config).parameters())
        # Equal, except for LayerNorm in bfloat16: its fake kernel does not know that it saves statistics in float32.
        assert account.saved_in()(2) == pytest.approx(saved_by_autograd(config, dtype, 2), rel=0.02), options


@pytest.mark.grid(4)
@pytest.mark.parametrize("name", PRESETS)
def test_the_bytes_of_modules_add_up_to_those_of_their_parent(name):
    account = MemoryAccount(build_model, get_preset(name, **SIZES["usual"]), torch.bfloat16, gpu=False)
    model_total = account.saved_in()
    assert model_total.per_sequence > 0
    assert sum(account.saved_by_category().values(), LinearBytes()) == model_total
    parents = {parent for s in account.saved for parent in (s.module, s.module.rpartition(".")[0])} - {""}
    for parent in parents:
        descendants = {s.module for s in account.saved if s.module.startswith(f"{parent}.")}
        children = {f"{parent}.{path.removeprefix(f'{parent}.').split('.')[0]}" for path in descendants}
        own = sum((s.bytes for s in account.saved if s.module == parent), LinearBytes())
        assert account.saved_in(parent) == sum((account.saved_in(child) for child in children), own)
    for i, block in enumerate(account.blocks):
        assert block.saved_with_copies == account.saved_in(f"blocks.{i}")
    after = sum((s.bytes for s in account.saved if s.stage == "after"), LinearBytes())
    assert sum((b.saved_with_copies for b in account.blocks), account.outside_blocks + after) == model_total


@pytest.mark.parametrize("name, dtype", itertools.product(("gpt2", "gemma2"), DTYPES), ids=str)
@pytest.mark.parametrize("chunk", [9, 32, 50])  # shorter than a sequence of 32, one, longer
def test_saved_bytes_of_a_loss_by_chunks_equal_those_that_autograd_saves(name, dtype, chunk):
    config = get_preset(name, **SIZES["usual"], loss_chunk=chunk)
    for sequences in (1, 2, 5):
        account = MemoryAccount(build_model, config, dtype, gpu=False, sequences=sequences)
        assert account.saved_in()(sequences) == saved_by_autograd(config, dtype, sequences)


def test_saved_bytes_of_a_known_block_equal_those_counted_by_hand():
    T, C, F, V = 8, 16, 40, 12
    config = get_preset("gpt2_openai", n_layer=2, n_head=2, n_embd=C, d_ff=F, block_size=T, vocab_size=V, bias=False)
    account = MemoryAccount(build_model, config, torch.float32, gpu=False)
    saved = {category: size.per_sequence for category, size in account.saved_by_category().items()}
    assert saved["ffn"] == 2 * 4 * T * (C + F + F)  # the input; before and after the activation
    assert saved["attention"] == 2 * 4 * T * (C + 3 * C + 2 + C)  # the input; q, k, v; logsumexp; the output
    assert saved["norms and residual"] == 5 * 4 * T * (C + 2)  # the input, its mean and standard deviation
    assert saved["output head and loss"] == 4 * T * (C + V)  # the input, log-probabilities; the targets are the tokens
    assert saved["embeddings"] == 8 * T  # the tokens


def test_a_new_component_is_counted_without_declaring_anything(monkeypatch):
    class Cubed(nn.Module):
        def forward(self, x):
            return x.exp().sin()  # saves both intermediate results

    def saved(activation):
        config = get_preset("gpt2", **SIZES["usual"], activation=activation)
        return MemoryAccount(build_model, config, torch.float32, gpu=False).saved_by_category()

    monkeypatch.setattr(model_components, "ReLU2", Cubed)
    before, after = saved("relu"), saved("relu2")
    # One more tensor of width d_ff in each layer.
    assert after.pop("ffn") - before.pop("ffn") == LinearBytes(0, 3 * 4 * 32 * 256)
    assert after == before


# ---- what is alive during a step


PEAK_SHAPES = (
    (6, dict(n_layer=3, n_head=4, n_embd=128, block_size=64, vocab_size=512)),
    (1, dict(n_layer=5, n_head=2, n_embd=256, block_size=16, vocab_size=99, dropout=0.1)),
)


@pytest.mark.slow
@pytest.mark.parametrize("name, dtype, sequences, shape", [
    pytest.param(name, dtype, *shape, marks=() if i == 0 else pytest.mark.long) for i, (name, dtype, shape) in
    enumerate(itertools.product(("gpt2", "llama"), DTYPES, PEAK_SHAPES))])
def test_the_peak_equals_that_of_torchs_tracker(name, dtype, sequences, shape):
    config = get_preset(name, **shape)
    account = MemoryAccount(build_model, config, dtype, gpu=False)
    for accumulating, checkpointing in itertools.product((False, True), CHECKPOINTING_MODES):
        measured = tracked_peak(config, dtype, sequences, accumulating, checkpointing)
        assert computed_peak(account, sequences, accumulating, checkpointing) == pytest.approx(measured, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name, dtype", [("gpt2", DTYPES[0]),
                                         pytest.param("llama", DTYPES[1], marks=pytest.mark.long)], ids=str)
def test_the_peak_of_a_loss_by_chunks_equals_that_of_torchs_tracker(name, dtype):
    """With chunks shorter and longer than a sequence, of batches that are cut and of one that is not."""
    sizes = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=2048)
    for chunk, sequences in ((10, 4), (40, 6), (40, 2)):
        account = MemoryAccount(build_model, get_preset(name, **sizes, loss_chunk=chunk), dtype, gpu=False)
        for accumulating in (False, True):
            measured = tracked_peak(get_preset(name, **sizes, loss_chunk=chunk), dtype, sequences, accumulating)
            assert computed_peak(account, sequences, accumulating) == pytest.approx(measured, rel=1e-3)


@pytest.mark.slow
def test_each_of_several_block_types_is_run():
    def build_uneven(config):
        model = build_model(config)
        device = model.lm_head.weight.device
        model.blocks[1].ffn = nn.Sequential(nn.Linear(64, 640, device=device), nn.Sigmoid(),
                                            nn.Linear(640, 64, device=device))
        return model

    config = get_preset("gpt2", n_layer=4, n_head=2, n_embd=64, vocab_size=32, block_size=32)
    account = MemoryAccount(build_uneven, config, torch.float32, gpu=False)
    signatures = [block.signature for block in account.blocks]
    assert signatures[0] == signatures[2] == signatures[3] != signatures[1]
    for checkpointing in CHECKPOINTING_MODES:
        measured = tracked_peak(config, torch.float32, 4, checkpointing=checkpointing, build=build_uneven)
        assert computed_peak(account, 4, checkpointing=checkpointing) == pytest.approx(measured, rel=0.02)


shapes = st.fixed_dictionaries(dict(n_layer=st.integers(1, 3), n_head=st.sampled_from([1, 2]), vocab_size=st.integers(
    1, 70), block_size=st.integers(1, 33), n_embd=st.sampled_from([32, 48, 64])))


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(name=st.sampled_from(sorted(PRESETS)), shape=shapes, sequences=st.integers(1, 9), accumulating=st.booleans(),
       checkpointing=st.sampled_from(sorted(CHECKPOINTING_MODES)), dtype=st.sampled_from(DTYPES))
def test_memory_grows_with_the_batch_and_the_layers(name, shape, sequences, accumulating, checkpointing, dtype):
    options = (accumulating, checkpointing)
    account = MemoryAccount(build_model, get_preset(name, **shape), dtype, gpu=True)
    deeper = MemoryAccount(build_model, get_preset(name, **{**shape, "n_layer": shape["n_layer"] + 1}), dtype, gpu=True)
    # Equal if the optimizer's step is the peak.
    assert computed_peak(account, sequences, *options) <= computed_peak(account, sequences + 1, *options)
    assert account.saved_in()(sequences) < account.saved_in()(sequences + 1)
    assert computed_peak(account, sequences, *options) < computed_peak(deeper, sequences, *options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", CHECKPOINTING_MODES)
@pytest.mark.parametrize("name", PRESETS)
def test_the_estimate_is_within_a_tenth_of_the_peak_on_a_gpu(name, checkpointing):
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
            loss = model(idx, idx)
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    measured = torch.cuda.max_memory_allocated()
    assert computed_peak(account, 8, checkpointing=checkpointing) == pytest.approx(measured, rel=0.1)
