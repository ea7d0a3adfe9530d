"""OpenWebMath (Paster et al. 2023): web pages with mathematics, 14.7 billion tokens, 56 GB of text.

python data/openwebmath/prepare.py [--tokenizer gpt2] [--workers N] [--out_dir DIR]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.data.commands import prepare_from_hub
from blockgpt.errors import exit_on_user_error


def main() -> None:
    prepare_from_hub(__doc__, __file__, "open-web-math/open-web-math", val_fraction=0.001)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
