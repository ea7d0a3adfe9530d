"""Which kernels a model uses: torch's operators, or this project's in Triton.

A component with a kernel has two attributes: `kernel_family`, a name in `FAMILIES`, and `kernel`, the module with its
functions, or None for torch's operators. kernels=triton and kernels=torch set them when the model is built. With
kernels=auto on CUDA, `choose_kernels` times both at the run's own shapes, once: a resumed run keeps what its run.json
says, so that its numbers stay equal. Elsewhere there is nothing to choose, and Triton is not imported.
To add a kernel: a module here, a line in `FAMILIES`, a case in `candidates`.
"""

import importlib
import importlib.util
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

FAMILIES = {"rms_norm": "blockgpt.kernels.rms_norm", "swiglu": "blockgpt.kernels.swiglu"}
ROUNDS = 20  # of all candidates in turn; the median counts
NOISE = 0.03  # a kernel that is not faster by more than this is not worth it

Candidate = Callable[..., torch.Tensor]


def load_kernels(family: str) -> Any:
    """The module of a kernel family; imports Triton."""
    return importlib.import_module(FAMILIES[family])


def set_kernels(model: torch.nn.Module, chosen: Mapping[str, str]) -> None:
    """Let the components of each family use "triton" or "torch", as `chosen` says."""
    component: Any
    for component in model.modules():
        family: Any = getattr(component, "kernel_family", None)
        if family in chosen:
            component.kernel = load_kernels(family) if chosen[family] == "triton" else None


def families_of(model: torch.nn.Module) -> list[str]:
    """The kernel families that a model's components have."""
    return sorted({str(module.kernel_family) for module in model.modules() if hasattr(module, "kernel_family")})


def used_kernels(model: torch.nn.Module) -> dict[str, str]:
    """{family: "triton" or "torch"} of a model, as its components are."""
    return {str(module.kernel_family): "torch" if module.kernel is None else "triton"
            for module in model.modules() if hasattr(module, "kernel_family")}


def choose_kernels(model: Any, config: Any, runtime: Any) -> None:
    """Let the model use the faster kernels; rank zero measures. `model.kernel_times` says what was measured.

    Args:
        model: of the run; its weights are not used.
        config: of the run.
        runtime: of this process.
    """
    def measure() -> dict[str, dict[str, float]]:
        if config.resuming and (recorded := recorded_times(Path(config.out_dir, config.run_name))) is not None:
            return recorded
        if importlib.util.find_spec("triton") is None:
            return {}
        full = model.config
        tokens = config.batch_size * full.block_size
        return {family: time_candidates(candidates(family, tokens, full, runtime.device, runtime.dtype,
                                                   runtime.compile)) for family in families_of(model)}

    model.kernel_times = runtime.on_rank_zero(measure)
    set_kernels(model, {family: fastest(times) for family, times in model.kernel_times.items()})


def recorded_times(run_dir: Path) -> dict[str, dict[str, float]] | None:
    """What a run measured when it began, from its run.json; None if it measured nothing."""
    times: dict[str, dict[str, float]] | None = json.loads((run_dir / "run.json").read_bytes()).get("kernel_times")
    return times or None


def fastest(times: Mapping[str, float]) -> str:
    """The candidate to use: torch's unless another is faster by more than the noise."""
    best = min(times, key=lambda name: times[name])
    return best if times[best] < times["torch"] * (1 - NOISE) else "torch"


def candidates(family: str, tokens: int, config: Any, device: torch.device, dtype: torch.dtype,
               compiled: bool) -> dict[str, tuple[Candidate, list[torch.Tensor]]]:
    """{name: (function, its inputs)} of a family at the shapes of a micro-batch of `tokens` tokens."""
    kernels = load_kernels(family)
    if family == "rms_norm":
        # The residual stream is float32, also under autocast.
        inputs = [torch.randn(tokens, config.n_embd, device=device), torch.randn(config.n_embd, device=device)]

        last = config.norm_eps
        operators = {"torch": kernels.rms_norm_torch, "triton": kernels.rms_norm}
    else:
        inputs = list(torch.randn(tokens, 2 * config.d_ff, device=device, dtype=dtype).chunk(2, dim=-1))

        last = config.activation
        operators = {"torch": kernels.gated_torch, "triton": kernels.gated}

    def with_last(operator: Callable[..., torch.Tensor]) -> Candidate:
        def function(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return operator(first, second, last)
        return torch.compile(function) if compiled else function

    functions = {name: with_last(operator) for name, operator in operators.items()}
    return {name: (function, [t.detach().requires_grad_() for t in inputs]) for name, function in functions.items()}


def time_candidates(functions: Mapping[str, tuple[Candidate, list[torch.Tensor]]],
                    rounds: int = ROUNDS) -> dict[str, float]:
    """{name: median seconds of a forward and backward pass}, the candidates in turn, in rotating order."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for i in range(rounds + 3):  # three to warm up: the first compiles
        for name in names[i % len(names):] + names[:i % len(names)]:
            seconds = time_once(*functions[name])
            if i >= 3:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def time_once(function: Candidate, inputs: list[torch.Tensor]) -> float:
    """Seconds on the GPU of a forward and backward pass."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    grad = torch.ones_like(inputs[0])
    begin.record()
    torch.autograd.grad(function(*inputs), inputs, grad)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000
