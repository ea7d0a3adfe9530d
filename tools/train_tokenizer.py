"""Train a SentencePiece tokenizer on your own text, and print how good it is.

    python -m tools.train_tokenizer --input 'docs/**/*.txt' --vocab_size 8192 --model bpe --output mine
    python data/files/prepare.py --name mine --input 'docs/**/*.txt' --tokenizer mine.model

--input is that of data/files/prepare.py. Text is not normalised, and unseen characters are encoded as bytes, so that
decoding restores every text. --export_bpe also writes OUTPUT.tiktoken, which splits text in the same way, but faster.
"""

import argparse
import collections
import io
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, however this is started
import blockgpt.startup  # noqa: F401

# isort: split
from blockgpt.console import ArgumentParser, check_ranges
from blockgpt.data.commands import add_input, add_max_loss, input_partitions
from blockgpt.data.losses import MAX_LOSS, Skipped
from blockgpt.data.sources import Partition
from blockgpt.data.tokenizer import SentencePieceTokenizer, TiktokenTokenizer, Tokenizer, pack_bytes, to_ranks
from blockgpt.errors import DataError, UserError, exit_on_user_error, first_line, require_package
from blockgpt.files import user_path, write_bytes

SENTENCE_BYTES = 4000  # documents are split at line ends: the trainer's memory grows with its longest sentence
HELD_OUT_EVERY = 50  # one sentence in 50 is held out of training, for the measurement
MAX_HELD_OUT = 1000


def sentences(partitions: Iterable[Partition], max_loss: float = MAX_LOSS) -> Iterator[str]:
    """Yield the documents in chunks of whole lines, about SENTENCE_BYTES long; a longer line is split."""
    for partition in partitions:
        for _, text in partition.documents(Skipped(max_loss=max_loss)):
            chunk: list[str] = []
            size = 0
            for line in text.splitlines(keepends=True):
                for start in range(0, len(line), SENTENCE_BYTES):
                    chunk.append(line[start:start + SENTENCE_BYTES])
                    size += len(chunk[-1])
                    if size >= SENTENCE_BYTES:
                        yield "".join(chunk)
                        chunk, size = [], 0
            if chunk:
                yield "".join(chunk)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, model: str, max_sentences: int,
                        coverage: float) -> bytes:
    """The content of a .model file; `UserError` if there is too little text for the vocabulary."""
    output = io.BytesIO()
    try:
        require_package("sentencepiece").SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=output, vocab_size=vocab_size, model_type=model,
            input_sentence_size=max_sentences, shuffle_input_sentence=True, max_sentence_length=8 * SENTENCE_BYTES,
            character_coverage=coverage, byte_fallback=True, normalization_rule_name="identity",
            add_dummy_prefix=False, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            split_digits=True, bos_id=-1, pad_id=-1, unk_id=0, eos_id=1, eos_piece="<|endoftext|>",
            num_threads=os.cpu_count(), minloglevel=2)
    except RuntimeError as error:
        raise UserError(f"--vocab_size {vocab_size}: SentencePiece cannot train on this text: {first_line(error)}") \
            from None
    return output.getvalue()


class Measurement(NamedTuple):
    """How good a tokenizer is on some texts.

    Attributes:
        megabytes_per_second: of text, encoded on one core.
        coverage: the fraction of the characters that have a token.
    """

    bytes_per_token: float
    megabytes_per_second: float
    coverage: float


def measure(tokenizer: Tokenizer, texts: Sequence[str]) -> Measurement:
    size, started = sum(len(t.encode()) for t in texts), time.process_time()
    encoded = [tokenizer.encode_array(t) for t in texts]
    seconds = time.process_time() - started  # of this process, whatever else runs on the computer
    counts = collections.Counter("".join(texts))
    covered = sum(n for c, n in counts.items() if len(c.encode()) == 1 or len(tokenizer.encode(c)) == 1)
    return Measurement(size / sum(map(len, encoded)), size / seconds / 1e6, covered / counts.total())


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The validated flags; an output that cannot be written is an error before the training."""
    parser = ArgumentParser(description=__doc__)
    add_input(parser)
    add_max_loss(parser)
    parser.add_argument("--vocab_size", type=int, default=8192, help="tokens, 256 of them bytes")
    parser.add_argument("--model", choices=("bpe", "unigram"), default="bpe", help="the algorithm")
    parser.add_argument("--output", type=user_path, default=Path("tokenizer"), help="writes OUTPUT.model")
    parser.add_argument("--export_bpe", action="store_true", help="write OUTPUT.tiktoken too")
    parser.add_argument("--max_sentences", type=int, default=100_000, help="of 4 kB, sampled from all of them")
    parser.add_argument("--coverage", type=float, default=0.9999, help="fraction of the characters that get a token")
    args = parser.parse_args(argv)
    check_ranges(args, {"vocab_size": (300 <= args.vocab_size <= 2**20, "from 300 to 1048576"),
                        "coverage": (0.9 <= args.coverage <= 1, "from 0.9 to 1"),
                        "max_sentences": (args.max_sentences > 100, "above 100")})
    if args.export_bpe and args.model != "bpe":
        raise UserError("--export_bpe: needs --model bpe: only its merges can be written in tiktoken's format")
    if not os.access(args.output.parent, os.W_OK):
        raise DataError(f"--output: {args.output}.model: cannot be written: its folder does not exist or is read-only")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    partitions = input_partitions(args)
    held_out: list[str] = []

    def training_texts() -> Iterator[str]:
        for i, text in enumerate(sentences(partitions, args.max_loss)):
            if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 and len(held_out) < MAX_HELD_OUT:
                held_out.append(text)
            elif "▁" not in text and "\0" not in text:  # SentencePiece's own characters for a space and a line end
                yield text

    content = train_sentencepiece(training_texts(), args.vocab_size, args.model, args.max_sentences, args.coverage)
    model = SentencePieceTokenizer(pack_bytes(content))
    outputs: dict[str, tuple[bytes, Tokenizer]] = {f"{args.output}.model": (content, model)}
    if args.export_bpe:
        ranks = to_ranks(model)
        outputs[f"{args.output}.tiktoken"] = (ranks, TiktokenTokenizer(ranks=pack_bytes(ranks)))
    texts = [t for t in held_out or list(sentences(partitions, args.max_loss))[:100] if "▁" not in t]
    sample = f"on {len(texts)} sentences {'held out of' if held_out else 'used in'} training"
    for path, (content, tokenizer) in outputs.items():
        m = measure(tokenizer, texts)
        try:
            write_bytes(path, content)
        except OSError as error:
            raise DataError(f"--output: {path}: cannot be written: {error.strerror}") from None
        print(f"{path}: {tokenizer.vocab_size:,} tokens, {m.bytes_per_token:.3f} bytes per token, "
              f"{m.megabytes_per_second:.1f} MB/s, coverage {m.coverage:.4%} ({sample})")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
