"""What several ranks do with checkpoints, run by torchrun from test_checkpoint.py: checkpoint_ranks.py FOLDER.

FOLDER/plain holds a run saved by one process. Each mode saves, and every mode loads what every other saved.
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

import blockgpt.training.checkpoint as checkpoint
import blockgpt.training.checkpoint_files as shards
from blockgpt.errors import CheckpointError, UserError
from blockgpt.training import launch
from blockgpt.training.checkpoint_saver import CheckpointSaver
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
            on_all_ranks = {}
            for p in group["params"]:
                on_all_ranks.setdefault(str(p.device_mesh) if isinstance(p, DTensor) else None, []).append(p)
            groups += [{**group, "params": parameters} for parameters in on_all_ranks.values()]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), fused=True)
    if mode != "zero1":
        return model, optimizer
    groups = optimizer.param_groups
    own = [{k: g[k] for k in ("params", "weight_decay", "lr_multiplier")} for g in groups]
    optimizer = ZeroRedundancyOptimizer(own, optimizer_class=torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.99), fused=True)
    return model, optimizer


def learn(model, optimizer, steps):
    """The same batch on every rank, so that averaging gradients changes nothing."""
    for step in steps:
        x = torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(step))
        model(x[:, :-1], x[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()


def state(step, best=None):
    return {"step": step, "tokens": 16 * step, "best": best and {"step": best, "val_loss": 1.0}, "scaler": None,
            "data": "0" * 64, "description": {}}


def whole(model, optimizer):
    """{key: whole tensor} of this rank's parameters and of the moments it has."""
    shards.reshard_parameters(model)
    full = {}
    for name, p in model.named_parameters():
        moments = shards.local_optimizer(optimizer).state.get(p, {})
        for key, value in {name: p, **{f"{m}/{name}": v for m, v in moments.items()}}.items():
            full[key] = value.detach().full_tensor() if isinstance(value, DTensor) else value.detach()
    return full


def check_equal(found, expected, complete=True):
    assert not complete or found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for key, value in found.items():
        assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def check_placed(runtime):
    """`placed` says what `full_tensor` and torch's own placing say."""
    n = runtime.world_size
    meshes = [(init_device_mesh("cpu", (n,)), [(Shard(0),), (Shard(1),), (Replicate(),)])]
    if n == 4:
        meshes.append((init_device_mesh("cpu", (2, 2)), [(Replicate(), Shard(0)), (Shard(0), Shard(1)),
                                                         (Shard(1), Shard(0)), (Shard(0), Shard(0))]))
    for mesh, kinds in meshes:
        for placements in kinds:
            for shape in ((1, 1), (2, 3), (4, 8), (5, 7), (9, 2), (17, 16)):
                whole_one = torch.arange(shape[0] * shape[1]).reshape(shape).float()
                tensor = distribute_tensor(whole_one, mesh, placements)
                offset, local = shards.local_chunk(tensor)
                box = tuple(slice(o, o + m) for o, m in zip(offset, local.shape, strict=True))
                assert torch.equal(whole_one[box], local), (placements, shape)
                said = runtime.all_gather_object([offset, list(local.shape), shards.is_owner(tensor)])
                written = [(tuple(o), tuple(s)) for o, s, w in said if w and 0 not in s]
                assert shards.tiles(written, shape), (placements, shape, written)


def main(folder):
    flags = ["--device=cpu", f"--gradient_accumulation_steps={os.environ['WORLD_SIZE']}"]
    runtime = launch.init(load_config(flags))
    n = runtime.world_size
    check_placed(runtime)
    modes = ["plain", "zero1", "fsdp"] + (["hsdp", "tp", "fsdp+tp"] if n == 4 else ["tp"] if n == 2 else [])
    reference = make("plain", 2)
    checkpoint.load(checkpoint.find_newest(folder / "plain", runtime), *reference, runtime)  # of one process
    reference = whole(*reference)

    for mode in modes:  # what one process saved, into every mode, and from there on to every other
        model, optimizer = make(mode, 3, world=n)
        if mode != "plain":  # it has state of its own, and gathered parameters, when it is loaded
            learn(model, optimizer, [0])
            with torch.no_grad():
                model(torch.zeros(1, 4, dtype=torch.int64))
        loaded = checkpoint.load(checkpoint.find_newest(folder / "plain", runtime), model, optimizer, runtime)
        assert loaded["step"] == 3 and loaded["tokens"] == 48
        check_equal(whole(model, optimizer), reference, complete=mode != "zero1")
        with torch.no_grad():
            model(torch.zeros(1, 4, dtype=torch.int64))
        run = folder / f"{mode}{n}"
        if runtime.is_rank_zero:
            run.mkdir()
        dist.barrier()
        path = CheckpointSaver(run, runtime).save(model, optimizer, state(3))
        index = checkpoint.read_index(path)
        check_equal({key: index.read(key) for key in index.entries}, reference)
        if mode in ("plain", "fsdp"):  # the bytes are shared out
            held = [p.stat().st_size for p in path.glob("model-*")]
            assert len(held) == n and max(held) < 1.5 * sum(held) / n, held
        learn(model, optimizer, range(3, 5))  # the optimizer steps with what it was given
        other_model, other = make(mode, 4, world=n)
        checkpoint.load(path, other_model, other, runtime)
        learn(other_model, other, range(3, 5))
        check_equal(whole(other_model, other), whole(model, optimizer))
        del model, optimizer, other_model, other
    for mode in modes:
        for source in modes:
            model, optimizer = make(mode, 5, world=n)
            checkpoint.load(checkpoint.find_newest(folder / f"{source}{n}", runtime), model, optimizer, runtime)
            check_equal(whole(model, optimizer), reference, complete=mode != "zero1")

    # tied weights; a checkpoint of before the first step
    for mode in ("plain", "zero1", "fsdp"):
        model, optimizer = make(mode, 1, "gpt2", n)
        run = folder / f"tied-{mode}{n}"
        if runtime.is_rank_zero:
            run.mkdir()
        dist.barrier()
        checkpoints = CheckpointSaver(run, runtime)
        again = make("plain", 2, "gpt2")
        path = checkpoints.save(model, optimizer, state(0))
        checkpoint.load(path, *again, runtime)
        check_equal(whole(*again), whole(model, optimizer))
        assert "lm_head.weight" not in whole(*again)
        learn(model, optimizer, range(2))
        path = checkpoints.save(model, optimizer, state(2))
        checkpoint.load(path, *again, runtime)
        check_equal(whole(model, optimizer), whole(*again), complete=mode != "zero1")
        checkpoint.export(run, path, {"step": 2}, runtime)
        check_equal(checkpoint.read_export(run)[0], {k: v for k, v in whole(*again).items() if "/" not in k})

    # asynchronous equals synchronous, byte for byte, and training meanwhile changes nothing of it
    model, optimizer = make("fsdp", 1, world=n)
    learn(model, optimizer, range(2))
    (one, two) = (folder / f"{kind}{n}" for kind in ("sync", "async"))
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
    assert in_background.save(model, optimizer, state(6), wait=True).name == "step_00000006"  # after that of 4
    assert in_background.poll() == (4, None) and in_background.wait() is None
    assert digests(path) != digests(two / "checkpoints/step_00000006")
    assert digests(path) == digests(two / "checkpoints/step_00000004")

    # what fails on one rank fails on all, and costs nothing
    before = digests(path)
    for name in ("write_pieces", "finish", "reread", "verify_share", "own_pieces"):
        rank = 0 if name == "finish" else n - 1
        with broken(name, runtime.rank == rank):
            if name == "verify_share":
                told(CheckpointError, "cut", lambda: checkpoint.verify(path, runtime))
                continue
            told(OSError, f"rank {rank}: cut", lambda: synchronous.save(model, optimizer, state(8)))
            if name != "own_pieces":
                in_background.save(model, optimizer, state(8))
                step, problem = in_background.wait()
                assert step == 8 and problem.startswith(f"rank {rank}: cut"), problem
        dist.barrier()
        for run in (one, two):
            assert sorted(p.name for p in (run / "checkpoints").iterdir())[-1] < "step_00000008", name
            assert not list((run / "checkpoints").glob(".*"))
        assert digests(path) == before
    with broken("fill", runtime.rank == n - 1, UserError):
        told(UserError, "cut", lambda: checkpoint.load(path, model, optimizer, runtime))
    with broken("write_export", runtime.is_rank_zero):
        told(OSError, "rank 0: cut", lambda: checkpoint.export(one, path, {}, runtime))

    # a damaged newest one is passed over by all alike
    if runtime.is_rank_zero:
        damaged = sorted((two / "checkpoints").iterdir())[-1] / "state.json"
        damaged.write_bytes(damaged.read_bytes()[:-1])
    dist.barrier()
    assert checkpoint.find_newest(two, runtime).name == "step_00000004"
    model = optimizer = None  # what outlives the group could abort the interpreter
    launch.shutdown()
    print("agreed\n", end="", flush=True)  # one write: they share a pipe


@contextlib.contextmanager
def broken(name, here, kind=OSError):
    """`checkpoint.<name>` raises, on this rank if `here`."""
    def fail(*_, **__):
        raise (CheckpointError if name == "verify_share" else kind)("cut")

    working = getattr(checkpoint, name)
    if here:
        setattr(checkpoint, name, fail)
    try:
        yield
    finally:
        setattr(checkpoint, name, working)


def told(kind, text, work):
    try:
        work()
    except kind as error:
        assert str(error).startswith(text), error
        return
    raise AssertionError(f"no {kind.__name__}")


if __name__ == "__main__":
    assert dist.is_available()
    main(Path(sys.argv[1]))
