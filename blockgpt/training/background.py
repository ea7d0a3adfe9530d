"""Threads whose outcome is asked for: an error in one, also a programming error, reaches the main thread.

An exception in a `threading.Thread` is printed, and the program goes on and exits with code 0.
"""

import threading
from collections.abc import Callable


class BackgroundThread(threading.Thread):
    """A running daemon thread that does `work()` and keeps the exception that ended it for `check`."""

    def __init__(self, work: Callable[[], object], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.work = work
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.error = error

    def check(self) -> None:
        """Raise, once, what ended the thread. Call it while the thread runs, and after `join`."""
        error, self.error = self.error, None
        if error is not None:
            raise error
