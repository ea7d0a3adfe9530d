"""FineWeb (Penedo et al. 2024): cleaned web text; samples of 10 or 100 billion GPT-2 tokens (28 or 280 GB).

python data/fineweb/prepare.py [--tokenizer gpt2] [--workers N] [--out_dir DIR] [--sample 10BT]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.data.commands import prepare_from_hub
from blockgpt.errors import exit_on_user_error


def main() -> None:
    prepare_from_hub(__doc__, __file__, "HuggingFaceFW/fineweb", val_fraction=0.001,
                     samples={"10BT": "sample-10BT", "100BT": "sample-100BT"})


if __name__ == "__main__":
    with exit_on_user_error():
        main()
