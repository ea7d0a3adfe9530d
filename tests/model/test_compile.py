"""torch.compile of the plain model into one graph, for every preset: forward pass, loss and gradients as in eager mode.

The backend "aot_eager" traces what a GPU's run traces and runs the graph with the eager kernels, so it shows a graph
break or a wrong trace without generating code. One case uses inductor, the default backend.
"""

import pytest
import torch

from model_builder import build_model
from model_config import PRESETS, get_preset

TINY = dict(n_layer=2, n_head=2, n_embd=32, vocab_size=64, block_size=16)
SHORT = ("gpt2", "gemma3")  # learned positions and one mask; rotations and masks for two windows


def compare(name, backend, **keys):
    """Assert that the compiled model of a preset is the eager one."""
    torch.compiler.reset()
    model = build_model(get_preset(name, **{**TINY, "init_std": 0.2, **keys}))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    idx = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(0))
    x, y = idx[:, :-1], idx[:, 1:]
    segment_ids = (torch.arange(16) // 5).expand(2, -1)
    losses, gradients = [], []
    for m in (model, compiled):
        model.zero_grad(set_to_none=True)
        losses.append(m(x, y, segment_ids))
        losses[-1].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for n, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][n], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item(),
                                   msg=lambda m, n=n: f"{n}: {m}")
    with torch.no_grad():
        logits, expected = compiled(x, segment_ids=segment_ids), model(x, segment_ids=segment_ids)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if name in SHORT else pytest.mark.long) for name in PRESETS])
def test_a_preset_compiles_into_one_graph(name):
    windows = dict(sliding_window=5, window_pattern="SL") if name == "gemma3" else {}
    compare(name, "aot_eager", **windows)


@pytest.mark.slow
def test_a_loss_by_chunks_and_a_layer_without_rope_compile_into_one_graph():
    compare("gemma2", "aot_eager", loss_chunk=12, rope_pattern="NR")  # of 32 tokens


@pytest.mark.long
def test_a_preset_with_document_masks_compiles_into_one_graph():
    compare("modern", "aot_eager", mask_documents=True)


@pytest.mark.long
def test_inductors_code_computes_the_same():
    compare("llama", "inductor")
    compare("llama", "inductor", loss_chunk=12)
