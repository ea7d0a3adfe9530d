"""Tiny Shakespeare (1.1 MB) by characters, split as nanoGPT does: the first 90 % train, the rest val.

python data/shakespeare_char/prepare.py [--source input.txt] [--out_dir DIR]

Downloads the text unless --source names a local copy (any UTF-8 text will do).
"""

import hashlib
import http.client
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules, wherever this is run

from data_prepare import write_dataset
from data_tokenizer import CharTokenizer
from errors import ArgumentParser, DataError, told_in_one_line

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TIMEOUT = 30  # seconds without an answer


def download():
    """The bytes at URL; `DataError` if they cannot be had or are not Shakespeare (a proxy's login page, say)."""
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{URL}: cannot be downloaded: {error} (get the file another way and give --source FILE)") \
            from None
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise DataError(f"{URL}: gave something else than the file expected (get it another way and give "
                        "--source FILE)")
    return data


def read(source):
    """The text of the file `source`, or of the download if None."""
    try:
        return (download() if source is None else source.read_bytes()).decode("utf-8")
    except OSError as error:
        raise DataError(f"--source {source}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"--source {source}: is not UTF-8 text (byte {error.start})") from None


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, help="a local input.txt; None: download")
    parser.add_argument("--out_dir", type=Path, default=Path(__file__).resolve().parent, help="where the files go")
    args = parser.parse_args()
    text = read(args.source)
    cut = int(len(text) * 0.9)
    documents = [("train", text[:cut]), ("val", text[cut:])]
    write_dataset(args.out_dir, CharTokenizer(text), documents, source=str(args.source or URL))


if __name__ == "__main__":
    with told_in_one_line():
        main()
