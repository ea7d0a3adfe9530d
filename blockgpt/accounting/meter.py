"""How fast training runs: step time, tokens/s, FLOP/s and model FLOPs utilisation (MFU) since the last log line."""

from collections.abc import Callable
from typing import Any

from blockgpt.accounting.flops import flops_per_token
from blockgpt.accounting.hardware import peak_flops
from blockgpt.training.launch import Runtime


class StepMeter:
    """Times the steps of one run.

    Attributes:
        flops: FLOPs per token, as `flops_per_token` gives them.
        peak: FLOP/s of one device that MFU divides by; None if unknown.
        peak_source: how `peak` was determined, as text.
    """

    def __init__(self, model: Any, config: Any, runtime: Runtime, tokens_per_step: int) -> None:
        self.runtime, self.tokens_per_step = runtime, tokens_per_step
        self.flops = flops_per_token(model, config.model.block_size)
        self.peak, self.peak_source = peak_flops(runtime.device, runtime.dtype, runtime.tf32, config.mfu_peak)
        self.seconds, self.steps, self.last = 0.0, 0, 0.0  # of the steps that count, and of the last one

    def begin(self) -> None:
        """A step begins. Evaluation and checkpoints are outside `begin` … `end`, so they cost no step time.

        Nor does time in which the process was stopped: see `RunningClock`.
        """
        self.started = self.runtime.clock.time()

    def elapsed(self) -> float:
        """Seconds since the step began."""
        return self.runtime.clock.time() - self.started

    def end(self, profiled: bool) -> None:
        """The step ended.

        Args:
            profiled: the profiler slowed the step down. It then counts only if no other step does.
        """
        self.last = self.elapsed()
        if not profiled:
            self.seconds, self.steps = self.seconds + self.last, self.steps + 1

    def report(self, warn: Callable[[str], None]) -> dict[str, float | None]:
        """{step_time (s), tokens_per_sec, tflops, mfu} over the steps since the last report.

        Args:
            warn: called with one line if an MFU above 1 shows that the peak is wrong. There is no MFU from then on.
        """
        step_time = self.seconds / self.steps if self.steps else self.last
        self.seconds, self.steps = 0.0, 0
        speed = self.tokens_per_step / step_time
        achieved = self.flops["train"] * speed
        mfu = achieved / (self.peak * self.runtime.world_size) if self.peak else None
        if mfu is not None and self.peak and mfu > 1:
            warn(f"MFU of {mfu:.0%}: the peak, {self.peak / 1e12:.4g} TFLOP/s ({self.peak_source}), is too low; "
                 "MFU is not reported from here on (set a peak with --mfu_peak=TFLOPS)")
            self.peak = mfu = None
        return {"step_time": step_time, "tokens_per_sec": speed, "tflops": achieved / 1e12, "mfu": mfu}
