"""Train one model: `python train.py [config/*.py ...] [--key=value ...]`; `--help` lists every key.

Several processes: `torchrun --standalone --nproc_per_node=8 train.py ...` (DDP; --use_zero1, --use_fsdp,
--tensor_parallel=N). Exit codes: 0 done or cleanly interrupted, 1 a --dry_run that does not fit, 2 a mistake in config
or data, 3 no usable checkpoint, 4 the final save failed, 5 not finite, 6 another process was lost.
"""

import sys

from blockgpt.errors import exit_on_user_error
from configurator import load_config, with_location

if __name__ == "__main__":
    with exit_on_user_error():
        config = load_config(sys.argv[1:])  # before torch loads: a slip of the finger is told at once
        import torch  # its seconds, too, can end with Ctrl-C

import math
import time
from pathlib import Path

import torch

import blockgpt.training.checkpoint as checkpoint
import blockgpt.training.parallel as parallel
from blockgpt.accounting.dry_run import dry_run
from blockgpt.accounting.flops import flops_per_token
from blockgpt.accounting.hardware import peak_flops
from blockgpt.accounting.out_of_memory import out_of_memory_hint
from blockgpt.errors import CheckpointError, ConfigError, NonFiniteError, SaveError, UserError
from blockgpt.training import checkpoint_saver, launch
from blockgpt.training.diagnostics import LossSpikeDetector, gradient_statistics
from blockgpt.training.faults import Watchdog
from blockgpt.training.objectives import LanguageModeling
from blockgpt.training.optimizers import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from blockgpt.training.profiling import Profile, memory_history
from model_builder import build_model
from training_logger import RunLog, environment, find_restarted_run, print_header, run_directory


def train(config, runtime, watchdog):
    # ---------------------------------------------------------------- what is trained, on what
    run_dir = Path(runtime.on_rank_zero(lambda: str(run_directory(config))))
    objective = LanguageModeling(config, runtime)
    config = config.for_vocabulary(objective.vocab_size)
    model = build_model(config.model, config.seed, parallel.parameter_device(config, runtime),
                        lambda model: parallel.parallelize(model, config, runtime))
    optimizer = build_optimizer(model, config, runtime.device)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)

    state = {"step": 0, "tokens": 0, "best": None, "spikes": None, "skipped": 0, "scaler": None,
             "data": objective.fingerprint,
             "description": {"model": model.infer_config().flat(), "tokenizer": objective.tokenizer}}
    resumed, path, changed = config.resuming, None, dict(config.changed)
    if resumed:  # path None: it ended before its first save
        path = checkpoint.find_newest(run_dir, runtime, or_none=config.resume == "auto")
    if path:
        state = checkpoint.load(path, model, optimizer, runtime)
        if state["data"] != objective.fingerprint:
            if not config.resume_force:
                raise CheckpointError(f"{path}: was made on other data than its dataset holds now")
            changed["data"] = [state["data"], objective.fingerprint]
        if state["world_size"] != runtime.world_size:
            changed["world_size"] = [state["world_size"], runtime.world_size]
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    spikes = LossSpikeDetector(config.spike_threshold, state["spikes"])
    wrapped = parallel.wrap(model, config, runtime)

    # ---------------------------------------------------------------- what the log says of it
    flops = flops_per_token(model, config.model.block_size)
    peak, peak_source = peak_flops(runtime.device, runtime.dtype, runtime.tf32, config.mfu_peak)
    header = {
        "arch_name": model.infer_config().arch_name(), "config": config.flat(), "model": model.infer_config().flat(),
        "parameters": model.parameter_counts(), "flops_per_token": flops, "data": objective.description(),
        "attention_kernels": model.attention_kernels(runtime.dtype),
        "hardware": {"device": str(runtime.device), "name": runtime.name(), "world_size": runtime.world_size,
                     "mode": parallel.parallel_mode(config, runtime), "dtype": str(runtime.dtype).removeprefix("torch."),
                     "tf32": runtime.tf32, "compile": runtime.compile, "peak_flops": peak, "peak_source": peak_source},
        "launch": runtime.first_launch_id, **environment(),
    }
    log = RunLog(run_dir, header, config, resumed, quiet=not runtime.is_rank_zero)
    runtime.on_rank_zero(lambda: checkpoint_saver.check_disk_space(run_dir, header["parameters"]["total"], config))
    run_dir = Path(runtime.on_rank_zero(log.open))  # another one, if a run that began in the same second took that name
    runtime.on_rank_zero(lambda: checkpoint.clean(run_dir))
    watchdog.on_peer_lost, saved = log.lost, state["step"] if path else None
    saves = checkpoint_saver.CheckpointSaver(run_dir, runtime, config.keep_last, config.checkpoint_async)

    def evaluate():
        """Validation metrics into the log; whether they are the best so far."""
        watchdog.enter_phase("evaluation")
        metrics = objective.evaluate(wrapped)
        log.evaluation(state["step"], state["tokens"], **metrics)
        best = math.isfinite(metrics["val_loss"]) and (
            state["best"] is None or metrics["val_loss"] < state["best"]["val_loss"])
        if best:
            state["best"] = {"step": state["step"], **metrics}
            log.best(state["best"])
        return best

    def save(last=False):
        """Write a checkpoint of `state`, at the end the weights alone too. A failure warns; the last is exit 4."""
        watchdog.enter_phase("save")
        now = {**state, "scaler": scaler.state_dict() or None, "spikes": spikes.state, "config": config.flat(),
               "seed": config.seed, "sequences": state["step"] * objective.sequences_per_step}
        started = time.perf_counter()
        try:
            stands = saves.save(model, optimizer, now, wait=last)
            if stands:
                note_save(state["step"], None, time.perf_counter() - started)
            if last and state["step"] >= config.max_iters:
                checkpoint.export(run_dir, stands, {**state["description"], "step": state["step"]}, runtime)
        except OSError as error:
            if last:
                raise SaveError(f"{run_dir}: the checkpoint of step {state['step']} failed: {error} (the last good one "
                                f"stands: {'none' if saved is None else f'step {saved}'})") from None
            note_save(state["step"], error)

    def note_save(step, problem, seconds=None):
        """Say how a save ended, whose last good one is the step to go back to."""
        nonlocal saved
        if problem:
            log.warning(f"the checkpoint of step {step} failed: {problem}; training goes on")
        else:
            saved = step
            log.saved(step, seconds)

    with log, memory_history(config, runtime, log), Profile(config, runtime, log) as profile, watchdog.training():
        if runtime.is_rank_zero:
            print_header(header, config, model, flops, run_dir)
        if resumed:
            log.info(f"resumed from {path} at step {state['step']}" if path else f"{run_dir}: no checkpoint, from 0")
            if not config.eval_only:
                log.resumed_at(state["step"], changed, (*config.forced, *({"data"} & changed.keys())),
                               runtime.world_size)
        if config.eval_only:
            evaluate()
            return

        # ------------------------------------------------------------ the loop
        first = state["step"]
        if first >= config.max_iters:
            log.info(f"nothing left to do at step {first} of max_iters={config.max_iters} (raise it to go on)")
            save(last=True)  # the export may be what failed, or was deleted
        busy, since_log = 0.0, 0
        for step in range(first, config.max_iters):
            profile.begin(step + 1)
            started = time.perf_counter()
            watchdog.enter_phase("step", step + 1)
            rate = learning_rate(step, config)
            set_learning_rate(optimizer, rate)

            # Each micro-batch gives its share of the step's loss: the sum over its tokens / the step's tokens.
            shares = []
            for micro_step, batch in enumerate(objective.micro_batches(step)):
                parallel.seed_micro_batch(config.seed, step, micro_step * runtime.dp_size + runtime.dp_rank)
                last = micro_step == objective.micro_steps - 1
                with parallel.gradient_sync(wrapped, now=last):
                    with runtime.autocast():
                        share = objective.loss(wrapped, batch)
                    scaler.scale(share * runtime.dp_size).backward()  # the processes' gradients are averaged
                shares.append(share.detach())
            scaler.unscale_(optimizer)
            grad_norm = clip_gradients(model, config.grad_clip)
            done = step + 1
            ended = done == config.max_iters
            logged = done % config.log_interval == 0 or ended or step == first

            # What is decided now, all processes decide alike: they know the same.
            status = watchdog.gather_status(torch.stack(shares).tolist(), time.perf_counter() - started,
                                   (runtime.memory() or {}).get("peak") or 0 if logged else 0, saves.ended, grad_norm)
            grad_norm = next((norm for norm in status.grad_norms if not math.isfinite(norm)), grad_norm)
            if not math.isfinite(grad_norm + status.loss) and not (scaler.is_enabled() and scaler.get_scale() > 1):
                if outcome := saves.wait():  # what is being saved is good still
                    note_save(*outcome)
                raise NonFiniteError(
                    f"step {done}: loss {status.loss:g}, gradient norm {grad_norm:g} at learning rate {rate:.3g}"
                    f"{where_not_finite(status.nonfinite_micro_steps, objective, runtime, step)}: stopped before the update (try a "
                    "lower learning_rate, a longer warmup_iters, grad_clip=1, or dtype=float32; the last good "
                    f"checkpoint: {'none' if saved is None else f'step {saved}'})")
            if config.gradient_log_interval and done % config.gradient_log_interval == 0:
                log.gradients(done, gradient_statistics(model))
            excess = spikes(status.loss)
            if excess is not None:
                log.spike(done, status.loss, excess, skipped=config.skip_spikes)
                state["skipped"] += config.skip_spikes
            if excess is None or not config.skip_spikes:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            state["step"], state["tokens"] = done, state["tokens"] + objective.tokens_per_step
            took = time.perf_counter() - started
            if not profile.end(done) or not since_log:  # one that was watched is slower
                busy, since_log = busy + took, since_log + 1

            # -------------------------------------------------------- report, evaluate, save
            if logged:
                step_time = busy / since_log if since_log else took
                speed = objective.tokens_per_step / step_time
                achieved = flops["train"] * speed
                if peak and achieved > peak * runtime.world_size:
                    log.warning(f"MFU of {achieved / peak / runtime.world_size:.0%}: the peak, {peak / 1e12:.4g} TFLOP/s "
                             f"({peak_source}), cannot be right; no MFU from here on (set one with --mfu_peak=TFLOPS)")
                    peak = None
                log.step(step=done, tokens=state["tokens"], loss=status.loss, lr=rate, grad_norm=grad_norm,
                         step_time=step_time, tokens_per_sec=speed, tflops=achieved / 1e12,
                         mfu=achieved / (peak * runtime.world_size) if peak else None, memory=runtime.memory(),
                         tokens_per_source=objective.consumed(done),
                         ranks={"step_time": status.step_times, "memory_peak": status.memory_peaks,
                                "communication": profile.communication()})
                busy, since_log = 0.0, 0
            if status.save_finished:  # a save in the background has ended, everywhere
                note_save(*saves.poll())
            is_best = evaluate() if done % config.eval_interval == 0 or ended else False
            interval = config.eval_interval if config.checkpoint_interval is None else config.checkpoint_interval
            if ended or status.stop_reason or (interval and (done % interval == 0 or is_best)):
                save(last=bool(ended or status.stop_reason))
            if status.stop_reason and not ended:
                log.interrupted(f"{status.stop_reason} at step {done}")
                log.info(f"interrupted by {status.stop_reason} at step {done}, saved; go on with --resume=must "
                        f"--run_name={run_dir.name}")
                return
        log.info(f"done: {run_dir}")


def where_not_finite(bad, objective, runtime, step):
    """Of a step's data, those on which the loss is not finite, or from where on the gradient is not.

    bad: by rank, the micro-batch or -1. A gradient that the ranks have averaged is bad on all.
    """
    places = [f"on rank {rank}: {objective.offsets(step, micro_step, rank // runtime.tp_size)}"
              for rank, micro_step in enumerate(bad) if micro_step >= 0]
    return " " + "; ".join(places[:4]) if places else ""


def main(config):
    runtime = None
    try:
        if config.dry_run:
            sys.exit(dry_run(config, build_model))
        runtime = launch.init(config)
        if name := find_restarted_run(config, runtime):
            config = load_config(sys.argv[1:], restarted=name)
        launch.check_same_config(config, runtime)
        with Watchdog(runtime, config) as watchdog:
            train(config, runtime, watchdog)
    except ConfigError as error:
        raise with_location(error, config.explicit) from None
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, a CPU's has no name
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            told = UserError(out_of_memory_hint(config.batch_size, config.gradient_accumulation_steps, config.data_processes,
                                           config.activation_checkpointing, config.use_zero1, config.use_fsdp))
            told.on_all_ranks = False  # one process may be the first to run out
            raise told from None
        raise
    launch.shutdown()


if __name__ == "__main__":
    with exit_on_user_error(launch.exit_process):
        main(config)
