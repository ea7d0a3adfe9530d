# PYTHON_ARGCOMPLETE_OK
"""Train one model: `python train.py [config/*.py ...] [--key=value ...]`; `--help` lists every key.

Several processes: `torchrun --standalone --nproc_per_node=8 train.py ...` (DDP; --use_zero1, --use_fsdp,
--tensor_parallel=N). Exit codes: 0 done or cleanly interrupted, 1 a --dry_run that does not fit, 2 a mistake in config
or data, 3 no usable checkpoint, 4 the final save failed, 5 not finite, 6 another process was lost, 7 out of memory.
"""

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.config_fields import with_location
from blockgpt.errors import exit_on_user_error
from configurator import load_config

if __name__ == "__main__":
    gc.disable()  # what modules consist of is no garbage, and to search it takes as long as to load half of it
    with exit_on_user_error():
        config = load_config(sys.argv[1:])  # before torch loads, so that a typo is reported at once
        import torch  # inside the block, so that Ctrl-C while torch loads is handled too


import torch

from blockgpt.accounting.dry_run import dry_run
from blockgpt.accounting.meter import StepMeter
from blockgpt.accounting.out_of_memory import out_of_memory_error
from blockgpt.checkpoints.initial_weights import load_companion
from blockgpt.checkpoints.manager import CheckpointManager
from blockgpt.checkpoints.saver import check_disk_space
from blockgpt.errors import ConfigError
from blockgpt.training import launch, parallel
from blockgpt.training.diagnostics import gradient_statistics, is_usable, non_finite_error
from blockgpt.training.faults import Watchdog
from blockgpt.training.objectives import MetricSums, step_generator
from blockgpt.training.optimizers import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from blockgpt.training.profiling import StepProfiler, memory_history
from configurator import Config, source_model_config
from model_builder import GPT, build_model
from model_config import ModelConfig
from training_logger import RunLog, claim_run_directory, find_restarted_run, run_header


def train(config: Config, runtime: launch.Runtime, watchdog: Watchdog) -> None:
    """Train the run that `config` describes, from its beginning or from its newest checkpoint, to its end."""
    # ---------------------------------------------------------------- data, model, optimizer, checkpoint, log
    run_dir = Path(runtime.on_rank_zero(lambda: str(claim_run_directory(config, runtime))))
    watchdog.enter_phase("data")
    objective = config.build_objective(runtime)
    config = config.for_vocabulary(objective.vocab_size)

    def build(model_config: ModelConfig) -> GPT:
        return build_model(model_config, config.seed, parallel.parameter_device(config, runtime),
                           lambda model: parallel.parallelize(model, config, runtime))

    watchdog.enter_phase("build")
    model = build(config.model)
    objective.companions = [load_companion(run, build(source_model_config(run)), runtime)
                            for run in objective.companion_runs(config)]
    optimizer = build_optimizer(model, config, runtime.device)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    checkpoints = CheckpointManager(config, runtime, model, optimizer, scaler, objective)
    watchdog.enter_phase("restore")
    progress = checkpoints.restore(run_dir)
    watchdog.enter_phase("wrap")
    wrapped = parallel.wrap(model, config, runtime)
    meter = StepMeter(model, config, runtime, objective.tokens_per_step)
    header = run_header(config, model, objective, runtime, meter, checkpoints.initial_weights)
    watchdog.log = log = RunLog(run_dir, header, config, watchdog.console)
    runtime.on_rank_zero(lambda: check_disk_space(run_dir, header["parameters"]["total"], config))
    # run_dir may have been taken by another run
    run_dir = Path(runtime.on_rank_zero(lambda: log.open(checkpoints.resumption, progress)))

    def evaluate() -> bool:
        """Log the validation metrics; returns whether they are the best so far."""
        watchdog.enter_phase("evaluation")
        metrics = objective.evaluate(wrapped)
        is_best = progress.is_best(metrics)
        log.evaluation(progress.step, progress.tokens, metrics, progress.best)
        return is_best

    with log, checkpoints.open(run_dir, log), memory_history(config, runtime, log), \
            StepProfiler(config, runtime, log) as profiler, watchdog.training():
        log.begin(model, checkpoints.resumption, progress.step)
        if config.eval_only:
            evaluate()
            return
        if checkpoints.finished:
            log.info(f"step {progress.step} of max_iters={config.max_iters}: no steps left "
                     f"(raise {'patience' if checkpoints.stopped_early else 'it'} to continue)")
            watchdog.enter_phase("save")
            checkpoints.save(final=True)  # the export may have failed, or was deleted

        # ------------------------------------------------------------ the loop
        first = progress.step
        for step in range(first, first if checkpoints.finished else config.max_iters):
            done, last = step + 1, step + 1 == config.max_iters
            to_log = done % config.log_interval == 0 or last or step == first
            watchdog.enter_phase("step", done)
            profiler.begin(done)
            meter.begin()
            lr = learning_rate(step, config)
            set_learning_rate(optimizer, lr)

            micro_losses, metrics, generator = [], MetricSums(), step_generator(config.seed, step, runtime)
            for micro_step, batch in enumerate(objective.micro_batches(step, wrapped, generator)):
                parallel.seed_micro_batch(config.seed, step, micro_step, runtime)
                with parallel.gradient_sync(wrapped, now=micro_step == objective.micro_steps - 1):
                    with runtime.autocast():
                        micro_loss, micro_metrics = objective.loss(wrapped, batch)
                    scaler.scale(micro_loss * runtime.dp_size).backward()  # the ranks' gradients are averaged
                micro_losses.append(micro_loss.detach())  # terms of the step's loss, which add up to it
                metrics.add(micro_metrics, model.metrics())
            scaler.unscale_(optimizer)
            if config.gradient_log_interval and done % config.gradient_log_interval == 0:
                log.gradients(done, gradient_statistics(model))
            grad_norm = clip_gradients(model, config.grad_clip)

            # All ranks get the same status. Later decisions depend on it alone, so they are the same on all ranks.
            memory_peak = (runtime.memory()["peak"] or 0) if to_log else 0
            status = watchdog.gather_status(torch.stack(micro_losses).tolist(), meter.elapsed(), memory_peak,
                                            checkpoints.save_finished, grad_norm)
            if not is_usable(status, scaler):
                checkpoints.wait()  # a background save that is under way is still good
                raise non_finite_error(status, done, lr, objective, runtime, checkpoints.last_saved)
            z_score = checkpoints.spikes.z_score(status.loss)
            skip = not status.is_finite or (z_score is not None and config.skip_spikes)
            if skip or z_score is not None:
                log.irregular(done, status, z_score, skip, scaler.get_scale())
            if not skip:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            progress.step, progress.tokens = done, progress.tokens + objective.tokens_per_step
            progress.skipped += skip
            meter.end(profiled=profiler.end(done))

            if to_log:
                log.step(done, progress.tokens, status, lr, meter.report(log.warning), runtime.memory(),
                         objective.consumed(done), profiler.communication(), metrics.means(runtime))
            if status.save_finished:
                checkpoints.poll()
            is_best = evaluate() if done % config.eval_interval == 0 or last else False
            final = bool(checkpoints.finished or status.stop_reason)
            if final or checkpoints.is_due(is_best):
                watchdog.enter_phase("save")
                checkpoints.save(final)
            if final:
                break
        if checkpoints.finished:
            log.finished(checkpoints.stopped_early)
        else:
            log.interrupted(status.stop_reason or "", progress.step)


def main(config: Config) -> None:
    watchdog: Watchdog | None = None
    try:
        if config.dry_run:
            sys.exit(dry_run(config, build_model))
        runtime = launch.init(config)
        with Watchdog(runtime, config) as watchdog:
            if name := find_restarted_run(config, runtime):
                watchdog.config = config = load_config(sys.argv[1:], restarted=name)
            launch.check_same_config(config, runtime)
            train(config, runtime, watchdog)
            launch.wait_for_all()
    except ConfigError as error:
        raise with_location(error, config.explicit) from None
    except (MemoryError, RuntimeError, OSError) as error:  # torch.OutOfMemoryError is a RuntimeError
        raise out_of_memory_error(error, config, build_model, watchdog) or error from None
    launch.shutdown()


if __name__ == "__main__":
    gc.freeze()  # no later collection searches the modules
    gc.enable()
    with exit_on_user_error(launch.exit_process):
        main(config)
