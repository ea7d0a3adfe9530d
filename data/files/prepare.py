"""Your own text: txt, md, code, json lines, json, csv, tsv, parquet, and gzip, zstd, bzip2 or xz of those.

python data/files/prepare.py --name mine --input 'docs/**/*.txt' 'more.jsonl.gz' --tokenizer gpt2

A document is a text file, a line of jsonl, an element of a json array, or a row of csv, tsv or parquet (--text_key
names the field). What is in another format is refused by name. Exact duplicates are removed. A document's hash decides
whether it is train or val; with --by_position, for a corpus of few long documents, the end of each document is val.
After an interruption the same command continues.
Then: python train.py --dataset=mine
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.data.commands import add_input, command_parser, input_partitions, parse_and_check, prepare_with
from blockgpt.data.dataset import ROOT
from blockgpt.errors import UserError, exit_on_user_error
from blockgpt.files import exists


def main() -> None:
    parser = command_parser(__doc__, None, val_fraction=0.1)
    parser.add_argument("--name", required=True, help="name of the dataset; its folder is data/<name>")
    add_input(parser)
    args = parse_and_check(parser)
    if not re.fullmatch(r"\w[\w.-]{0,99}", args.name):
        raise UserError(f"--name: {args.name!r} is not the name of a folder (letters, digits, _, -, .)")
    args.out_dir = args.out_dir or ROOT / "data" / args.name
    if exists(args.out_dir / "prepare.py"):
        raise UserError(f"--name: {args.name} is a dataset of the project with its own prepare.py (use another name)")
    prepare_with(args, input_partitions(args), f"files: {' '.join(args.input)}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
