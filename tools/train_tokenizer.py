"""Train a SentencePiece tokenizer on your own text, and say how good it is.

    python -m tools.train_tokenizer --input 'docs/**/*.txt' --vocab_size 8192 --model bpe --output mine
    python data/files/prepare.py --name mine --input 'docs/**/*.txt' --tokenizer mine.model

Input as data/files/prepare.py takes it. Nothing is normalised and unseen characters fall back to bytes, so that every
text comes back to the letter. --export_bpe also writes OUTPUT.tiktoken, which splits text the same way, but faster.
"""

import collections
import io
import os
import sys
import time
from pathlib import Path

from blockgpt.console import ArgumentParser
from blockgpt.data.sources import file_partitions
from blockgpt.data.tokenizer import SentencePieceTokenizer, TiktokenTokenizer, pack_bytes, to_ranks
from blockgpt.errors import DataError, UserError, exit_on_user_error, first_line, require_package
from blockgpt.files import write_bytes

SENTENCE_BYTES = 4000  # the trainer's memory is that of its longest sentence; documents are cut at line ends
HELD_OUT = 50  # one sentence in so many is not trained on, but measured with


def sentences(parts):
    """Yield the documents in pieces of whole lines, about SENTENCE_BYTES long."""
    for part in parts:
        for _, text in part.documents(collections.Counter()):
            held, size = [], 0
            for line in text.splitlines(keepends=True):
                for start in range(0, len(line), SENTENCE_BYTES):
                    held.append(line[start:start + SENTENCE_BYTES])
                    size += len(held[-1])
                    if size >= SENTENCE_BYTES:
                        yield "".join(held)
                        held, size = [], 0
            if held:
                yield "".join(held)


def train(texts, vocab_size, model, max_sentences, coverage):
    """The content of a .model file. `UserError` where the text is too little for the vocabulary."""
    written = io.BytesIO()
    try:
        require_package("sentencepiece").SentencePieceTrainer.train(
            sentence_iterator=texts, model_writer=written, vocab_size=vocab_size, model_type=model,
            input_sentence_size=max_sentences, shuffle_input_sentence=True, max_sentence_length=8 * SENTENCE_BYTES,
            character_coverage=coverage, byte_fallback=True, normalization_rule_name="identity",
            add_dummy_prefix=False, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            split_digits=True, bos_id=-1, pad_id=-1, unk_id=0, eos_id=1, eos_piece="<|endoftext|>",
            num_threads=os.cpu_count(), minloglevel=2)
    except RuntimeError as error:
        raise UserError(f"--vocab_size {vocab_size}: SentencePiece cannot train on this text: {first_line(error)}") \
            from None
    return written.getvalue()


def figures(tokenizer, texts):
    """{bytes_per_token, megabytes_per_second, coverage} on texts; coverage: the share of characters with a token."""
    size, started = sum(len(t.encode()) for t in texts), time.process_time()
    encoded = [tokenizer.encode_array(t) for t in texts]
    seconds = time.process_time() - started  # of this one core, whatever else the machine does
    counts = collections.Counter("".join(texts))
    known = sum(n for c, n in counts.items() if len(c.encode()) == 1 or len(tokenizer.encode(c)) == 1)
    return {"bytes_per_token": size / sum(map(len, encoded)), "megabytes_per_second": size / seconds / 1e6,
            "coverage": known / counts.total()}


def main(argv):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="files, folders or patterns in quotes")
    parser.add_argument("--text_key", default="text", help="the field or column that holds the text")
    parser.add_argument("--vocab_size", type=int, default=8192, help="tokens, 256 of them bytes")
    parser.add_argument("--model", choices=("bpe", "unigram"), default="bpe", help="the algorithm")
    parser.add_argument("--output", type=Path, default=Path("tokenizer"), help="writes OUTPUT.model")
    parser.add_argument("--export_bpe", action="store_true", help="write OUTPUT.tiktoken too")
    parser.add_argument("--max_sentences", type=int, default=100_000, help="of 4 kB, drawn from all of them")
    parser.add_argument("--coverage", type=float, default=0.9999, help="share of the characters to get a token")
    args = parser.parse_args(argv)
    for name, ok, range_ in (("vocab_size", 300 <= args.vocab_size <= 2**20, "from 300 to 1048576"),
                             ("coverage", 0.9 <= args.coverage <= 1, "from 0.9 to 1"),
                             ("max_sentences", args.max_sentences > 100, "above 100")):
        if not ok:
            raise UserError(f"--{name}: {getattr(args, name)} is out of range, must be {range_}")
    if args.export_bpe and args.model != "bpe":
        raise UserError("--export_bpe: needs --model bpe: only its merges can be written in tiktoken's format")
    if not os.access(args.output.parent, os.W_OK):  # told before the training, which may take long
        raise DataError(f"--output: {args.output}.model: cannot be written: no folder that may be written to")
    held_out, parts = [], file_partitions(args.input, args.text_key)

    def training():
        for i, text in enumerate(sentences(parts)):
            if i % HELD_OUT == HELD_OUT - 1 and len(held_out) < 1000:
                held_out.append(text)
            elif "▁" not in text and "\0" not in text:  # the one stands for the space inside, the other ends a line
                yield text

    content = train(training(), args.vocab_size, args.model, args.max_sentences, args.coverage)
    tokenizers = {f"{args.output}.model": (content, SentencePieceTokenizer(pack_bytes(content)))}
    if args.export_bpe:
        ranks = to_ranks(tokenizers[f"{args.output}.model"][1])
        tokenizers[f"{args.output}.tiktoken"] = (ranks, TiktokenTokenizer(ranks=pack_bytes(ranks)))
    measured = [t for t in held_out or list(sentences(parts))[:100] if "▁" not in t]
    on = f"on {len(measured)} sentences {'that it was not' if held_out else 'it was'} trained on"
    for path, (content, tokenizer) in tokenizers.items():
        f = figures(tokenizer, measured)
        try:
            write_bytes(path, content)
        except OSError as error:
            raise DataError(f"--output: {path}: cannot be written: {error.strerror}") from None
        print(f"{path}: {tokenizer.vocab_size:,} tokens, {f['bytes_per_token']:.3f} bytes per token, "
              f"{f['megabytes_per_second']:.1f} MB/s, coverage {f['coverage']:.4%} ({on})")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
