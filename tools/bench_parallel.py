"""Do all modes compute the same, and what does each process hold? Two tables, by gloo processes on this machine's CPU.

    python -m tools.bench_parallel agreement            every mode × processes × preset: the largest difference of a
                                                        step's loss from a single process's, over 50 steps in float32
    python -m tools.bench_parallel bytes                what parameters, gradients and optimizer state take on a rank,
                                                        counted from their storages, beside the formula

The runs are train.py's own, on the embedded corpus. --presets and --modes choose some.
"""

import gc
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from blockgpt.console import ArgumentParser
from blockgpt.errors import UserError, exit_on_user_error
from configurator import load_config
from model_config import PRESETS

ROOT = Path(__file__).resolve().parent.parent
MODES = {  # name: (processes, flags)
    "single": (1, []),
    "DDP": (2, []),
    "ZeRO-1": (2, ["--use_zero1=True"]),
    "FSDP": (2, ["--use_fsdp=True"]),
    "TP": (2, ["--tensor_parallel=2"]),
    "DDP 4": (4, []),
    "ZeRO-1 4": (4, ["--use_zero1=True"]),
    "FSDP 4": (4, ["--use_fsdp=True"]),
    "FSDP, 2 copies": (4, ["--use_fsdp=True", "--dp_replicate=2"]),
    "FSDP × TP": (4, ["--use_fsdp=True", "--tensor_parallel=2"]),
}
SIZE = ["--n_layer=2", "--n_head=4", "--n_embd=32", "--block_size=32", "--batch_size=2", "--eval_tokens=512",
        "--device=cpu", "--dtype=float32", "--compile=False", "--mfu_peak=1", "--log_interval=1",
        "--learning_rate=1e-3", "--warmup_iters=10", "--checkpoint_interval=0"]


def runs_of(presets, steps, folder, mode):
    """[(name, argv)]: a run of each preset × micro-batches a step × weights tied and not."""
    return [(f"{preset} {accumulation} {tied}",
             [f"config/arch_{preset}.py", *SIZE, *MODES[mode][1], f"--gradient_accumulation_steps={accumulation}",
              f"--weight_tying={tied}", f"--max_iters={steps}", f"--eval_interval={steps}", f"--out_dir={folder}",
              f"--run_name={preset}-{accumulation}-{tied}"])
            for preset in presets for accumulation in (4, 8) for tied in (True, False)]


def launch(mode, work, folder):
    """Have the processes of `mode` do `work` [argv, …], one run after the other; their output if they fail."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "work.json").write_text(json.dumps(work))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={MODES[mode][0]}",
               "-m", "tools.bench_parallel", "--worker", str(folder / "work.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"{mode}: the runs failed:\n{done.stderr[-3000:]}")


def worker(path):
    """In one of the processes: each run of the list through train.py's own `train`, in one process group."""
    from blockgpt.training import launch
    from blockgpt.training.faults import Watchdog

    train = runpy.run_path(str(ROOT / "train.py"))["train"]
    runtime = None
    for argv in json.loads(Path(path).read_text()):
        config = load_config(argv)
        runtime = runtime or launch.init(config)
        with Watchdog(runtime, config) as watchdog:
            train(config, runtime, watchdog)
        gc.collect()  # models that refer to themselves
    launch.shutdown()


def curve(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(r["loss"], r["grad_norm"]) for r in lines if r["kind"] == "step"]


def agreement(modes, presets, steps):
    """Print a row for each mode and preset; returns the largest relative difference of all."""
    print(f"| mode | processes | preset | largest relative loss difference in {steps} steps | bitwise equal to DDP |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as parent:
        curves, worst = {}, 0.0
        for mode in dict.fromkeys(("single", *modes)):
            folder = Path(parent, mode.replace(" ", "-"))
            work = runs_of(presets, steps, folder, mode)
            launch(mode, [argv for _, argv in work], folder)
            for name, _ in work:
                curves[mode, name] = curve(folder / name.replace(" ", "-"))
            twin = "DDP 4" if MODES[mode][0] == 4 else "DDP"
            for preset in presets if mode != "single" else ():
                names = [name for name, _ in work if name.split()[0] == preset]
                difference = max(abs(a - b) / abs(b) for name in names for (a, _), (b, _) in
                                 zip(curves[mode, name], curves["single", name], strict=True))
                equal = ("" if (twin, names[0]) not in curves or mode == twin else
                         "yes" if all(curves[mode, n] == curves[twin, n] for n in names) else "no")
                worst = max(worst, difference)
                print(f"| {mode.removesuffix(' 4')} | {MODES[mode][0]} | {preset} | {difference:.1e} | {equal} |",
                      flush=True)
            shutil.rmtree(folder)
    print(f"\nlargest of all: {worst:.2e}")
    return worst


# ---------------------------------------------------------------- what a process holds


def held(argv):
    """In one of the processes: a step of the run, then [bytes of parameters, gradients, optimizer state] by rank."""
    import torch

    from blockgpt.training import launch, parallel
    from blockgpt.training.optimizers import build_optimizer
    from model_builder import build_model

    config = load_config(argv)
    runtime = launch.init(config)
    model = build_model(config.for_vocabulary(256).model, config.seed, runtime.device,
                        lambda model: parallel.parallelize(model, config, runtime))
    optimizer = build_optimizer(model, config, runtime.device)
    wrapped = parallel.wrap(model, config, runtime)
    x = torch.zeros(1, config.model.block_size, dtype=torch.int64)
    wrapped(x, x)[1].backward()
    optimizer.step()

    def size(tensors):
        own = [(t.to_local() if hasattr(t, "to_local") else t).untyped_storage() for t in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in own}.values())

    moments = getattr(optimizer, "optim", optimizer).state
    mine = [size(model.parameters()), size(p.grad for p in model.parameters()),
            size(t for state in moments.values() for t in state.values() if t.dim())]
    rows = runtime.all_gather_object(mine)
    if runtime.is_rank_zero:
        count = sum(p.numel() for p in model.parameters())
        print("HELD " + json.dumps({"parameters": count, "rows": rows}), flush=True)
    del wrapped, optimizer, model, moments
    launch.shutdown()


FORMULAS = {  # bytes per parameter of parameters, gradients, optimizer state on one of n processes
    "DDP": lambda n: (4, 4, 8), "ZeRO-1": lambda n: (4, 4, 8 / n), "FSDP": lambda n: (4 / n, 4 / n, 8 / n)}


def held_bytes(presets):
    print("| mode | processes | preset | parameters, gradients, optimizer: bytes per parameter, by rank | formula |")
    print("|---|---|---|---|---|")
    for mode, formula in FORMULAS.items():
        for n in (2, 3, 4):
            for preset in presets:
                argv = [f"config/arch_{preset}.py", *SIZE, "--n_layer=4", "--n_embd=128", *MODES[mode][1],
                        f"--gradient_accumulation_steps={n}"]
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "-m",
                           "tools.bench_parallel", "--held", json.dumps(argv)]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                                      env={**os.environ, "OMP_NUM_THREADS": "1"})
                line = next((x for x in done.stdout.splitlines() if x.startswith("HELD ")), None)
                if done.returncode or line is None:
                    raise UserError(f"{mode} on {n}: {done.stderr[-2000:]}")
                told = json.loads(line.removeprefix("HELD "))
                ranks = "; ".join(" ".join(f"{b / told['parameters']:.2f}" for b in row) for row in told["rows"])
                print(f"| {mode} | {n} | {preset} | {ranks} | {' '.join(f'{b:.2f}' for b in formula(n))} |", flush=True)


def main(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="?", choices=("agreement", "bytes"), default="agreement")
    parser.add_argument("--presets", nargs="+", choices=sorted(PRESETS), default=sorted(set(PRESETS) - {"custom"}))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--worker", help="(of this tool's own processes)")
    parser.add_argument("--held", help="(of this tool's own processes)")
    options = parser.parse_args(argv)
    if options.worker:
        worker(options.worker)
    elif options.held:
        held(json.loads(options.held))
    elif options.what == "bytes":
        held_bytes(options.presets)
    elif agreement(options.modes, options.presets, options.steps) > 1e-4:
        sys.exit(1)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
