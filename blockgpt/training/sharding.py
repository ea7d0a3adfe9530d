"""A model in parts: FSDP2 and tensor parallelism, on torch's DTensors. training/parallel.py decides; this does."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module


def shard_model(model, config, runtime):
    """Part a model on the meta device as `config` says, compiling each block by itself."""
    mesh = device_mesh(config, runtime)
    if runtime.tp_size > 1:
        apply_tensor_parallel(model, mesh["tensor"])
    if runtime.compile:  # what FSDP does between the blocks, no compiler can look into
        for block in model.blocks:
            block.forward = torch.compile(block.forward)
    if config.use_fsdp:
        apply_fsdp(model, config, runtime, mesh[tuple(n for n in mesh.mesh_dim_names if n != "tensor")])


def device_mesh(config, runtime):
    """The processes as a grid: (copies of the model, FSDP's shards of one, tensor-parallel neighbours), where asked."""
    sizes = {}
    if config.use_fsdp:
        sizes = {"shard": runtime.dp_size // config.dp_replicate}
        if config.dp_replicate > 1:
            sizes = {"replica": config.dp_replicate, **sizes}
    if runtime.tp_size > 1:
        sizes["tensor"] = runtime.tp_size
    return init_device_mesh(runtime.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)) if sizes else None


def apply_fsdp(model, config, runtime, mesh):
    """FSDP2 (Zhao et al. 2023): each block's parameters, gradients and moments in equal parts, one a process.

    A block is put together in the precision of the products when it is computed; the embeddings, the last norm and the
    head stay float32 under autocast, as without FSDP. Gradients are summed in float32.
    """
    reduced = MixedPrecisionPolicy(param_dtype=None if runtime.dtype == torch.float32 else runtime.dtype,
                                   reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if config.fsdp_cpu_offload and runtime.device.type != "cpu" else OffloadPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=config.fsdp_reshard_after_forward, mp_policy=reduced,
                    offload_policy=offload)
    fully_shard(model, mesh=mesh, offload_policy=offload)


def apply_tensor_parallel(model, mesh):
    """Tensor parallelism (Shoeybi et al. 2019): the matrices that a part's `tp_plan` names, in parts.

    columns: each process computes its share of the outputs (of the heads, of d_ff); rows: from its share of the
    inputs, summed over the processes; shards: works on such a share, its own parameters whole on each process;
    vocabulary, logits: the rows of the embedding and of the head, their outputs whole.
    """
    styles = {"columns": ColwiseParallel(), "rows": RowwiseParallel(), "shards": HeadwiseParallel(),
              "vocabulary": RowwiseParallel(input_layouts=Replicate()),
              "logits": ColwiseParallel(output_layouts=Replicate())}
    for module in list(model.modules()):
        plan = getattr(module, "tp_plan", {})
        there = {name: styles[style] for name, style in plan.items()
                 if getattr(module, name.removesuffix(".*"), None) is not None}
        if there:
            parallelize_module(module, mesh, there)
    if model.config.weight_tying:
        model.lm_head.weight = model.token_embedding.weight
    alibi_slopes = model.position.alibi_slopes  # of all heads
    rank = mesh.get_local_rank()

    def of_these_heads(device=None):
        every = alibi_slopes(device)
        return every if every is None else every.chunk(mesh.size())[rank]

    model.position.alibi_slopes = of_these_heads


class HeadwiseParallel(ParallelStyle):
    """A part that works on heads, (B, T, heads, …): on this process's, its parameters whole on each.

    It computes on DTensors, so that its gradients are summed over the processes. Where it works across heads, each
    process computes it on all of them, put together.
    """

    def _apply(self, module, device_mesh):
        across = getattr(module, "across_heads", False)

        def whole(name, shard_model, mesh):
            for key, p in list(shard_model.named_parameters(recurse=False)):
                shard_model.register_parameter(key, torch.nn.Parameter(
                    DTensor.from_local(p, mesh, [Replicate()], run_check=False)))

        def spread(module, inputs, mesh):
            inputs = (DTensor.from_local(x, mesh, [Shard(2)], run_check=False) for x in inputs)
            return tuple(x.redistribute(placements=[Replicate()]) if across else x for x in inputs)

        def gather(module, outputs, mesh):
            if isinstance(outputs, tuple):
                return tuple(gather(module, x, mesh) for x in outputs)
            return outputs.redistribute(placements=[Shard(2)]).to_local()

        return distribute_module(module, device_mesh, whole, spread, gather)
