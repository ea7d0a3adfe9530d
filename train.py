"""Train one model: `python train.py [config/*.py ...] [--key=value ...]`; `--help` lists every key.

Several processes: `torchrun --standalone --nproc_per_node=8 train.py ...`. Exit codes: 0 done or cleanly
interrupted, 1 a --dry_run that does not fit, 2 a mistake in config or data, 3 no usable checkpoint, 4 the final save
failed, 5 not finite.
"""

import sys

from configurator import load_config, located
from errors import told_in_one_line

if __name__ == "__main__":
    with told_in_one_line():
        config = load_config(sys.argv[1:])  # before torch loads: a slip of the finger is told at once
        import torch  # its seconds, too, can end with Ctrl-C

import math
import time
from pathlib import Path

import torch

import training_checkpoint as checkpoint
import training_parallel as parallel
from errors import CheckpointError, ConfigError, NonFiniteError, SaveError, UserError
from model_builder import build_model
from model_flops import flops_per_token, peak_flops
from training_logger import RunLog, environment, print_header, run_directory
from training_objectives import LanguageModeling
from training_optimizers import build_optimizer, gradient_statistics, learning_rate, set_learning_rate
from training_preflight import preflight


def train(config, machine):
    # ---------------------------------------------------------------- what is trained, on what
    run_dir = run_directory(config)
    objective = LanguageModeling(config, machine)
    config = config.for_vocabulary(objective.vocab_size)
    model = build_model(config.model, config.seed, machine.device)
    optimizer = build_optimizer(model, config, machine.device)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)

    state = {"step": 0, "tokens": 0, "best": None, "scaler": None, "data": objective.fingerprint,
             "description": {"model": model.built().flat(), "tokenizer": objective.tokenizer}}
    resumed, path, changed = config.init_from == "resume", None, dict(config.changed)
    if resumed:  # path None: it ended before its first save
        path = checkpoint.find_newest(run_dir, machine, or_none=config.resume == "auto")
    if path:
        state = checkpoint.load(path, model, optimizer, machine)
        if state["data"] != objective.fingerprint:
            if not config.resume_force:
                raise CheckpointError(f"{path}: was made on other data than its dataset holds now")
            changed["data"] = [state["data"], objective.fingerprint]
        if state["world_size"] != machine.world_size:
            changed["world_size"] = [state["world_size"], machine.world_size]
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    wrapped = parallel.wrap(model, machine)

    # ---------------------------------------------------------------- what the log says of it
    flops = flops_per_token(model, config.model.block_size)
    peak, peak_source = peak_flops(machine.device, machine.dtype, machine.tf32, config.mfu_peak)
    header = {
        "arch_name": model.built().arch_name(), "config": config.flat(), "model": model.built().flat(),
        "parameters": model.parameter_counts(), "flops_per_token": flops, "data": objective.description(),
        "attention_kernels": model.attention_kernels(machine.dtype),
        "hardware": {"device": str(machine.device), "name": machine.name(), "world_size": machine.world_size,
                     "dtype": str(machine.dtype).removeprefix("torch."), "tf32": machine.tf32,
                     "compile": machine.compile, "peak_flops": peak, "peak_source": peak_source},
        **environment(),
    }
    log = RunLog(run_dir, header, config, resumed, quiet=not machine.is_main)
    run_dir = Path(machine.exchange(str(log.dir))[0])  # the first rank's: another may have begun in another second
    checkpoints = checkpoint.Checkpoints(run_dir, machine, config.keep_checkpoints, config.checkpoint_async)
    if machine.is_main:
        checkpoint.clean(run_dir)

    def evaluate():
        """Validation metrics into the log; whether they are the best so far."""
        metrics = objective.evaluate(wrapped)
        log.evaluation(state["step"], state["tokens"], **metrics)
        best = math.isfinite(metrics["val_loss"]) and (
            state["best"] is None or metrics["val_loss"] < state["best"]["val_loss"])
        if best:
            state["best"] = {"step": state["step"], **metrics}
            log.best(state["best"])
        return best

    def save(last=False, export=False):
        """Write a checkpoint of `state`; whether it stands. One that fails is a warning, the last one exit code 4."""
        try:
            stands = checkpoints.save(model, optimizer, {
                **state, "scaler": scaler.state_dict() or None, "config": config.flat(), "seed": config.seed,
                "sequences": state["step"] * objective.sequences_per_step}, wait=last)
            if export:
                checkpoint.export(run_dir, stands, {**state["description"], "step": state["step"]}, machine)
        except OSError as error:
            problem = f"the checkpoint of step {state['step']} failed: {error}"
            if last:
                raise SaveError(f"{run_dir}: {problem} (the last good one stands)") from None
            log.warn(f"{problem}; training goes on")
            return False
        return stands is not None

    with log, parallel.Interruption() as interruption:
        if machine.is_main:
            print_header(header, config, model, flops, run_dir)
        if resumed:
            log.say(f"resumed from {path} at step {state['step']}" if path else f"{run_dir}: no checkpoint, from 0")
            if not config.eval_only:
                log.resumed_at(state["step"], changed, (*config.forced, *({"data"} & changed.keys())),
                               machine.world_size)
        if config.eval_only:
            evaluate()
            return

        # ------------------------------------------------------------ the loop
        first, saved = state["step"], state["step"] if path else None
        if first >= config.max_iters:
            log.say(f"nothing left to do at step {first} of max_iters={config.max_iters} (raise it to go on)")
            save(last=True, export=True)  # the export may be what failed, or was deleted
        busy, since_log = 0.0, 0
        for step in range(first, config.max_iters):
            started = time.perf_counter()
            rate = learning_rate(step, config)
            set_learning_rate(optimizer, rate)
            parallel.seed_step(config.seed, step, machine.rank)

            # Each micro-batch gives its share of the step's loss: the sum over its tokens / the step's tokens.
            loss = torch.zeros((), device=machine.device)
            for micro_step, batch in enumerate(objective.micro_batches(step)):
                last = micro_step == objective.micro_steps - 1
                with parallel.synchronise_gradients(wrapped, now=last):
                    with machine.autocast():
                        share = objective.loss(wrapped, batch)
                    scaler.scale(share * machine.world_size).backward()  # the processes' gradients are averaged
                loss += share.detach()

            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf).item()
            if not math.isfinite(grad_norm) and not (scaler.is_enabled() and scaler.get_scale() > 1):
                raise NonFiniteError(
                    f"step {step + 1}: loss {loss.item():g}, gradient norm {grad_norm:g} at learning rate {rate:.3g}: "
                    f"stopped before the update (try a lower learning_rate, a longer warmup_iters, grad_clip=1, or "
                    f"dtype=float32; the last good checkpoint: {'none' if saved is None else f'step {saved}'})")
            done = step + 1
            if config.gradient_log_interval and done % config.gradient_log_interval == 0:
                log.gradients(done, gradient_statistics(model))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            state["step"], state["tokens"] = done, state["tokens"] + objective.tokens_per_step
            ended = done == config.max_iters
            logged = done % config.log_interval == 0 or ended or step == first
            if logged:
                whole_loss = machine.sum(loss.item())[0]  # waits for the device, so the time is the step's
            busy, since_log = busy + time.perf_counter() - started, since_log + 1

            # -------------------------------------------------------- report, evaluate, save
            if logged:
                step_time = busy / since_log
                speed = objective.tokens_per_step / step_time
                achieved = flops["train"] * speed
                if peak and achieved > peak * machine.world_size:
                    log.warn(f"MFU of {achieved / peak / machine.world_size:.0%}: the peak, {peak / 1e12:.4g} TFLOP/s "
                             f"({peak_source}), cannot be right; no MFU from here on (set one with --mfu_peak=TFLOPS)")
                    peak = None
                log.step(step=done, tokens=state["tokens"], loss=whole_loss, lr=rate, grad_norm=grad_norm,
                         step_time=step_time, tokens_per_sec=speed, tflops=achieved / 1e12,
                         mfu=achieved / (peak * machine.world_size) if peak else None, memory=machine.memory(),
                         tokens_per_source=objective.served(done))
                busy, since_log = 0.0, 0
            stop = interruption.asked(machine, now=logged)
            is_best = evaluate() if done % config.eval_interval == 0 or ended else False
            interval = config.eval_interval if config.checkpoint_interval is None else config.checkpoint_interval
            if ended or stop or (interval and (done % interval == 0 or is_best)):
                saved = done if save(last=bool(ended or stop), export=ended) else saved
            if outcome := checkpoints.poll():  # of a save in the background, which every rank learns by itself
                if outcome[1] is None:
                    saved = outcome[0]
                else:
                    log.warn(f"the checkpoint of step {outcome[0]} failed: {outcome[1]}; training goes on")
            if stop and not ended:
                log.interrupted(f"{stop} at step {done}")
                log.say(f"interrupted by {stop} at step {done}, saved; go on with --init_from=resume "
                        f"--run_name={run_dir.name}")
                return
        log.say(f"done: {run_dir}")


def main(config):
    machine = None
    try:
        if config.dry_run:
            sys.exit(preflight(config))
        machine = parallel.init(config)
        train(config, machine)
    except ConfigError as error:
        raise located(error, config.explicit) from None
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, a CPU's has no name
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            raise UserError("out of memory: halve batch_size and double gradient_accumulation_steps, or take a smaller "
                            "block_size, n_embd or n_layer") from None
        raise
    finally:
        if machine:
            parallel.shut_down(machine)


if __name__ == "__main__":
    with told_in_one_line():
        main(config)
