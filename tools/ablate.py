"""Ablations: declare what is compared, run it, judge it. docs/EXPERIMENTS.md.

    python -m tools.ablate config/arch_gpt2.py config/size_demo.py --vary norm_position=post,pre --seeds 3
    python -m tools.ablate --plan studies/everybody_asks.py --dry_run
    python -m tools.ablate --plan studies/everybody_asks.py            # the same command continues what was stopped

Config files and --key=value flags are those of train.py, and describe the base. The plan is shown first. Each run is a
process of train.py with its own directory in <out_dir>/<study>/. Any number of these commands can work at one study.
Exit codes: 0 all runs have finished, 1 some have failed or diverged, 2 a mistake, 130 interrupted.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.console import ArgumentParser, check_ranges, echo
from blockgpt.data.dataset import ensure_prepared, open_dataset
from blockgpt.errors import UserError, error_text, exit_on_user_error
from blockgpt.experiments.report.page import check_report, save_report
from blockgpt.experiments.report.plots import check_plot, save_plot
from blockgpt.experiments.report.studies import report_of_plan
from blockgpt.experiments.sweeps.control import write_shuffled
from blockgpt.experiments.sweeps.identity import Program, code_version, source_stamp
from blockgpt.experiments.sweeps.launchers import LAUNCHERS, Launcher, LocalLauncher, RayLauncher, SlurmLauncher
from blockgpt.experiments.sweeps.plan import (
    EQUAL,
    SHUFFLED_SUFFIX,
    Plan,
    PlannedRun,
    Planner,
    base_values,
    check_key,
    grid,
    parse_vary,
    read_plan,
    with_control,
    write_plan,
)
from blockgpt.experiments.sweeps.progress import RunTable, label
from blockgpt.experiments.sweeps.results import control_lines, detectable_text, pair_differences, study_of_plan
from blockgpt.experiments.sweeps.runner import (
    RunOutcome,
    SweepRunner,
    allow_retries,
    incomplete_blocks,
    read_looks,
    read_outcome,
    record_look,
)
from blockgpt.experiments.sweeps.selection import expense, parse_budget
from blockgpt.experiments.sweeps.sweep import Sweep, duration
from blockgpt.experiments.verdict_text import render_judgement
from blockgpt.experiments.verdicts import judge
from blockgpt.startup import n_cores
from compare_architectures import load_run
from configurator import KEYS, ROOT, TYPES, load_config


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m tools.ablate", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter,
                            usage="%(prog)s [config/*.py ...] [--key=value ...] [options]")
    declare = parser.add_argument_group("declare")
    declare.add_argument("--plan", type=os.path.expanduser, metavar="FILE",
                         help="a Python file with fields of the study")
    declare.add_argument("--study", metavar="NAME", help="name of the study (default: of the plan file, else of the "
                         "config files)")
    declare.add_argument("--question", help="what the study asks, in words")
    declare.add_argument("--vary", action="append", default=[], metavar="KEY=A,B", help="values of a key; repeatable: "
                         "every combination is a variant")
    declare.add_argument("--one_at_a_time", action="store_true", help="vary one key at a time against the base instead")
    declare.add_argument("--baseline", metavar="NAME", help="the variant that the others are compared with (default: "
                         "the one that is the base, else the first)")
    declare.add_argument("--seeds", metavar="N|A,B", help="how many seeds, or which (default: 3)")
    declare.add_argument("--horizons", metavar="A,B", help="fractions of max_iters at which the baseline is trained, "
                         "too, for its loss law")
    declare.add_argument("--margin", type=float, help="difference below which two variants are equal (default: the "
                         "spread of the baseline)")
    declare.add_argument("--level", type=float, help="of the whole family of comparisons (default: 0.05)")
    declare.add_argument("--spread", type=float, help="expected standard deviation of a pair's difference, for the "
                         "plan (default: that of the finished runs)")
    declare.add_argument("--equal", choices=EQUAL, help="what all variants spend alike; params: d_ff or n_embd is "
                         "solved for (default: tokens)")
    declare.add_argument("--lr_sweep", metavar="A,B", help="learning rates that every variant tries, on other seeds "
                         "than those that are judged")
    declare.add_argument("--control", action="store_true", default=None, help="add a renamed copy of the baseline, "
                         "which must tie, and a run on shuffled tokens, which must lose")
    run = parser.add_argument_group("run")
    run.add_argument("--dry_run", action="store_true", help="show the plan and stop")
    run.add_argument("--no_probe", action="store_true", help="do not train ten steps of each variant to learn its "
                     "speed")
    run.add_argument("--budget", metavar="2h|1e15", help="time of this computer, or FLOPs; more is refused")
    run.add_argument("--halving", action="store_true", help="successive halving: short runs on another seed drop half "
                     "of the variants at a time, until the budget, or --judge, is met")
    run.add_argument("--judge", type=int, metavar="N", help="variants that --halving leaves beside the baseline")
    run.add_argument("--launcher", choices=LAUNCHERS, default="local", help="where runs are started (default: local)")
    run.add_argument("--slurm", default="", metavar="NAME=VALUE,…", help="of submitit, such as "
                     "slurm_partition=gpu,timeout_min=600,gpus_per_node=1; cluster=local tries it without Slurm")
    run.add_argument("--workers", type=int, help="runs at once (default: one for each GPU, or for --threads cores)")
    run.add_argument("--threads", type=int, help="of a run on a CPU (default: OMP_NUM_THREADS, else 1)")
    run.add_argument("--retry_failed", action="store_true", help="try runs again that have failed, diverged or been "
                     "refused")
    run.add_argument("--plot", type=os.path.expanduser, metavar="FILE",
                     help="when all runs have ended, draw the learning curves to this .png, "
                     ".svg or .pdf")
    run.add_argument("--report", type=os.path.expanduser, metavar="FILE",
                     help="when all runs have ended, write verdicts, curves, configurations and commands to this "
                     ".html, one page that needs no network")
    run.add_argument("--out_dir", type=os.path.expanduser, default="ablations", metavar="DIR",
                     help="folder of the studies (default: ablations)")
    return parser


# ---- the plan


def numbers_of(name: str, text: str | None) -> tuple[float, ...]:
    """'1e-3,3e-3' as numbers; none for None."""
    try:
        return tuple(float(value) for value in text.split(",") if value) if text else ()
    except ValueError:
        raise UserError(f"--{name}: {text!r} is not a list of numbers, as in 0.5,1,2") from None


def seeds_of(text: str) -> tuple[int, ...]:
    """'3' → 1, 2, 3; '4,7' → 4, 7."""
    try:
        values = [int(value) for value in text.split(",") if value]
    except ValueError:
        values = []
    if not values or ("," not in text and not 1 <= values[0] <= 10_000):
        raise UserError(f"--seeds: {text!r} is neither a number of seeds nor a list of them, as in 3 or 4,5,6")
    return tuple(values) if "," in text else tuple(range(1, values[0] + 1))


def declared_plan(args: argparse.Namespace, words: Sequence[str], program: Program) -> Plan:
    """The study that the command line declares; its flags override the plan file, and its keys the base."""
    values = read_plan(args.plan, ROOT) if args.plan else {}
    base, overrides = (tuple(values.pop("base", ())), tuple(words)) if args.plan else (tuple(words), ())
    vary, one_at_a_time = values.pop("vary", {}), values.pop("one_at_a_time", False)
    for name in vary:
        check_key(str(args.plan), name, program)
    if args.vary:
        if "variants" in values or vary:
            raise UserError(f"--vary: {args.plan} declares the variants (drop one of them)")
        vary = parse_vary(args.vary, program)
    if vary and "variants" in values:
        raise UserError(f"{args.plan}: vary: is incompatible with variants (drop one of them)")
    own = base_values([*base, *overrides], program)
    if vary:
        values["variants"], baseline = grid(vary, own, args.one_at_a_time or one_at_a_time)
        values.setdefault("baseline", baseline)
    if "variants" not in values:
        if not (args.control or values.get("control")):
            raise UserError("nothing varies: --vary key=value,value (repeatable), or --plan studies/NAME.py")
        values["variants"] = {"baseline": {}}
    for keys in values["variants"].values():
        for name in keys:
            check_key(str(args.plan), name, program)
    values.setdefault("baseline", next(iter(values["variants"])))
    given = {"question": args.question, "margin": args.margin, "level": args.level, "spread": args.spread,
             "equal": args.equal, "control": args.control, "baseline": args.baseline,
             "seeds": seeds_of(args.seeds) if args.seeds else None,
             "horizons": numbers_of("horizons", args.horizons) or None,
             "lr_sweep": numbers_of("lr_sweep", args.lr_sweep) or None}
    values |= {name: value for name, value in given.items() if value is not None}
    files = [Path(args.plan)] if args.plan else [Path(word) for word in words if word.endswith(".py")]
    name = args.study or values.pop("name", None) or "+".join(path.stem for path in files) or "ablation"
    values.pop("name", None)
    return with_control(Plan(name=name, base=base, overrides=overrides, **values))


def prepare_data(planner: Planner) -> None:
    """Write the datasets of the study that are written on demand: the embedded corpus, the control's shuffled one."""
    plan = planner.plan
    for size in plan.sizes:
        base = planner.config(plan.baseline, size)
        names = {name for _, weights in base.phases() for name in weights}
        for name in names:
            ensure_prepared(name, base.data_dir)
        if plan.control:
            if not isinstance(base.dataset, str) or base.dataset_schedule is not None:
                raise UserError("--control: shuffles one dataset, and this base has a mixture (--dataset=NAME)")
            assert planner.control_data is not None
            dataset = open_dataset(base.dataset, base.data_dir, base.tokenizer, base.model.vocab_size)
            write_shuffled(dataset, planner.control_data / f"{base.dataset}{SHUFFLED_SUFFIX}")


# ---- where runs are started


def slurm_parameters(text: str) -> dict[str, Any]:
    """'slurm_partition=gpu,timeout_min=60' as submitit's parameters."""
    parameters: dict[str, Any] = {}
    for word in filter(None, text.split(",")):
        name, separator, value = word.partition("=")
        if not separator:
            raise UserError(f"--slurm: {word!r} is not name=value")
        parameters[name] = int(value) if value.isdigit() else value
    return parameters


def choose_launcher(args: argparse.Namespace, folder: Path, gpus: Sequence[str], threads: int) -> Launcher:
    """The launcher that was asked for; `UserError` if its package is missing."""
    workers = args.workers or (len(gpus) if gpus else max(1, n_cores() // threads))
    if args.launcher == "slurm":
        return SlurmLauncher(workers, folder, slurm_parameters(args.slurm))
    if args.slurm:
        raise UserError("--slurm: needs --launcher=slurm")
    if args.launcher == "ray":
        return RayLauncher(workers, threads, int(bool(gpus)))
    return LocalLauncher(workers, gpus)


def visible_gpus(device_type: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES would name each GPU of this computer; none where runs are on the CPU."""
    if device_type != "cuda":
        return []
    import torch

    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return names or [str(i) for i in range(torch.cuda.device_count())]


# ---- what is printed


def plan_lines(sweep: Sweep, workers: int, threads: int, launcher: str) -> list[str]:
    """The plan: the costs of each variant, and of all runs."""
    plan, runs = sweep.plan, sweep.planned()
    outcomes = {run.id: read_outcome(sweep.folder / run.name) for run in runs}
    done = [run for run in runs if outcomes[run.id].state == "finished"]
    left = [run for run in runs if run not in done]
    purposes = {name: sum(run.purpose == name for run in runs) for name in ("judge", "horizon", "tune", "screen")}
    words = {"judge": "judged", "horizon": "of the baseline at other horizons", "tune": "of the learning rate sweep",
             "screen": "of successive halving"}
    counts = " + ".join(f"{count} {words[name]}" for name, count in purposes.items() if count)
    seconds, flops = (expense(left, sweep.costs, workers, unit) for unit in ("seconds", "flops"))
    names = len(plan.variants), len(plan.sizes), len(plan.seeds)
    rows = [
        ("study", f"{plan.name}: {plan.question or 'no question declared'}"),
        ("runs", f"{len(runs)} = {counts}; {names[0]} variants, {names[1]} sizes, {names[2]} seeds; {len(done)} of "
                 f"them have finished"),
        ("left", f"{sum(run.tokens for run in left):,} tokens, {flops or 0:.3g} FLOPs, "
                 + ("time unknown: not probed" if seconds is None else duration(seconds))
                 + f" with {workers} workers ({launcher}, {threads} threads each)"),
        ("detectable", detectable_text(plan, pair_differences(plan, runs, outcomes),
                                       len(read_looks(sweep.folder)) + 1)),
    ]
    lines = [f"{name:<12} {text}" for name, text in rows]
    if len(plan.sizes) == 1:
        lines.append("note: one size: effects change sign between neighbouring sizes (sizes = {…} in a plan file)")
    if len(plan.seeds) < 3:
        lines.append("note: fewer than three seeds have no verdicts, only numbers (--seeds 3)")
    return [*sweep.cost_lines(), "", *lines]


def own_and_rest(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(the flags of this command, the words of train.py)."""
    args, words = build_parser().parse_known_args(list(argv))
    check_ranges(args, {name: (getattr(args, name) is None or 1 <= getattr(args, name) <= 10_000, "from 1 to 10000")
                        for name in ("workers", "threads", "judge")})
    if args.plot is not None:
        check_plot(args.plot)
    if args.report is not None:
        check_report(args.report)
    if args.judge and not args.halving:
        raise UserError("--judge: needs --halving")
    if args.halving and not (args.judge or args.budget):
        raise UserError("--halving: needs --budget, or --judge=N, the number of variants that it leaves")
    return args, words


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args, words = own_and_rest(argv)
    budget = parse_budget(args.budget) if args.budget else None
    stamp = source_stamp(ROOT)
    program = Program(load_config, KEYS, TYPES, code_version(ROOT))
    plan = declared_plan(args, words, program)
    folder = Path(args.out_dir, plan.name)
    config = load_config([*plan.base, *next(iter(plan.sizes.values())), *plan.overrides])
    from blockgpt.experiments.sweeps.costs import parameter_count, run_cost  # imports torch
    from blockgpt.training.device import choose_device
    from model_builder import build_model

    is_local = args.launcher == "local"  # else this computer may have another device than those of the runs
    device_type = choose_device(config.device, 0).type if is_local else config.device.partition(":")[0]
    threads = args.threads or int(os.environ.get("OMP_NUM_THREADS") or 1)
    variables = {"OMP_NUM_THREADS": str(threads)} if device_type == "cpu" or not is_local else {}
    planner = Planner(plan, program, {"device": device_type, **variables}, (folder / "data").resolve())
    prepare_data(planner)
    planner.judged()  # a mistake in a variant, or two that are the same, before anything is measured
    launcher = choose_launcher(args, folder, visible_gpus(device_type), threads)
    runners: list[SweepRunner] = []

    def check(run: PlannedRun) -> None:
        if source_stamp(ROOT) != stamp and code_version(ROOT) != program.version:
            raise UserError("the code has changed since the study was planned (the same command plans it anew, and all "
                            "runs of the old code are repeated)")
        planner.check(run)

    def runner_for(run_folder: Path, table: RunTable) -> SweepRunner:
        try:
            run_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{run_folder}: cannot be written: {error_text(error)} (--out_dir=…)") from None
        if args.retry_failed:
            allow_retries(run_folder, table.runs)
        runners[:] = [SweepRunner(run_folder, launcher, ROOT, variables, table.report, check)]
        return runners[0]

    sweep = Sweep(planner, folder, runner_for, lambda c: run_cost(c, build_model, launcher.slots if is_local else None),
                  lambda c: parameter_count(c, build_model), echo)
    with stop_on_signals(runners) as received:
        measured = sweep.estimate(probe=not args.no_probe)
        if measured:
            sweep.check_memory()
            sweep.choose_rungs(budget, args.halving, args.judge, launcher.slots)
            for line in plan_lines(sweep, launcher.slots, threads, args.launcher):
                echo(line)
            if args.dry_run:
                return 0
            write_plan(folder, plan, sweep.planned())
            echo("")
            runs, outcomes = sweep.run_all(lambda runs: write_plan(folder, plan, runs))
    if sweep.stopped:
        signum = received[0] if received else signal.SIGINT
        states = [read_outcome(folder / run.name).state for run in sweep.planned()]
        echo(f"stopped by {signal.Signals(signum).name}: {states.count('finished')} of {len(states)} runs have "
             "finished, what ran has saved; the same command continues")
        return 128 + signum
    write_plan(folder, plan, [*sweep.stages, *runs])
    return print_results(sweep, runs, outcomes, args.plot, args.report, ["python", "-m", "tools.ablate", *argv])


@contextlib.contextmanager
def stop_on_signals(runners: Sequence[SweepRunner]) -> Iterator[list[int]]:
    """Inside the block a signal stops the runner that is at work, a second one at once; without one it interrupts.

    Yields:
        The numbers of the signals that have arrived.
    """
    received: list[int] = []

    def handle(signum: int, frame: object) -> None:
        received.append(signum)
        if not (runners and runners[0].active):
            raise KeyboardInterrupt
        runners[0].stop()

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {s: signal.signal(s, handle) for s in signals if signal.getsignal(s) is not signal.SIG_IGN}
    try:
        yield received
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def print_results(sweep: Sweep, runs: Sequence[PlannedRun], outcomes: Mapping[str, RunOutcome],
                  plot: str | None = None, report: str | None = None, command: Sequence[str] = ()) -> int:
    """Print what has failed, and the verdicts, and write `plot` and `report`; returns the exit code.

    Args:
        plot: file of the curves.
        report: file of the page.
        command: that gives these results, for the page.
    """
    states = [outcome.state for outcome in outcomes.values()]
    for run in runs:
        outcome = outcomes[run.id]
        if outcome.state != "finished":
            echo(f"{label(run)}: {outcome.state}: {outcome.reason} (see {sweep.folder / run.name}/sweep/console.txt)")
    diverged = states.count("diverged")
    if diverged:
        echo(f"divergence rate: {diverged} of {len(states)} runs ({diverged / len(states):.0%})")
    for line in incomplete_blocks(runs, outcomes):
        echo(f"warning: {line}")
    plan, passed, look = sweep.plan, True, None
    if "finished" in states:
        look = record_look(sweep.folder, runs, outcomes)
        study = study_of_plan(plan, runs, outcomes, sweep.folder, load_run)
        judgement = judge(study, plan.baseline, plan.margin, plan.level, look)
        echo("\n" + render_judgement(judgement))
        if plan.control:
            lines, passed = control_lines(judgement)
            for line in lines:
                echo(line)
        if plot is not None:
            save_plot(plot, study, plan.baseline)
    if report is not None:
        save_report(report, report_of_plan(plan, runs, outcomes, sweep.folder, load_run, look, command))
    return 0 if passed and all(state == "finished" for state in states) else 1


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
