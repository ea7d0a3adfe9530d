"""Sharded models: which mesh, which parameters are sharded how, and that a plan's styles are known."""

import pytest
import torch
from ranks import run_ranks
from torch.distributed.tensor import DTensor, Replicate, Shard

import model_attention
import model_builder
import model_components
from blockgpt.training import launch
from blockgpt.training.parallel import parallelize
from blockgpt.training.sharding import build_mesh, tp_styles
from configurator import load_config
from model_builder import build_model

SIZE = ["--device=cpu", "--n_layer=1", "--n_head=4", "--n_embd=16", "--block_size=8", "--gradient_accumulation_steps=4",
        "--position_encoding=alibi", "--attention_backend=manual", "--qk_norm=head", "--vocab_size=64", "--d_ff=32",
        "--compile=False", "--weight_tying=False"]


def test_every_plan_names_styles_that_exist():
    plans = [cls.tp_plan for module in (model_attention, model_builder, model_components)
             for cls in vars(module).values() if isinstance(cls, type) and "tp_plan" in vars(cls)]
    used = {style for plan in plans for style in plan.values()}
    assert used == set(tp_styles())


def sharded_model(runtime, *flags):
    config = load_config([*SIZE, *flags])
    runtime.tp_size = config.tensor_parallel
    model = build_model(config.model, 0, runtime.device, lambda model: parallelize(model, config, runtime))
    return model, build_mesh(config, runtime), dict(model.named_parameters())


def check_meshes(runtime):
    for flags, names, shape in (
            (["--use_fsdp=True"], ("dp_shard",), (4,)),
            (["--use_fsdp=True", "--dp_replicate=2"], ("dp_replicate", "dp_shard"), (2, 2)),
            (["--tensor_parallel=4"], ("tp",), (4,)),
            (["--use_fsdp=True", "--tensor_parallel=2"], ("dp_shard", "tp"), (2, 2))):
        config = load_config([*SIZE, *flags])
        runtime.tp_size = config.tensor_parallel
        mesh = build_mesh(config, runtime)
        assert mesh.mesh_dim_names == names and tuple(mesh.shape) == shape


def check_fsdp(runtime):
    _, _, parameters = sharded_model(runtime, "--use_fsdp=True")
    assert all(p.placements == (Shard(0),) for p in parameters.values())
    _, _, parameters = sharded_model(runtime, "--use_fsdp=True", "--dp_replicate=2")
    assert all(p.placements == (Replicate(), Shard(0)) for p in parameters.values())


def check_tensor_parallel(runtime):
    model, mesh, parameters = sharded_model(runtime, "--tensor_parallel=4")
    rank = mesh.get_local_rank()
    local = {name: tuple(p.to_local().shape if isinstance(p, DTensor) else p.shape) for name, p in parameters.items()}
    assert local["token_embedding.weight"] == (16, 16) and local["lm_head.weight"] == (16, 16)
    assert local["blocks.0.attn.q_proj.weight"] == (4, 16) and local["blocks.0.attn.o_proj.weight"] == (16, 4)
    assert local["blocks.0.ffn.up_proj.weight"] == (8, 16) and local["blocks.0.ffn.down_proj.weight"] == (16, 8)
    (qk_norm,) = {p.placements for name, p in parameters.items() if "qk_norm" in name or "q_norm" in name}
    assert qk_norm == (Replicate(),)
    all_slopes = build_model(load_config(SIZE).model).position.alibi_slopes()
    assert torch.equal(model.position.alibi_slopes(), all_slopes[rank:rank + 1])


def check_sharding():
    runtime = launch.init(load_config([*SIZE, "--use_fsdp=True"]))
    check_meshes(runtime)
    check_fsdp(runtime)
    check_tensor_parallel(runtime)
    launch.shutdown()


@pytest.mark.slow
def test_parameters_are_sharded_over_the_mesh():
    run_ranks(4, check_sharding)
