"""What a preparation leaves out: counted by reason, the first of each named, and refused where it is most of a file.

A reader of documents states where it is (`position`), counts what it cannot use (`lose`), and after each file asks
whether too much of it was lost (`check`). To add a reason: a new word in a call of `lose`.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from blockgpt.errors import DataError, UserError, error_text, first_line, message_of

MAX_LOSS = 0.5  # of the records of a file; --max_loss
ADVICE = {  # by reason: how to fix it
    "not_utf8": "convert it: iconv -f ENCODING -t UTF-8, ENCODING being LATIN1, GB18030, …",
    "bad_quotes": "if quotes are part of the text: --no_quotes",
    "cut_by_separator": "put cells that contain the separator in quotes",
    "not_encodable": "choose another --tokenizer",
    "filter_failed": "the function of --filter callable must accept any text",
}


class Skipped(Counter[str]):
    """The numbers of records that are left out, by reason.

    Attributes:
        first: {reason: where the first lost record is and what was seen}, of the reasons that are losses: an empty
            document or one that a filter rejects is none.
        markers: documents that contain an end-of-text marker as letters.
        max_loss: the fraction of the records of a file that may be lost.
        file_first: reason and words of the first loss since `begin`.
        position: (path, unit, number) of the record that is being read, such as ("a.jsonl", "line", 3).
        n_lost: all losses so far.
    """

    def __init__(self, *counts: Any, max_loss: float = MAX_LOSS) -> None:
        super().__init__(*counts)
        self.first: dict[str, str] = {}
        self.markers = self.n_lost = 0
        self.max_loss = max_loss
        self.position: tuple[str, str, int] = ("", "document", 0)
        self.file_first = ("", "")

    def where(self) -> str:
        """The position as text: "a.jsonl line 3"."""
        path, unit, i = self.position
        return f"{path} {unit} {i}".strip() if i else path

    def lose(self, reason: str, seen: str) -> None:
        """Count the record at `position` as lost.

        Args:
            seen: what was found instead of a document, for the message.
        """
        self[reason] += 1
        self.n_lost += 1
        if reason not in self.first or not self.file_first[0]:
            words = f"{self.where()}: {seen}"
            self.first.setdefault(reason, words)
            if not self.file_first[0]:
                self.file_first = (reason, words)

    def begin(self) -> int:
        """Begin a file, or another group of records; the argument of its `check`."""
        self.file_first = ("", "")
        return self.n_lost

    def note_empty(self, n_empty: int, documents: int) -> None:
        """Warn if more than max_loss of the records of a file are empty; such records are no error."""
        if n_empty > self.max_loss * documents:
            path = self.position[0]
            self.first.setdefault("empty", f"{path}: {n_empty:,} of its {documents:,} records have no text")

    def check_encoded(self, lost: int, documents: int) -> None:
        """`DataError` if more than max_loss of the documents could not be encoded."""
        if lost > self.max_loss * documents:
            reason = next(reason for reason in ("filter_failed", "not_encodable") if reason in self.first)
            raise DataError(f"{lost:,} of {documents:,} documents are lost, the first ({reason}) is "
                            f"{self.first[reason]} ({ADVICE[reason]}; --max_loss={loss_fraction(lost, documents):g} "
                            "leaves them out)")

    def check(self, before: int, documents: int, what: str) -> None:
        """`DataError` if more than max_loss of the records since `before` = `begin()` are lost.

        Args:
            documents: the records that are not lost.
            what: the name of the file or group.
        """
        lost = self.n_lost - before
        total = lost + documents
        if lost > self.max_loss * total:
            reason, words = self.file_first
            advice = f"; {ADVICE[reason]}" if reason in ADVICE else ""
            raise DataError(f"{what}: {lost:,} of {total:,} records are lost, the first ({reason}) is {words} (fix "
                            f"them{advice}; --max_loss={loss_fraction(lost, total):g} leaves them out)")

    def merge(self, stats: dict[str, Any]) -> None:
        """Add the `to_json` of a later part of the corpus."""
        self.update(stats["skipped"])
        self.first = {**stats["first"], **self.first}
        self.markers += stats["markers"]

    def to_json(self) -> dict[str, Any]:
        return {"skipped": dict(self), "first": self.first, "markers": self.markers}

    def warnings(self) -> list[str]:
        """A line for each kind of loss, and one for end-of-text markers."""
        lines = [f"{self[reason]:,} lost ({reason}), the first: {words}"
                 + (f" ({ADVICE[reason]})" if reason in ADVICE else "") for reason, words in sorted(self.first.items())]
        if self.markers:
            lines.append(f"{self.markers:,} documents contain an end-of-text marker such as <|endoftext|>: it is "
                         "encoded as letters and separates nothing (split them there first, one per line of a .jsonl)")
        return lines


def loss_fraction(lost: int, total: int) -> float:
    """The smallest hundredth that is not below lost / total."""
    return -(-100 * lost // total) / 100


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn whatever a library or a user's function raises into a `DataError` that begins with `what`.

    Libraries raise bare Exceptions, those in Rust a PanicException and asyncio a CancelledError, which are not even
    Exceptions. Ctrl-C and the end of a generator pass.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        own_words = isinstance(error, (OSError, EOFError)) and message_of(error)  # which need no type
        words = error_text(error) if own_words else f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{what}: {words}") from None
