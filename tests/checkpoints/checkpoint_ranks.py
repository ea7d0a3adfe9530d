"""Checkpoints of several ranks, run by torchrun from test_checkpoint.py: checkpoint_ranks.py FOLDER.

FOLDER/plain is a run saved by one process. Each mode saves, and every mode loads what every other saved.
"""

import contextlib
import hashlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from blockgpt.checkpoints import checkpoint, files
from blockgpt.checkpoints import saver as saver_module
from blockgpt.checkpoints.saver import CheckpointSaver
from blockgpt.errors import CheckpointError, UserError
from blockgpt.training import launch
from blockgpt.training.optimizers import build_optimizer
from configurator import load_config
from model_builder import build_model
from model_config import get_preset

CONFIG = SimpleNamespace(learning_rate=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.99, use_zero1=False)


def architecture(preset, **more):
    """18 wide in the feed-forward, 33 tokens: FSDP need not divide them, tensor parallelism must."""
    return get_preset(preset, **{"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 33,
                                 "d_ff": 18, **more})


def make(mode, seed=1, preset="llama", world=1, **more):
    """(model, optimizer) in a mode; the weights are a function of the seed alone."""
    model = build_model(architecture(preset, **more), seed)
    replicas = 2 if mode == "hsdp" else 1
    if mode in ("tp", "fsdp+tp"):
        tensor = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("shard", "tensor"))
        for block in model.blocks:
            parallelize_module(block, tensor["tensor"], {
                "ffn.up_proj": ColwiseParallel(), "ffn.gate_proj": ColwiseParallel(),
                "ffn.down_proj": RowwiseParallel()})
        if mode == "fsdp+tp":
            for module in (*model.blocks, model):
                fully_shard(module, mesh=tensor["shard"])
    if mode in ("fsdp", "hsdp"):
        mesh = init_device_mesh("cpu", (world,)) if replicas == 1 else init_device_mesh(
            "cpu", (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
    optimizer = build_optimizer(model, CONFIG, torch.device("cpu"))
    if mode in ("tp", "fsdp+tp"):  # the fused step takes tensors of one mesh at a time
        groups = []
        for group in optimizer.param_groups:
            by_mesh = {}
            for p in group["params"]:
                by_mesh.setdefault(str(p.device_mesh) if isinstance(p, DTensor) else None, []).append(p)
            groups += [{**group, "params": parameters} for parameters in by_mesh.values()]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), fused=True)
    if mode != "zero1":
        return model, optimizer
    groups = optimizer.param_groups
    own = [{k: g[k] for k in ("params", "weight_decay", "lr_multiplier")} for g in groups]
    optimizer = ZeroRedundancyOptimizer(own, optimizer_class=torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.99), fused=True)
    return model, optimizer


class OddState(torch.optim.Optimizer):
    """Its state has every form that published optimizers have: of another shape or dtype, a scalar, no tensor."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            state, grad = self.state[p], p.grad
            if not state:
                state.update(row=grad.new_zeros(grad.shape[:1]), blocks=torch.zeros(7, dtype=torch.uint8), steps=0,
                             same=torch.zeros_like(p, dtype=torch.bfloat16), mean=0.1, nothing=None, on=True,
                             history=[], empty=torch.zeros(0, 3), scale=torch.zeros((), dtype=torch.float64))
            state["row"] += grad.reshape(len(grad), -1).square().mean(1)
            state["blocks"] += 3 + state["steps"]
            state["same"] += grad
            state["steps"], state["mean"], state["on"] = state["steps"] + 1, state["mean"] / 3, not state["on"]
            state["history"] = [*state["history"], state["mean"]]
            state["scale"] += 1 / 3
            p -= 0.01 * state["mean"] * state["same"] + 1e-4 * state["row"].mean() * state["blocks"][0]


def odd(mode, seed, world=1):
    """(model, optimizer) of `mode` with an `OddState`, or with torch's Adafactor if the seed is even."""
    model = make(mode, seed, world=world)[0]
    optimizer_class = OddState if seed % 2 else torch.optim.Adafactor
    if mode == "zero1":
        return model, ZeroRedundancyOptimizer(model.parameters(), optimizer_class=optimizer_class)
    return model, optimizer_class(model.parameters())


def everything(model, optimizer):
    """What a resumed run must have: {key: value} of this rank's parameters and optimizer state."""
    states = {f"{k}/{name}": v for name, p in model.named_parameters()
              for k, v in files.local_optimizer(optimizer).state.get(p, {}).items()}
    return {**dict(model.named_parameters()), **states}


def same(found, expected):
    """Whether two values of `everything` are equal to the last bit, in type and shape."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return all(type(value) is type(expected[key]) and (
        (value.dtype, value.shape, value.tolist()) == (expected[key].dtype, expected[key].shape, expected[key].tolist())
        if isinstance(value, torch.Tensor) else value == expected[key]) for key, value in found.items())


def check_odd_state(folder, runtime, modes):
    """Optimizer state of any form is bitwise resumed where a rank has it whole, and else refused before the save."""
    n = runtime.world_size
    for seed in (1, 2):
        for mode in modes:
            run = folder / f"odd{seed}-{mode}{n}"
            if runtime.is_rank_zero:
                run.mkdir(exist_ok=True)
            runtime.all_gather([0])
            model, optimizer = odd(mode, seed, n)
            if mode not in ("plain", "zero1"):
                check_odd_state_is_refused(run, folder / f"odd{seed}-plain{n}", runtime, model, optimizer)
                continue
            learn(model, optimizer, range(3))
            path = CheckpointSaver(run, runtime).save(model, optimizer, state(3))
            checkpoint.verify(path, runtime)
            again = odd(mode, seed + 2, n)
            checkpoint.load(path, *again, runtime)
            assert same(everything(*again), everything(model, optimizer)), (seed, mode)
            learn(model, optimizer, range(3, 5))
            learn(*again, range(3, 5))
            assert same(everything(*again), everything(model, optimizer)), (seed, mode)
            other = odd("plain", seed + 2)  # and what several processes saved, one can load
            checkpoint.load(path, *other, runtime)
            assert len(everything(*other)) >= len(everything(*again))


def check_odd_state_is_refused(run, plain_run, runtime, model, optimizer):
    """State of plain tensors, which a sharded parameter cannot have; and the checkpoint of a run that could."""
    for p in model.parameters():
        optimizer.state[p] = {"row": torch.zeros(3)}
    if any(isinstance(p, DTensor) for p in model.parameters()):
        check_raises(UserError, "optimizer state 'row' of ",
                     lambda: CheckpointSaver(run, runtime).save(model, optimizer, state(3)))
        assert not (run / "checkpoints").exists()
        before = full_tensors(model, torch.optim.SGD(model.parameters()))
        path = checkpoint.find_newest(plain_run, runtime)
        check_raises(UserError, str(path), lambda: checkpoint.load(path, model, optimizer, runtime))
        check_equal(full_tensors(model, torch.optim.SGD(model.parameters())), before)


def learn(model, optimizer, steps):
    """The same batch on every rank, so that averaging gradients changes nothing."""
    for step in steps:
        x = torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(step))
        model(x[:, :-1], x[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def state(step, best=None):
    return {"step": step, "tokens": 16 * step, "best": best and {"step": best, "val_loss": 1.0}, "scaler": None,
            "data": "0" * 64, "description": {}}


def full_tensors(model, optimizer):
    """{key: whole tensor} of this rank's parameters and of the optimizer state it has."""
    files.reshard_parameters(model)
    full = {}
    for name, p in model.named_parameters():
        state = files.local_optimizer(optimizer).state.get(p, {})
        for key, value in {name: p, **{f"{k}/{name}": v for k, v in state.items()}}.items():
            full[key] = value.detach().full_tensor() if isinstance(value, DTensor) else value.detach()
    return full


def check_equal(found, expected, complete=True):
    assert not complete or found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for key, value in found.items():
        assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def check_local_chunks(runtime):
    """`local_chunk` agrees with `distribute_tensor`, and the owners' chunks tile the tensor."""
    n = runtime.world_size
    meshes = [(init_device_mesh("cpu", (n,)), [(Shard(0),), (Shard(1),), (Replicate(),)])]
    if n == 4:
        meshes.append((init_device_mesh("cpu", (2, 2)), [(Replicate(), Shard(0)), (Shard(0), Shard(1)),
                                                         (Shard(1), Shard(0)), (Shard(0), Shard(0))]))
    for mesh, layouts in meshes:
        for placements in layouts:
            for shape in ((1, 1), (2, 3), (4, 8), (5, 7), (9, 2), (17, 16)):
                whole = torch.arange(shape[0] * shape[1]).reshape(shape).float()
                tensor = distribute_tensor(whole, mesh, placements)
                _, offsets, local = files.local_chunk(tensor)
                block = tuple(slice(o, o + m) for o, m in zip(offsets, local.shape, strict=True))
                assert torch.equal(whole[block], local), (placements, shape)
                chunks = runtime.all_gather_object([offsets, list(local.shape), files.is_owner(tensor)])
                owned = [(tuple(o), tuple(s)) for o, s, is_owner in chunks if is_owner and 0 not in s]
                assert files.tiles(owned, shape), (placements, shape, owned)


def main(folder):
    flags = ["--device=cpu", f"--gradient_accumulation_steps={os.environ['WORLD_SIZE']}"]
    runtime = launch.init(load_config(flags))
    n = runtime.world_size
    check_local_chunks(runtime)
    modes = ["plain", "zero1", "fsdp"] + (["hsdp", "tp", "fsdp+tp"] if n == 4 else ["tp"] if n == 2 else [])
    reference = make("plain", 2)
    checkpoint.load(checkpoint.find_newest(folder / "plain", runtime), *reference, runtime)  # of one process
    reference = full_tensors(*reference)

    for mode in modes:  # every mode loads what one process saved, and saves it again
        model, optimizer = make(mode, 3, world=n)
        if mode != "plain":  # it has optimizer state and gathered parameters before it is loaded
            learn(model, optimizer, [0])
            with torch.no_grad():
                model(torch.zeros(1, 4, dtype=torch.int64))
        loaded = checkpoint.load(checkpoint.find_newest(folder / "plain", runtime), model, optimizer, runtime)
        assert loaded["step"] == 3 and loaded["tokens"] == 48
        check_equal(full_tensors(model, optimizer), reference, complete=mode != "zero1")
        with torch.no_grad():
            model(torch.zeros(1, 4, dtype=torch.int64))
        run = folder / f"{mode}{n}"
        if runtime.is_rank_zero:
            run.mkdir()
        dist.barrier()
        path = CheckpointSaver(run, runtime).save(model, optimizer, state(3))
        index = checkpoint.read_index(path)
        check_equal({key: index.read(key) for key in index.entries}, reference)
        if mode in ("plain", "fsdp"):  # the ranks write about the same number of bytes
            sizes = [p.stat().st_size for p in path.glob("model-*")]
            assert len(sizes) == n and max(sizes) < 1.5 * sum(sizes) / n, sizes
        learn(model, optimizer, range(3, 5))  # the optimizer steps with the loaded state
        other_model, other = make(mode, 4, world=n)
        checkpoint.load(path, other_model, other, runtime)
        learn(other_model, other, range(3, 5))
        check_equal(full_tensors(other_model, other), full_tensors(model, optimizer))
        del model, optimizer, other_model, other
    for mode in modes:
        for source in modes:
            model, optimizer = make(mode, 5, world=n)
            checkpoint.load(checkpoint.find_newest(folder / f"{source}{n}", runtime), model, optimizer, runtime)
            check_equal(full_tensors(model, optimizer), reference, complete=mode != "zero1")

    # tied weights; a checkpoint of step 0
    for mode in ("plain", "zero1", "fsdp"):
        model, optimizer = make(mode, 1, "gpt2", n)
        run = folder / f"tied-{mode}{n}"
        if runtime.is_rank_zero:
            run.mkdir()
        dist.barrier()
        saver = CheckpointSaver(run, runtime)
        again = make("plain", 2, "gpt2")
        path = saver.save(model, optimizer, state(0))
        checkpoint.load(path, *again, runtime)
        check_equal(full_tensors(*again), full_tensors(model, optimizer))
        assert "lm_head.weight" not in full_tensors(*again)
        learn(model, optimizer, range(2))
        path = saver.save(model, optimizer, state(2))
        checkpoint.load(path, *again, runtime)
        check_equal(full_tensors(model, optimizer), full_tensors(*again), complete=mode != "zero1")
        checkpoint.export(run, path, {"step": 2}, runtime)
        check_equal(checkpoint.read_export(run)[0], {k: v for k, v in full_tensors(*again).items() if "/" not in k})

    # an asynchronous save equals a synchronous one byte for byte, whatever training does meanwhile
    model, optimizer = make("fsdp", 1, world=n)
    learn(model, optimizer, range(2))
    (one, two) = (folder / f"{name}{n}" for name in ("sync", "async"))
    if runtime.is_rank_zero:
        one.mkdir()
        two.mkdir()
    dist.barrier()
    in_background = CheckpointSaver(two, runtime, asynchronous=True)
    synchronous = CheckpointSaver(one, runtime)
    for step in (2, 4):
        path = synchronous.save(model, optimizer, state(step))
        assert in_background.save(model, optimizer, state(step)) is None
        learn(model, optimizer, range(step, step + 2))
        if step == 2:
            assert in_background.wait() == (2, None) and not in_background.ended and in_background.poll() is None
            assert digests(path) == digests(two / "checkpoints" / path.name)
    assert in_background.wait() == (4, None)
    assert in_background.save(model, optimizer, state(6), wait=True).name == "step_00000006"
    assert in_background.poll() is None and in_background.wait() is None
    assert digests(path) != digests(two / "checkpoints/step_00000006")
    assert digests(path) == digests(two / "checkpoints/step_00000004")

    # an error on one rank is an error on all, and the old checkpoints stay
    before = digests(path)
    for name in ("write_chunks", "commit_checkpoint", "verify_written", "own_chunks"):
        rank = 0 if name == "commit_checkpoint" else n - 1
        with broken(saver_module, name, runtime.rank == rank):
            check_raises(OSError, f"rank {rank}: broken", lambda: synchronous.save(model, optimizer, state(8)))
            if name != "own_chunks":
                in_background.save(model, optimizer, state(8))
                step, problem = in_background.wait()
                assert step == 8 and problem.startswith(f"rank {rank}: broken"), problem
        dist.barrier()
        for run in (one, two):
            assert sorted(p.name for p in (run / "checkpoints").iterdir())[-1] < "step_00000008", name
            assert not list((run / "checkpoints").glob(".*"))
        assert digests(path) == before
    with broken(checkpoint, "verify_own_files", runtime.rank == n - 1, CheckpointError):
        check_raises(CheckpointError, "broken", lambda: checkpoint.verify(path, runtime))
    with broken(checkpoint, "load_tensors", runtime.rank == n - 1, UserError):
        check_raises(UserError, "broken", lambda: checkpoint.load(path, model, optimizer, runtime))
    with broken(checkpoint, "write_export", runtime.is_rank_zero):
        check_raises(OSError, "rank 0: broken", lambda: checkpoint.export(one, path, {}, runtime))

    check_odd_state(folder, runtime, modes)

    # all ranks skip a damaged newest checkpoint
    if runtime.is_rank_zero:
        damaged = sorted((two / "checkpoints").iterdir())[-1] / "state.json"
        damaged.write_bytes(damaged.read_bytes()[:-1])
    dist.barrier()
    assert checkpoint.find_newest(two, runtime).name == "step_00000004"
    model = optimizer = None  # a model that outlives the group could abort the interpreter
    launch.shutdown()
    print("passed\n", end="", flush=True)  # one write: the ranks write to one pipe


@contextlib.contextmanager
def broken(module, name, on_this_rank, error=OSError):
    """`module.name` raises `error`, if `on_this_rank`."""
    def fail(*_, **__):
        raise error("broken")

    working = getattr(module, name)
    if on_this_rank:
        setattr(module, name, fail)
    try:
        yield
    finally:
        setattr(module, name, working)


def check_raises(error_type, text, work):
    try:
        work()
    except error_type as error:
        assert str(error).startswith(text), error
        return
    raise AssertionError(f"no {error_type.__name__}")


if __name__ == "__main__":
    assert dist.is_available()
    main(Path(sys.argv[1]))
