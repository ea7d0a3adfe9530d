"""The machine under a run: what it chooses, what it refuses, what its processes agree on."""

import datetime
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, records, run_python

from blockgpt.errors import ConfigError, PeerLostError, UserError
from blockgpt.training.device import choose_device, choose_dtype, process_memory
from blockgpt.training.launch import Runtime, agree_on_launch_id, check_same_config
from blockgpt.training.parallel import seed_micro_batch
from configurator import load_config
from model_config import PRESETS
from tools import bench_parallel
from training_logger import find_restarted_run

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n, bfloat16=True): let torch see n GPUs."""
    def make(n, bfloat16=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: bfloat16)
    make(0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return make


# ---- device and precision

def test_auto_takes_what_there_is(gpus, monkeypatch):
    assert choose_device("auto", 0) == CPU and choose_dtype("auto", CPU) == torch.float32
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto", 0).type == "mps" and choose_dtype("auto", torch.device("mps")) == torch.float32
    gpus(2)
    assert choose_device("auto", 1) == torch.device("cuda", 1) and choose_dtype("auto", CUDA) == torch.bfloat16
    assert choose_device("cuda", 1) == choose_device("cuda:1", 0) == torch.device("cuda", 1)
    gpus(2, bfloat16=False)
    assert choose_dtype("auto", CUDA) == torch.float32 and choose_dtype("float16", CUDA) == torch.float16


@pytest.mark.parametrize("name", ["gpu", "", "meta", "cuda:x", "cuda:-1", "cuda:99999999999999999999", "xpu", "cpu:"])
def test_an_unknown_device_is_told_with_those_that_are_known(gpus, name):
    with pytest.raises(ConfigError, match=r"^device: .* is unknown \(one of auto, cpu, cuda, cuda:1, mps\)"):
        choose_device(name, 0)


def test_a_device_that_is_not_there_is_an_error_and_never_replaced(gpus):
    for name in ("cuda", "cuda:0", "mps"):
        with pytest.raises(ConfigError, match=r"torch sees no .* here \(--device=cpu\)"):
            choose_device(name, 0)
    gpus(2)
    with pytest.raises(ConfigError, match="'cuda:2' is not among the CUDA devices here, 0 to 1"):
        choose_device("cuda:2", 0)


def test_too_few_gpus_are_told_by_every_process_alike(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for local_rank in range(4):
        with pytest.raises(ConfigError, match=r"4 processes .* here are 2 \(torchrun --nproc_per_node=2\)"):
            choose_device("auto", local_rank)
    with pytest.raises(ConfigError, match="one GPU for 4 processes"):
        choose_device("cuda:1", 0)
    assert choose_device("cpu", 3) == CPU


def test_a_precision_the_device_lacks_is_an_error(gpus):
    with pytest.raises(ConfigError, match="'float16' trains on CUDA alone, this is cpu"):
        choose_dtype("float16", CPU)
    gpus(1, bfloat16=False)
    with pytest.raises(ConfigError, match="'bfloat16': this GPU has none"):
        choose_dtype("bfloat16", CUDA)
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16 and choose_dtype("float32", CUDA) == torch.float32


def test_autocast_is_for_reduced_precision_alone():
    x = torch.ones(2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with Runtime(0, 0, 1, CPU, dtype, False, False).autocast():
            assert (x @ x).dtype == dtype


# ---- one process

def test_random_numbers_are_a_function_of_seed_step_and_micro_batch():
    def draw(*key):
        seed_micro_batch(*key)
        return torch.rand(4).tolist()

    keys = [(seed, step, n) for seed in (0, 1, 11) for step in (0, 1, 11) for n in (0, 1, 11)]
    first = {key: draw(*key) for key in keys}
    torch.rand(1000)  # whatever was drawn in between
    assert first == {key: draw(*key) for key in reversed(keys)}
    assert len({tuple(v) for v in first.values()}) == len(keys)


def test_memory_is_what_this_process_holds():
    before = process_memory()
    held = torch.ones(2**24)  # 64 MiB
    after = process_memory()
    assert after["allocated"] - before["allocated"] > held.nbytes / 2
    assert after["peak"] >= after["allocated"]


# ---- two processes

TWO = """
import signal
import torch
import blockgpt.training.parallel as parallel
from configurator import load_config
from blockgpt.errors import CheckpointError, UserError
from blockgpt.training.faults import Watch

config = load_config(["--device=cpu", "--gradient_accumulation_steps=2"])
machine = parallel.init(config)
rank = machine.rank
assert machine.world_size == 2 and machine.device.type == "cpu" and machine.is_main == (rank == 0)
assert machine.all_reduce_sum(rank + 1, 0.25) == [3.0, 0.5]
assert machine.all_reduce_sum(2**53 if rank else 1 - 2**53) == [1.0]  # exactly, in float64
assert machine.exchange({"rank": rank, "text": "ä" * rank}) == [{"rank": 0, "text": ""}, {"rank": 1, "text": "ä"}]
assert machine.all_gather([rank, 0.5]) == [[0.0, 0.5], [1.0, 0.5]]
assert machine.on_main(lambda: {"rank": rank}) == {"rank": 0}

def fail(error):
    raise error

for error, kind, code in ((CheckpointError("none"), UserError, 3), (OSError(28, "full"), OSError, None)):
    try:
        machine.on_main(lambda: fail(error))
    except kind as raised:
        assert getattr(raised, "exit_code", None) == code and str(error) in str(raised), raised
    else:
        raise AssertionError(kind)
with Watch(machine, config) as watch, watch.training():
    if rank == 1:
        signal.raise_signal(signal.SIGTERM)
    known = watch.agree([1.0, float("nan")] if rank else [0.25, 0.5], rank, 10 * rank, saved=rank == 1)
    assert known.stop == "SIGTERM" and known.bad == [-1, 1] and known.loss != known.loss
    assert known.step_times == [0.0, 1.0] and known.memory == [0.0, 10.0] and not known.saved
    known = watch.agree([0.5], grad_norm=float("inf") if rank else 1.0)
    assert known.grad_norms == [1.0, float("inf")] and known.bad == [-1, 0] and known.loss == 1.0

class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
    def forward(self, x):
        return self.weight * x * (1.0 + rank)

def train():
    model = Scale()
    wrapped = parallel.wrap(model, config, machine)
    with torch.no_grad():
        for _ in range(rank):  # one process may have more to evaluate than the other
            wrapped.eval()(torch.ones(1))
        wrapped.train()
    for x, now in ((1.0, False), (2.0, True)):
        with parallel.synchronise_gradients(wrapped, now):
            wrapped(torch.tensor([x * (rank + 1)])).backward()
        # alone: its own gradient; then both, averaged over the processes
        assert model.weight.grad.item() == (7.5 if now else (rank + 1) ** 2), model.weight.grad

train()
parallel.shut_down()
print("agreed\\n", end="")  # one write: the two share a pipe
"""


def test_two_processes_agree(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    done = run_python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "two.py",
                      cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["agreed"] * 2


def test_a_launch_has_a_name_of_its_own_in_a_store_that_outlives_it():
    """Whatever earlier launches left there, and however late the processes come."""
    store, launches = dist.HashStore(), []

    def launch(ranks, size, seconds=60.0):
        limit = datetime.timedelta(seconds=seconds)

        def join(rank):
            time.sleep(random.random() / 20)
            try:
                return agree_on_launch_id(store, rank, size, limit)
            except PeerLostError as error:
                return str(error)

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(join, ranks))

    for size in (1, 4, 4, 2, 5):
        names, *others = launch(range(size), size)
        assert others == [names] * (size - 1)
        launches.append(names)
        if size > 2:  # and one that was cut short: what it has said stays in the store
            assert launch([0, 1], size, 0.2)[0] == "rank 0: no sign of rank 2 in 0 s" + (
                f", nor of {size - 3} more" if size > 3 else "")
            assert set(launch(range(1, size), size, 0.2)) == {f"rank {r}: no sign of rank 0 in 0 s"
                                                              for r in range(1, size)}
    first = launches[0][0]
    assert len({name for name, _ in launches}) == 5 and {of for _, of in launches} == {first}


def test_a_restart_goes_on_with_its_own_run_alone(tmp_path):
    def goes_on(launch, *flags):
        runtime = Runtime(0, 0, 1, CPU, torch.float32, False, False, launch=launch, first_launch=launch and "a")
        return find_restarted_run(load_config([f"--out_dir={tmp_path}", *flags]), runtime)

    def made(name, launch):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "run.json").write_text(launch if launch == "{" else json.dumps({"launch": launch}))

    named = "--run_name=mine"
    assert goes_on(None, named) is None and goes_on("a", named) is None
    assert goes_on("b", named) == "mine" and goes_on("b") is None  # the first came to nothing
    made("other", "x")
    made("mine", "a")
    assert goes_on("b", named) == goes_on("c", named) == goes_on("b") == "mine"
    assert goes_on("a", named) is None and goes_on("a") is None
    for launch in ("x", "{"):  # the first was refused: the directory is another run's
        made("mine", launch)
        assert goes_on("b", named) is None and goes_on("b") is None


def test_processes_that_were_asked_for_different_runs_end_in_one_line():
    configs = [load_config([f"--learning_rate={rate}"]) for rate in (1, 1, 2)]
    runtime = SimpleNamespace(all_gather_object=lambda value: [config.flat() for config in configs])
    with pytest.raises(UserError, match=r"^learning_rate: is 2.0 on rank 2 and 1.0 on rank 0 .*the same command"):
        check_same_config(configs[0], runtime)
    configs.pop()
    check_same_config(configs[0], runtime)


# ---- the modes

RUNS = [
    # what tensor parallelism must part or leave whole, in as few models as can hold it
    ["--position_encoding=alibi", "--qk_norm=projection", "--attn_gate=headwise", "--value_embeddings=1", "--bias=True",
     "--n_kv_head=2", "--attention_backend=manual", "--norm_position=sandwich", "--ffn_type=standard"],
    ["--arch_preset=gemma3", "--qk_norm=head", "--attn_gate=elementwise", "--value_embeddings=1", "--x0_mix=True",
     "--weight_tying=True", "--init=mup", "--qkv_bias=True", "--gradient_accumulation_steps=4"],
    ["--gradient_log_interval=1", "--packing=documents", "--grad_clip=0.1"],
    ["--dropout=0.3", "--gradient_accumulation_steps=4"],
]
WITHOUT_DROPOUT = ["--gradient_accumulation_steps=4"]


def curves(folder, mode, flags):
    """[the (loss, gradient norm) of each step] of a run of each of `flags` in `mode`, and the third's gradients."""
    work = [["config/arch_llama.py", *bench_parallel.SIZE, *bench_parallel.MODES[mode][1],
             "--gradient_accumulation_steps=2", "--max_iters=4", "--eval_interval=2", f"--out_dir={folder / mode}",
             f"--run_name={i}", *more] for i, more in enumerate(flags)]
    bench_parallel.launch(mode, work, folder / mode)
    return ([bench_parallel.curve(folder / mode / str(i)) for i in range(len(flags))],
            records(folder / mode / "2", "gradients")[3]["layers"])


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return curves(tmp_path_factory.mktemp("single"), "single", [*RUNS, WITHOUT_DROPOUT])


@pytest.mark.parametrize("modes", [["DDP", "ZeRO-1"], ["FSDP"], ["TP"]], ids=" ".join)
def test_every_mode_computes_what_one_process_does(tmp_path, single, modes):
    whole, layers = single
    assert abs(whole[3][0][0] / whole[4][0][0] - 1) > 1e-4  # there is dropout
    found = []
    for mode in modes:
        runs = RUNS[:3] if mode == "TP" else RUNS  # neighbours that share heads drop other values
        each, parted_layers = curves(tmp_path, mode, runs)
        for flags, a, b in zip(runs, each, whole, strict=False):
            bound = 1e-5 if "--dropout=0.3" in flags else 1e-4
            assert a == [pytest.approx(step, rel=bound) for step in b], (mode, flags)
        assert parted_layers == {name: pytest.approx(values, rel=1e-3) for name, values in layers.items()}
        found.append(each)
    assert all(each == found[0] for each in found)  # to the last bit


@pytest.mark.long
def test_every_mode_trains_every_preset_alike():
    assert bench_parallel.agreement(list(bench_parallel.MODES), sorted(set(PRESETS) - {"custom"}), 50) < 1e-4
