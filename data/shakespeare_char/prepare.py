"""Tiny Shakespeare (1.1 MB) by characters, split as nanoGPT does: the first 90 % train, the rest val.

python data/shakespeare_char/prepare.py [--source input.txt] [--out_dir DIR]

Downloads the text unless --source names a local copy (any UTF-8 text will do).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules, wherever this is run

from data_prepare import write_dataset
from data_sources import SHAKESPEARE, text_of
from data_tokenizer import CharTokenizer
from errors import ArgumentParser, told_in_one_line


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, help="a local input.txt; None: download")
    parser.add_argument("--out_dir", type=Path, default=Path(__file__).resolve().parent, help="where the files go")
    args = parser.parse_args()
    text = text_of(args.source, *SHAKESPEARE)
    cut = int(len(text) * 0.9)
    documents = [("train", text[:cut]), ("val", text[cut:])]
    write_dataset(args.out_dir, CharTokenizer(text), documents, source=str(args.source or SHAKESPEARE[0]))


if __name__ == "__main__":
    with told_in_one_line():
        main()
