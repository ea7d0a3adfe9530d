"""OpenWebText (Gokaslan & Cohen 2019): the web pages that Reddit links to, 38 GB of text.

python data/openwebtext/prepare.py [--tokenizer gpt2] [--workers N] [--out_dir DIR]

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
    parser = command_parser(__doc__, Path(__file__).resolve().parent, val_fraction=0.0005)
    parser.add_argument("--source", default="Skylion007/openwebtext", help="on the hub, or a local folder")
    args = parse(parser)
    prepare_with(args, hub_parts(args.source), args.source)


if __name__ == "__main__":
    with told_in_one_line():
        main()
