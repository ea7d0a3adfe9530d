"""FineWeb (Penedo et al. 2024): cleaned web text; samples of 10 or 100 billion GPT-2 tokens (28 or 280 GB).

python data/fineweb/prepare.py [--tokenizer gpt2] [--workers N] [--out_dir DIR] [--sample 10BT]

Streamed through `datasets`, a file of it at a time by each process. Killed, or cut off from the network, the same
command goes on. --source: another name on the Hugging Face hub, or a local copy of the repository.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules, wherever this is run

from data_prepare import command_parser, parse, prepare_with
from data_sources import hub_parts
from errors import told_in_one_line


def main():
    parser = command_parser(__doc__, Path(__file__).resolve().parent, val_fraction=0.001)
    parser.add_argument("--source", default="HuggingFaceFW/fineweb", help="on the hub, or a local folder")
    parser.add_argument("--sample", choices=("10BT", "100BT"), default="10BT", help="how much of it")
    args = parse(parser)
    name = f"sample-{args.sample}"
    prepare_with(args, hub_parts(args.source, name), f"{args.source} {name}")


if __name__ == "__main__":
    with told_in_one_line():
        main()
