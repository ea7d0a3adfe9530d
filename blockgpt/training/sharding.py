"""Sharded models: FSDP2 and tensor parallelism, on torch's DTensors.

`parallelize` (training/parallel.py) calls `shard_model`. A module takes part in tensor parallelism by a `tp_plan`; a
new style of a plan is a line in `tp_styles`.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from blockgpt.training.launch import Runtime


def shard_model(model: Any, config: Any, runtime: Runtime) -> None:
    """Shard a model on the meta device as `config` says, and compile each block on its own."""
    mesh = build_mesh(config, runtime)
    if runtime.tp_size > 1:
        apply_tensor_parallel(model, mesh["tp"])
    if runtime.compile:  # by block, as the compiler cannot trace what FSDP does between blocks
        for block in model.blocks:
            block.forward = torch.compile(block.forward)
    if config.use_fsdp:
        apply_fsdp(model, config, runtime, mesh["dp_replicate", "dp_shard"] if config.dp_replicate > 1
                   else mesh["dp_shard"])


def build_mesh(config: Any, runtime: Runtime) -> DeviceMesh:
    """The mesh of all ranks. Its dimensions, where used: dp_replicate, dp_shard, tp."""
    sizes = {}
    if config.use_fsdp:
        if config.dp_replicate > 1:
            sizes["dp_replicate"] = config.dp_replicate
        sizes["dp_shard"] = runtime.dp_size // config.dp_replicate
    if runtime.tp_size > 1:
        sizes["tp"] = runtime.tp_size
    return init_device_mesh(runtime.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


# ---------------------------------------------------------------- FSDP


def apply_fsdp(model: Any, config: Any, runtime: Runtime, mesh: DeviceMesh) -> None:
    """FSDP2 (Zhao et al. 2023): parameters, gradients and optimizer state of each block in equal shards.

    A block is gathered in the dtype of the matrix products when it is computed. The embeddings, the last norm and the
    head stay float32 under autocast, as without FSDP. Gradients are reduced in float32.
    """
    block_policy = MixedPrecisionPolicy(param_dtype=None if runtime.dtype == torch.float32 else runtime.dtype,
                                        reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if config.fsdp_cpu_offload and runtime.device.type != "cpu" else OffloadPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=config.fsdp_reshard_after_forward, mp_policy=block_policy,
                    offload_policy=offload)
    fully_shard(model, mesh=mesh, offload_policy=offload)


# ---------------------------------------------------------------- tensor parallelism


def tp_styles() -> dict[str, ParallelStyle]:
    """The styles that a module's `tp_plan` gives its submodules.

    colwise: each rank computes its own outputs (its heads, its shard of d_ff); rowwise: from its own inputs, summed
    over the ranks; headwise: on its own heads, with replicated parameters; embedding_rowwise, colwise_rep: the
    embedding and the head, sharded by vocabulary, with replicated inputs and outputs.
    """
    return {"colwise": ColwiseParallel(), "rowwise": RowwiseParallel(), "headwise": HeadwiseParallel(),
            "embedding_rowwise": RowwiseParallel(input_layouts=Replicate()),
            "colwise_rep": ColwiseParallel(output_layouts=Replicate())}


def apply_tensor_parallel(model: Any, mesh: DeviceMesh) -> None:
    """Tensor parallelism (Shoeybi et al. 2019): shard each module over `mesh` as its `tp_plan` says."""
    styles = tp_styles()
    for module in list(model.modules()):
        children = {name for name, _ in module.named_children()} | {
            f"{name}.*" for name, child in module.named_children() if any(child.children())}
        plan = {name: styles[style] for name, style in getattr(module, "tp_plan", {}).items() if name in children}
        if plan:
            parallelize_module(module, mesh, plan)
    if model.config.weight_tying:
        model.lm_head.weight = model.token_embedding.weight
    shard_alibi_slopes(model.position, mesh)


def shard_alibi_slopes(position: Any, mesh: DeviceMesh) -> None:
    """Make `position.alibi_slopes` return the slopes of this rank's heads only."""
    all_alibi_slopes, tp_rank = position.alibi_slopes, mesh.get_local_rank()

    def local_alibi_slopes(device: torch.device | None = None) -> torch.Tensor | None:
        alibi_slopes = all_alibi_slopes(device)
        return None if alibi_slopes is None else alibi_slopes.chunk(mesh.size())[tp_rank]

    position.alibi_slopes = local_alibi_slopes


class HeadwiseParallel(ParallelStyle):
    """For a module that works on heads, (B, T, H, …): on this rank's heads, with replicated parameters.

    It computes on DTensors, so that the gradients of its parameters are summed over the ranks. A module with
    `across_heads` gets the heads of all ranks, and every rank computes all of them.

    torch's SequenceParallel(sequence_dim=2) does the same for modules of one input and one output.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        across_heads = getattr(module, "across_heads", False)

        def shard_inputs(module: nn.Module, inputs: tuple[torch.Tensor, ...], mesh: DeviceMesh) -> Any:
            sharded = [DTensor.from_local(x, mesh, [Shard(2)], run_check=False) for x in inputs]
            return tuple(x.redistribute(placements=[Replicate()]) if across_heads else x for x in sharded)

        def local_outputs(module: nn.Module, outputs: Any, mesh: DeviceMesh) -> Any:
            if isinstance(outputs, tuple):
                return tuple(local_outputs(module, x, mesh) for x in outputs)
            return outputs.redistribute(placements=[Shard(2)]).to_local()

        # Without a partition function, distribute_module replicates the parameters.
        return distribute_module(module, device_mesh, None, shard_inputs, local_outputs)
