"""What a mixture reads over a run: tokens, epochs and repeats of each source, as a table and a plot.

    python -m tools.analyze_mixture config/mix_code.py [--max_iters=20000 …] [--plot mixture.png]

Takes the config files and flags of train.py and opens the datasets, but trains nothing.
"""

import os
import sys
from pathlib import Path
from typing import TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
import numpy as np

from blockgpt.console import ArgumentParser
from blockgpt.data.dataset import open_dataset
from blockgpt.data.loader import TrainBatches
from blockgpt.data.mixture import Mixture, describe_phases
from blockgpt.data.packing import PackedBatches
from blockgpt.errors import UserError, error_text, exit_on_user_error, require_package
from configurator import Config, load_config

BAR_WIDTH = 40  # characters


class SourceStats(TypedDict):
    """What a run reads from one source."""

    available: int  # tokens of the train split
    tokens: int  # that the run reads
    epochs: float
    repeated: int  # tokens read after the first epoch


def analyze(config: Config) -> tuple[Mixture, dict[str, SourceStats]]:
    """The mixture of a run and, for each source, what the run reads from it."""
    sequences_per_step = config.batch_size * config.gradient_accumulation_steps
    block_size, mixture = config.model.block_size, Mixture(config.phases(), sequences_per_step)
    consumed, stats = mixture.consumed(config.max_iters * sequences_per_step), {}
    vocab_size = config.model.vocab_size if "vocab_size" in config.explicit else None
    batches = PackedBatches if config.packing == "documents" else TrainBatches
    for name in mixture.names:
        dataset = open_dataset(name, config.data_dir, config.tokenizer, vocab_size)
        n_sequences = batches(dataset, config.seed, block_size, 1).n_sequences
        stats[name] = SourceStats(available=dataset.tokens("train"), tokens=consumed[name] * block_size,
                                  epochs=consumed[name] / n_sequences,
                                  repeated=max(0, consumed[name] - n_sequences) * block_size)
    return mixture, stats


def table(config: Config, mixture: Mixture, stats: dict[str, SourceStats]) -> list[str]:
    """The lines of the table: a row for each source, then the fractions of each phase."""
    total = sum(row["tokens"] for row in stats.values())
    width = max(6, *map(len, stats))
    lines = [f"{'source':<{width}}  {'tokens':>17}  {'fraction':>8}  {'of tokens':>17}  {'epochs':>8}  "
             f"{'repeated':>17}"]
    for name, row in stats.items():
        lines.append(f"{name:<{width}}  {row['tokens']:>17,}  {row['tokens'] / total:>8.2%}  {row['available']:>17,}  "
                     f"{row['epochs']:>8.3g}  {row['repeated']:>17,}")
    lines.append(f"{'all':<{width}}  {total:>17,}")
    first_steps = [step for step, _ in config.phases()]
    ends = [*first_steps[1:], config.max_iters]
    for first, last, fractions in zip(first_steps, ends, mixture.fractions, strict=True):
        if first < config.max_iters:
            lines += ["", f"steps {first:,} to {min(last, config.max_iters):,}"]
        else:
            lines += ["", f"from step {first:,} on; the run ends after {config.max_iters:,} steps"]
        lines += [f"{name:<{width}}  {'█' * round(BAR_WIDTH * fraction):<{BAR_WIDTH}} {float(fraction):.2%}"
                  for name, fraction in fractions.items()]
    return lines


def plot(path: str, config: Config, mixture: Mixture) -> None:
    """Write an image file: the tokens read from each source against the step."""
    figure = require_package("matplotlib.figure").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    per_step = config.batch_size * config.gradient_accumulation_steps
    steps = np.unique(np.linspace(0, config.max_iters, 200).astype(int))
    consumed = [mixture.consumed(int(step) * per_step) for step in steps]
    tokens = [[counts[name] * config.model.block_size for counts in consumed] for name in mixture.names]
    axes.stackplot(steps, tokens, labels=mixture.names)
    axes.set(xlabel="step", ylabel="tokens", title=describe_phases(config.phases()))
    axes.legend(loc="upper left")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot: {path}: cannot be written: {error_text(error)}") from None


def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__, usage="%(prog)s [FILE.py …] [--key=value …] [--plot IMAGE]",
                            epilog="The other arguments are those of train.py (python train.py --help).")
    parser.add_argument("--plot", type=os.path.expanduser, metavar="IMAGE",
                        help="write the plot to this file, such as mixture.png")
    args, config_args = parser.parse_known_args(argv)
    if args.plot == "":
        raise UserError("--plot: needs a file, such as mixture.png")
    config = load_config(config_args)
    mixture, stats = analyze(config)
    print(f"{describe_phases(config.phases())}; {config.max_iters:,} steps, packing={config.packing}\n")
    print("\n".join(table(config, mixture, stats)))
    if args.plot:
        plot(args.plot, config, mixture)
        print(f"\nplot: {args.plot}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
