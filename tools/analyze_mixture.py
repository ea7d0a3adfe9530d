"""What a mixture will serve over a run: tokens, epochs and repeats of each source, as a table and a plot.

    python -m tools.analyze_mixture config/mix_code.py [--max_iters=20000 …] [--plot mixture.png]

Takes what train.py takes, and opens the datasets, but trains nothing.
"""

import sys

import numpy as np

from blockgpt.data.dataset import open_dataset
from blockgpt.data.loader import TrainBatches
from blockgpt.data.mixture import Mixture, describe_phases
from blockgpt.data.packing import PackedBatches
from blockgpt.errors import UserError, exit_on_user_error, require_package
from configurator import load_config

WIDTH = 40  # characters of a bar


def analyse(config):
    """(Mixture, {source: {tokens there are, windows of an epoch, sequences served, epochs, repeated tokens}})."""
    sequences_per_step = config.batch_size * config.gradient_accumulation_steps
    block_size, mixture = config.model.block_size, Mixture(config.phases(), sequences_per_step)
    consumed, rows = mixture.consumed(config.max_iters * sequences_per_step), {}
    vocab_size = config.model.vocab_size if "vocab_size" in config.explicit else None
    batches = PackedBatches if config.packing == "documents" else TrainBatches
    for name in mixture.names:
        dataset = open_dataset(name, config.data_dir, config.tokenizer, vocab_size)
        windows = batches(dataset, config.seed, block_size, 1).n_sequences
        rows[name] = {"available": dataset.tokens("train"), "windows": windows, "sequences": consumed[name],
                      "tokens": consumed[name] * block_size, "epochs": consumed[name] / windows,
                      "repeated": max(0, consumed[name] - windows) * block_size}
    return mixture, rows


def table(config, mixture, rows):
    """The lines of the table: a row a source, then the shares of each phase."""
    total = sum(row["tokens"] for row in rows.values())
    width = max(6, *map(len, rows))
    lines = [f"{'source':<{width}}  {'tokens':>17}  {'share':>7}  {'of tokens':>17}  {'epochs':>8}  {'repeated':>17}"]
    for name, row in rows.items():
        lines.append(f"{name:<{width}}  {row['tokens']:>17,}  {row['tokens'] / total:>7.2%}  {row['available']:>17,}  "
                     f"{row['epochs']:>8.3g}  {row['repeated']:>17,}")
    lines.append(f"{'all':<{width}}  {total:>17,}")
    starts = [step for step, _ in config.phases()]
    for start, end, shares in zip(starts, [*starts[1:], config.max_iters], mixture.shares, strict=True):
        lines += ["", f"steps {start:,} to {min(end, config.max_iters):,}"] if start < config.max_iters else \
            ["", f"from step {start:,} on, which the run of {config.max_iters:,} steps does not reach"]
        lines += [f"{name:<{width}}  {'█' * round(WIDTH * share):<{WIDTH}} {float(share):.2%}"
                  for name, share in shares.items()]
    return lines


def plot(path, config, mixture):
    """Tokens served of each source against the step, into an image file."""
    figure = require_package("matplotlib.figure").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    per_step = config.batch_size * config.gradient_accumulation_steps
    steps = np.unique(np.linspace(0, config.max_iters, 200).astype(int))
    consumed = [mixture.consumed(int(step) * per_step) for step in steps]
    tokens = [[counts[name] * config.model.block_size for counts in consumed] for name in mixture.names]
    axes.stackplot(steps, tokens, labels=mixture.names)
    axes.set(xlabel="step", ylabel="tokens served", title=describe_phases(config.phases()))
    axes.legend(loc="upper left")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot: {path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None


def main(argv):
    if "-h" in argv or "--help" in argv:
        return print(__doc__)
    path, rest = None, []
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name == "--plot":
            path = value if equals else next(iter(argv[i + 1:]), "")
            if not path or path.startswith("--"):
                raise UserError("--plot: needs a file, such as mixture.png")
        elif i == 0 or argv[i - 1] != "--plot":
            rest.append(argument)
    config = load_config(rest)
    mixture, rows = analyse(config)
    print(f"{describe_phases(config.phases())}; {config.max_iters:,} steps, packing={config.packing}\n")
    print("\n".join(table(config, mixture, rows)))
    if path:
        plot(path, config, mixture)
        print(f"\nplot: {path}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
