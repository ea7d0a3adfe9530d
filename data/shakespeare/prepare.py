"""Tiny Shakespeare (1.1 MB) in GPT-2's BPE, split as in nanoGPT: the first 90 % of the text is train, the rest val.

python data/shakespeare/prepare.py [--tokenizer gpt2] [--source input.txt] [--out_dir DIR]

Downloads the text unless --source names a local copy. With gpt2: nanoGPT's 301,966 and 36,059 tokens.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.data.commands import prepare_shakespeare
from blockgpt.errors import exit_on_user_error


def main() -> None:
    prepare_shakespeare(__doc__, __file__, "gpt2")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
