"""Which kernels a model uses: torch's operators, or this project's in Triton.

A component with a kernel has two attributes: `kernel_family`, a name in `FAMILIES`, and `kernel`, the module with its
functions, or None for torch's operators. A norm has its width too, `kernel_width`: QK-norms and the norms of the stream
are timed, and chosen, each at their own. kernels=triton and kernels=torch set them when the model is built. With
kernels=auto on CUDA, `choose_kernels` times both at the run's own shapes, once: a resumed run keeps what its run.json
says, so that its numbers stay equal. Elsewhere there is nothing to choose, and Triton is not imported.
To add a kernel: a module here, its name in `FAMILIES`, its shapes in `inputs_of`.
"""

import importlib
import importlib.util
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

FAMILIES = {name: f"blockgpt.kernels.{name}" for name in ("layer_norm", "rms_norm", "rope", "swiglu")}
FUNCTIONS = {"rope": "rotary", "swiglu": "gated"}  # of the families whose function is not named after them
ROUNDS = 20  # of all candidates in turn; the median counts
NOISE = 0.03  # a kernel that is not faster by more than this is not worth it

Candidate = Callable[..., Any]


def load_kernels(family: str) -> Any:
    """The module of a kernel family; imports Triton."""
    return importlib.import_module(FAMILIES[family])


def kernel_case(component: Any) -> str:
    """What a choice is made for: "swiglu"; a norm's width is part of it, "rms_norm 64"."""
    width = getattr(component, "kernel_width", None)
    return str(component.kernel_family) if width is None else f"{component.kernel_family} {width}"


def set_kernels(model: torch.nn.Module, chosen: Mapping[str, str]) -> None:
    """Let the components of each case, or of each family, use "triton" or "torch", as `chosen` says."""
    component: Any
    for component in model.modules():
        family: Any = getattr(component, "kernel_family", None)
        if family is not None and (choice := chosen.get(kernel_case(component), chosen.get(family))):
            component.kernel = load_kernels(family) if choice == "triton" else None


def cases_of(model: torch.nn.Module) -> list[str]:
    """What there is to choose in a model, see `kernel_case`."""
    return sorted({kernel_case(module) for module in model.modules() if hasattr(module, "kernel_family")})


def used_kernels(model: torch.nn.Module) -> dict[str, str]:
    """{case: "triton" or "torch"} of a model, as its components are."""
    return {kernel_case(module): "torch" if module.kernel is None else "triton"
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
        return {case: time_candidates(candidates(case, tokens, full, runtime.device, runtime.dtype, runtime.compile))
                for case in cases_of(model)}

    model.kernel_times = runtime.on_rank_zero(measure)
    set_kernels(model, {case: fastest(times) for case, times in model.kernel_times.items()})


def recorded_times(run_dir: Path) -> dict[str, dict[str, float]] | None:
    """What a run measured when it began, from its run.json; None if it measured nothing."""
    times: dict[str, dict[str, float]] | None = json.loads((run_dir / "run.json").read_bytes()).get("kernel_times")
    return times or None


def fastest(times: Mapping[str, float]) -> str:
    """The candidate to use: torch's unless another is faster by more than the noise."""
    best = min(times, key=lambda name: times[name])
    return best if times[best] < times["torch"] * (1 - NOISE) else "torch"


def candidates(case: str, tokens: int, config: Any, device: torch.device, dtype: torch.dtype,
               compiled: bool) -> dict[str, tuple[Candidate, list[torch.Tensor]]]:
    """{name: (function, its inputs)} of a case at the shapes of a micro-batch of `tokens` tokens."""
    family, _, width = case.partition(" ")
    kernels, function_name = load_kernels(family), FUNCTIONS.get(family, family)
    operators = {"torch": getattr(kernels, f"{function_name}_torch"), "triton": getattr(kernels, function_name)}
    inputs, rest = inputs_of(family, int(width or 0), tokens, config, device, dtype)

    def with_rest(operator: Callable[..., Any]) -> Candidate:
        def function(*inputs: torch.Tensor) -> Any:
            return operator(*inputs, *rest)
        return torch.compile(function) if compiled else function

    return {name: (with_rest(operator), [t.detach().requires_grad_() for t in inputs])
            for name, operator in operators.items()}


def inputs_of(family: str, width: int, tokens: int, config: Any, device: torch.device,
              dtype: torch.dtype) -> tuple[list[torch.Tensor], list[Any]]:
    """The tensors of a family that get gradients, and its other arguments."""
    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    if family == "swiglu":
        return list(random(tokens, 2 * config.d_ff, dtype=dtype).chunk(2, dim=-1)), [config.activation]
    if family == "rope":
        angles = random(config.block_size, config.rotary_dim() // 2)
        shape = (max(tokens // config.block_size, 1), config.block_size)
        return [random(*shape, heads, config.head_dim, dtype=dtype).transpose(1, 2)
                for heads in (config.n_head, config.n_kv_head)], [angles.cos(), angles.sin()]
    # The residual stream is float32, also under autocast; queries and keys are not.
    if width == config.n_embd:
        dtype = torch.float32
    elif width == config.head_dim:
        tokens *= config.n_head
    inputs = [random(tokens, width, dtype=dtype), random(width)]
    if family == "rms_norm":
        return inputs, [config.norm_eps]
    return inputs + ([random(width)] if config.normalization == "layernorm" else []), (
        [config.norm_eps] if config.normalization == "layernorm" else [None, config.norm_eps])


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
    begin.record()
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, inputs, [torch.ones_like(y) for y in outputs])
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000
