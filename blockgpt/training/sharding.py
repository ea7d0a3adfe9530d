"""A model in parts: FSDP2 and tensor parallelism, on torch's DTensors. training/parallel.py decides; this does."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module


def part(model, config, machine):
    """Part a model on the meta device as `config` says, compiling each block by itself."""
    mesh = device_mesh(config, machine)
    if machine.tensor_parallel > 1:
        split_matrices(model, mesh["tensor"])
    if machine.compile:  # what FSDP does between the blocks, no compiler can look into
        for block in model.blocks:
            block.forward = torch.compile(block.forward)
    if config.use_fsdp:
        shard(model, config, machine, mesh[tuple(n for n in mesh.mesh_dim_names if n != "tensor")])


def device_mesh(config, machine):
    """The processes as a grid: (copies of the model, FSDP's shards of one, tensor-parallel neighbours), where asked."""
    sizes = {}
    if config.use_fsdp:
        sizes = {"shard": machine.data_size // config.fsdp_replicas}
        if config.fsdp_replicas > 1:
            sizes = {"replica": config.fsdp_replicas, **sizes}
    if machine.tensor_parallel > 1:
        sizes["tensor"] = machine.tensor_parallel
    return init_device_mesh(machine.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)) if sizes else None


def shard(model, config, machine, mesh):
    """FSDP2 (Zhao et al. 2023): each block's parameters, gradients and moments in equal parts, one a process.

    A block is put together in the precision of the products when it is computed; the embeddings, the last norm and the
    head stay float32 under autocast, as without FSDP. Gradients are summed in float32.
    """
    reduced = MixedPrecisionPolicy(param_dtype=None if machine.dtype == torch.float32 else machine.dtype,
                                   reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if config.fsdp_cpu_offload and machine.device.type != "cpu" else OffloadPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=config.fsdp_reshard_after_forward, mp_policy=reduced,
                    offload_policy=offload)
    fully_shard(model, mesh=mesh, offload_policy=offload)


def split_matrices(model, mesh):
    """Tensor parallelism (Shoeybi et al. 2019): the matrices that a part's `tensor_plan` names, in parts.

    columns: each process computes its share of the outputs (of the heads, of d_ff); rows: from its share of the
    inputs, summed over the processes; shards: works on such a share, its own parameters whole on each process;
    vocabulary, logits: the rows of the embedding and of the head, their outputs whole.
    """
    styles = {"columns": ColwiseParallel(), "rows": RowwiseParallel(), "shards": OnShards(),
              "vocabulary": RowwiseParallel(input_layouts=Replicate()),
              "logits": ColwiseParallel(output_layouts=Replicate())}
    for module in list(model.modules()):
        plan = getattr(module, "tensor_plan", {})
        there = {name: styles[style] for name, style in plan.items()
                 if getattr(module, name.removesuffix(".*"), None) is not None}
        if there:
            parallelize_module(module, mesh, there)
    if model.config.weight_tying:
        model.lm_head.weight = model.token_embedding.weight
    slopes = model.position.slopes  # of all heads
    rank = mesh.get_local_rank()

    def of_these_heads(device=None):
        every = slopes(device)
        return every if every is None else every.chunk(mesh.size())[rank]

    model.position.slopes = of_these_heads


class OnShards(ParallelStyle):
    """A part that works on heads, (B, T, heads, …): on this process's, its parameters whole on each.

    It computes on DTensors, so that its gradients are summed over the processes. Where it works across heads, each
    process computes it on all of them, put together.
    """

    def _apply(self, module, device_mesh):
        across = getattr(module, "across_heads", False)

        def whole(name, part, mesh):
            for key, p in list(part.named_parameters(recurse=False)):
                part.register_parameter(key, torch.nn.Parameter(
                    DTensor.from_local(p, mesh, [Replicate()], run_check=False)))

        def spread(module, inputs, mesh):
            inputs = (DTensor.from_local(x, mesh, [Shard(2)], run_check=False) for x in inputs)
            return tuple(x.redistribute(placements=[Replicate()]) if across else x for x in inputs)

        def gather(module, outputs, mesh):
            if isinstance(outputs, tuple):
                return tuple(gather(module, x, mesh) for x in outputs)
            return outputs.redistribute(placements=[Shard(2)]).to_local()

        return distribute_module(module, device_mesh, whole, spread, gather)
