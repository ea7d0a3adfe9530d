"""A dozen steps of train.py against a plain PyTorch loop: rates, gradient norms, losses, skipped updates, weights.

The architecture is the project's, and so is the order of the sequences. Everything else a step does is written out in
`plain_run`: the schedule, accumulation, the loss, the loss scale, clipping, AdamW's groups.
"""

import functools
import json
import math
import random
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, records
from ranks import run_ranks, start_train
from safetensors.torch import load_file

from blockgpt.accounting.flops import flops_per_token
from blockgpt.data.dataset import open_dataset
from blockgpt.data.loader import TrainBatches
from blockgpt.data.prepare import write_dataset
from blockgpt.data.tokenizer import ByteTokenizer
from blockgpt.training.diagnostics import LossSpikeDetector
from blockgpt.training.faults import Watchdog
from blockgpt.training.launch import Runtime
from configurator import load_config
from model_builder import build_model

STEPS = 13
FLAGS = [f"--max_iters={STEPS}", "--vocab_size=320", "--warmup_iters=3", "--lr_decay_iters=11", "--learning_rate=5e-3",
         "--min_lr=1e-3", "--grad_clip=1.72", "--weight_decay=0.3", "--eval_interval=4", "--checkpoint_interval=5"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder with one dataset, `text`, which never changes: the tolerances were measured on it."""
    folder, generator = tmp_path_factory.mktemp("data"), random.Random(0)
    words = ["the", "model", "reads", "a", "batch", "of", "tokens", "and", "learns"]
    documents = [" ".join(generator.choices(words, k=2000)) for _ in range(4)]
    write_dataset(folder / "text", ByteTokenizer(), zip(("train", "train", "train", "val"), documents, strict=True),
                  source="a test")
    return folder


def logits_of(model, x):
    """(B, T, V)."""
    return model(x)


def plain_run(config, dtype=torch.float32, scale=1.0, skipped=()):
    """({step: (lr, gradient norm, loss)}, {name: weights}, the last loss scale) of the run that `config` asks for.

    skipped: steps (from 1) without an update. A step whose gradients overflow has none either, and halves the scale.
    """
    dataset = open_dataset(config.dataset, config.data_dir)
    tokens = torch.from_numpy(np.concatenate(dataset.shards["train"]).astype(np.int64))
    size, micro_steps, block_size = config.batch_size, config.gradient_accumulation_steps, config.model.block_size
    batches = TrainBatches(dataset, config.seed, block_size, size, micro_steps)
    model = build_model(config.model, config.seed)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
         {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}],
        betas=(config.beta1, config.beta2), foreach=False, fused=False)
    curve = {}
    for step in range(config.max_iters):
        if step < config.warmup_iters:
            lr = config.learning_rate * (step + 1) / config.warmup_iters
        else:
            progress = min(1.0, (step - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters))
            lr = config.min_lr + (config.learning_rate - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2
        losses = []
        for micro_step in range(micro_steps):
            first = [token for _, token in batches.offsets(batches.sequence_ids(step, micro_step))]
            x, y = (torch.stack([tokens[i + shift:i + shift + block_size] for i in first]) for shift in (0, 1))
            torch.manual_seed(random.Random(f"{config.seed} {step} {micro_step}").getrandbits(63))
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = logits_of(model, x)
            losses.append(F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()))
            (losses[-1] / micro_steps * scale).backward()
        for p in parameters:
            p.grad /= scale
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters))
        if not math.isfinite(norm):
            scale /= 2
        elif step + 1 not in skipped:
            for p in parameters:
                p.grad *= min(1.0, (config.grad_clip or math.inf) / norm)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        optimizer.zero_grad()
        curve[step + 1] = (lr, norm if math.isfinite(norm) else None, sum(losses).item() / micro_steps)
    return curve, {name: p.detach() for name, p in model.named_parameters()}, scale


def check_run(run_dir, curve, weights, rel=1e-5, first_rel=None):
    """`run_dir` has this curve, to `rel`, and these weights, to `rel` of the norm of each tensor.

    The default is four times the difference measured in float32: sums are in another order. first_rel: the tolerance
    of the first two steps; in bfloat16 a last bit of a float32 weight rounds to another number later on some CPUs.
    """
    steps = records(run_dir)
    assert steps.keys() == curve.keys()
    for step, (lr, norm, loss) in curve.items():
        found, rel_of_step = steps[step], first_rel or rel if step <= 2 else rel
        assert found["lr"] == pytest.approx(lr, rel=1e-12), step
        assert found["loss"] == pytest.approx(loss, rel=rel_of_step), step
        assert found["grad_norm"] == (norm and pytest.approx(norm, rel=rel_of_step)), step  # null: not finite
    saved = load_file(run_dir / "model.safetensors")
    assert saved.keys() == weights.keys()
    for name, expected in weights.items():
        if name.endswith("k_proj.bias"):
            continue  # softmax does not depend on it: its gradient is rounding noise, which AdamW scales to an update
        assert (saved[name] - expected).norm() < rel * expected.norm(), name


def config_of(data_dir, *flags):
    return load_config([*TINY, f"--data_dir={data_dir}", *FLAGS, *flags])


@pytest.mark.parametrize("flags, rel", [
    (["--arch_preset=llama"], 1e-5),
    (["--arch_preset=gpt2_openai", "--gradient_accumulation_steps=3", "--dropout=0.1"], 1e-5),
    (["--arch_preset=llama", "--dtype=bfloat16", "--grad_clip=0"], 2 ** -8),
    (["--arch_preset=llama", "--loss_chunk=50"], 1e-5),  # of 128 tokens
], ids=["float32", "accumulation-dropout", "bfloat16", "loss-chunk"])
def test_a_run_is_a_plain_pytorch_loop(tmp_path, train, data_dir, flags, rel):
    done = train("golden", *FLAGS, *flags)
    assert done.returncode == 0, done.stderr
    config = config_of(data_dir, *flags)
    curve, weights, _ = plain_run(config, torch.bfloat16 if config.dtype == "bfloat16" else torch.float32)
    norms = [norm for _, norm, _ in curve.values()]
    assert not config.grad_clip or min(norms) < config.grad_clip < max(norms)  # some steps are clipped, some are not
    check_run(tmp_path / "runs/golden", curve, weights, rel, first_rel=1e-5)


@pytest.mark.parametrize("flags", [[], ["--keep_best"]], ids=["interval", "best"])
def test_a_run_saves_at_its_interval_at_its_end_and_on_request_after_the_best_evaluations(tmp_path, train, flags):
    assert train("saves", *FLAGS, "--keep_last=9", *flags).returncode == 0
    run_dir = tmp_path / "runs/saves"
    losses = {step: record["val_loss"] for step, record in records(run_dir, "eval").items()}
    assert sorted(losses) == [4, 8, 12, 13]
    best = [step for step in losses if all(losses[step] < losses[other] for other in losses if other < step)]
    assert {4, 8} <= set(best)  # no multiples of the interval
    expected = sorted({5, 10, 13, *(best if flags else [])})
    assert sorted(records(run_dir, "save")) == expected
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == [f"step_{s:08d}" for s in expected]


# ---- float16, which the command line refuses on a CPU, and spikes, which the first 100 steps do not have

def train_directly(argv, dtype, init_scale, horizon):
    """train.py's loop on a CPU in any dtype, with this first loss scale; steps after the first `horizon` can spike."""
    torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=init_scale)
    LossSpikeDetector.HORIZON = horizon
    config = load_config(argv)
    runtime = Runtime(0, 0, 1, torch.device("cpu"), dtype, tf32=False, compile=False)
    with Watchdog(runtime, config) as watchdog:
        runpy.run_path(str(ROOT / "train.py"))["train"](config, runtime, watchdog)


def run_directly(tmp_path, data_dir, *flags, dtype=torch.float32, init_scale=1.0, horizon=100):
    """`train_directly` as the run tmp_path/golden: its directory."""
    argv = [*TINY, f"--data_dir={data_dir}", *FLAGS, *flags, f"--out_dir={tmp_path}", "--run_name=golden"]
    run_ranks(1, train_directly, argv, dtype, init_scale, horizon)
    return tmp_path / "golden"


@pytest.mark.slow
def test_float16_gradients_are_unscaled_before_clipping_and_an_overflow_skips_the_update(tmp_path, data_dir):
    flags = ["--arch_preset=llama", "--gradient_accumulation_steps=2"]
    run_dir = run_directly(tmp_path, data_dir, *flags, dtype=torch.float16, init_scale=2.0**19)
    curve, weights, scale = plain_run(config_of(data_dir, *flags), torch.float16, 2.0**19)
    overflows = [step for step, (_, norm, _) in curve.items() if norm is None]
    assert 1 <= len(overflows) < STEPS - 6 and scale == 2.0 ** (19 - len(overflows))
    check_run(run_dir, curve, weights, 1e-3)  # measured: 1.4e-4; a last bit of a weight changes float16 sums
    assert sorted(records(run_dir, "overflow")) == overflows
    skipped = [record["skipped"] for _, record in sorted(records(run_dir).items())]
    assert skipped == [sum(overflow <= step for overflow in overflows) for step in range(1, STEPS + 1)]
    assert json.loads((run_dir / "run.json").read_text())["results"]["skipped_steps"] == len(overflows)
    states = [json.loads(path.read_text()) for path in run_dir.glob("checkpoints/*/state.json")]
    assert {state["skipped"] for state in states} == {len(overflows)}


def test_a_skipped_spike_updates_nothing(tmp_path, data_dir):
    flags = ["--arch_preset=llama", "--spike_threshold=0.01", "--learning_rate=2e-6", "--min_lr=2e-6"]
    run_dir = run_directly(tmp_path, data_dir, *flags, "--skip_spikes", horizon=3)
    skipped = sorted(step for step, record in records(run_dir, "spike").items() if record["skipped"])
    assert 1 <= len(skipped) <= STEPS - 6 and min(skipped) > 3
    curve, weights, _ = plain_run(config_of(data_dir, *flags), skipped=skipped)
    check_run(run_dir, curve, weights)


# ---- what a plain loop around the same model cannot show

def test_dropout_acts_on_the_embeddings(data_dir):
    model = build_model(config_of(data_dir, "--arch_preset=llama", "--dropout=0.25").model).train()
    inputs = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    x = torch.randint(320, (4, 32), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model(x)
    model.eval()(x)
    dropped, whole = inputs
    assert 0.2 < (dropped == 0).float().mean() < 0.3 and (whole != 0).all()  # 4096 entries
    torch.testing.assert_close(dropped[dropped != 0], (whole / 0.75)[dropped != 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_narrow_logits_is_computed_in_float32(data_dir, dtype):
    config = config_of(data_dir, "--arch_preset=llama").model
    x = torch.randint(320, (4, 33), generator=torch.Generator().manual_seed(0))
    x, y = x[:, :-1], x[:, 1:]
    narrow = build_model(config).to(dtype)  # the weights too: under autocast, torch computes a loss in float32 itself
    expected = F.cross_entropy(logits_of(narrow, x).flatten(0, 1).double(), y.flatten()).item()
    loss = narrow(x, y)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_mfu_divides_by_the_number_of_processes(tmp_path, data_dir):
    flags = ["--max_iters=2", "--gradient_accumulation_steps=2", "--run_name=two", f"--data_dir={data_dir}"]
    for process in start_train(2, [*TINY, *flags], Path(tmp_path)):
        process.join(240)
        assert process.exitcode == 0, (tmp_path / "rank0.err").read_text()
    step = records(tmp_path / "runs/two")[2]
    config = load_config([*TINY, *flags]).for_vocabulary(320)
    flops = flops_per_token(build_model(config.model), config.model.block_size)["train"]
    assert step["mfu"] == pytest.approx(flops * step["tokens_per_sec"] / (2 * 1e12))  # --mfu_peak=1 TFLOP/s each
