"""Tiny Shakespeare (1.1 MB) by GPT-2's BPE, split as nanoGPT does: the first 90 % of the text train, the rest val.

python data/shakespeare/prepare.py [--tokenizer gpt2] [--source input.txt] [--out_dir DIR]

Downloads the text unless --source names a local copy. With gpt2: nanoGPT's 301,966 and 36,059 tokens.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules, wherever this is run

from data_prepare import write_dataset
from data_sources import SHAKESPEARE, text_of
from data_tokenizer import load_tokenizer
from errors import ArgumentParser, told_in_one_line


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, help="a local input.txt; None: download")
    parser.add_argument("--out_dir", type=Path, default=Path(__file__).resolve().parent, help="where the files go")
    parser.add_argument("--tokenizer", default="gpt2", help="byte, gpt2, … or a file, as data/files has it")
    args = parser.parse_args()
    tokenizer, text = load_tokenizer(args.tokenizer), text_of(args.source, *SHAKESPEARE)
    cut = int(len(text) * 0.9)
    documents = [("train", text[:cut]), ("val", text[cut:])]
    write_dataset(args.out_dir, tokenizer, documents, source=str(args.source or SHAKESPEARE[0]), separate=False)


if __name__ == "__main__":
    with told_in_one_line():
        main()
