"""tools.bench_step: the variants that it measures, and what it says of the rest. Nothing is compiled."""

import pytest
import torch
from torch import nn

from blockgpt.errors import ConfigError, UserError
from blockgpt.training import launch
from configurator import load_config
from tools import bench_step

TINY = ["config/arch_llama.py", "--n_layer=1", "--n_head=2", "--n_embd=8", "--block_size=8", "--batch_size=2",
        "--vocab_size=16", "--gradient_accumulation_steps=2", "--device=cpu", "--dtype=float32", "--mfu_peak=1"]
MODEL = '''
from dataclasses import dataclass
import torch
import torch.nn as nn
print("imported")

@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config == GPTConfig(1, 2, 8, 8, 16, 0.0, False), config
        self.embedding, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, x, y):
        logits = self.head(self.embedding(x))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
'''


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


def test_it_measures_what_this_machine_can_run_and_says_why_not_the_rest(monkeypatch, capsys, checkout):
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)  # no C++ compiler
    bench_step.main([*TINY, "--rounds=2", "--steps=1", f"--nanogpt_dir={checkout}"])
    header, *lines = capsys.readouterr().out.splitlines()[-8:]
    assert header.startswith("1L-2H-8D-") and "batch 2 × 2" in header and "set by --mfu_peak" in header
    assert [line.partition(": skipped, ")[0] for line in lines[:4]] == ["compiled", "kernels", "kernels+compiled",
                                                                        "nanoGPT compiled"]
    assert all("needs a C++ compiler" in lines[i] for i in (0, 3)) and all("'triton'" in lines[i] for i in (1, 2))
    rows = [line.split() for line in lines[5:]]
    assert [row[0] for row in rows] == ["eager", "nanoGPT"]
    assert rows[0][-2:] == ["1.000", "1.000–1.000"] and [row[5] for row in rows] == ["-", "-"]


def test_the_table_has_medians_and_the_ratios_of_each_round():
    eager = bench_step.Variant("eager", lambda: None, seconds=[0.1, 0.2, 0.4])
    other = bench_step.Variant("kernels", lambda: None, seconds=[0.05, 0.3, 0.2], peak=3 * 2**20)
    _, first, second = bench_step.step_table([eager, other], tokens=1000, flops=2e6, peak=1e11)
    assert first == ["eager", "5,000", "200.00", "150.00–300.00", "10.0%", "-", "1.000", "1.000–1.000"]
    assert second == ["kernels", "5,000", "200.00", "125.00–250.00", "10.0%", "3 MiB", "0.500", "0.500–1.000"]
    assert bench_step.step_table([eager], tokens=1000, flops=2e6, peak=None)[1][4] == "-"


def test_a_step_is_all_micro_batches_clipped_and_then_the_optimizer():
    """One gradient of the mean loss of all micro-batches, clipped before the update, and cleared after it."""
    config = load_config(TINY)
    model = nn.Linear(2, 1, bias=False)
    start, order = model.weight.detach().clone(), []
    batches = [(torch.ones(1, 2), torch.tensor(1.0)), (torch.ones(1, 2), torch.tensor(5.0))]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: order.append("update"))

    def clip():
        order.append("clip")
        assert torch.equal(model.weight.grad, torch.tensor([[3.0, 3.0]]))

    bench_step.take_step(lambda x, y: (model(x) * y).sum(), batches, optimizer, torch.amp.GradScaler("cpu",
                         enabled=False), clip, launch.init(config))
    assert order == ["clip", "update"] and model.weight.grad is None
    assert torch.equal(model.weight, start - 3.0)


@pytest.mark.parametrize("flags, compiled, kernels, message", [
    (["--compile=False"], True, "torch", "compile: False was set"),
    (["--kernels=torch"], False, "triton", "kernels: 'torch' was set"),
    (["config/arch_gpt2.py", "--normalization=dyt"], False, "triton",
     "kernels: the model has no norm, RoPE or gated FFN with a kernel")])
def test_a_variant_that_the_run_excludes_is_skipped(flags, compiled, kernels, message):
    with pytest.raises(ConfigError, match=message):
        bench_step.variant_config(load_config([*TINY, *flags]), compiled, kernels)


def test_each_variant_has_its_compiler_and_kernels():
    config = load_config(TINY)
    for name, variant in bench_step.VARIANTS.items():
        own = bench_step.variant_config(config, *variant)
        assert (own.compile, own.model.kernels == "triton") == ("compiled" in name, "kernels" in name)


@pytest.mark.parametrize("flags, message", [
    (["--rounds=0"], "--rounds: 0 is out of range"), (["--steps=0"], "--steps: 0 is out of range"),
    (["--use_fsdp=True"], "one process without sharding"), (["--use_zero1=True"], "one process without sharding")])
def test_what_cannot_be_measured_is_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        bench_step.main([*TINY, *flags])


def test_a_directory_without_nanogpts_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--nanogpt_dir: .*model.py does not exist"):
        bench_step.main([*TINY, f"--nanogpt_dir={tmp_path}"])
