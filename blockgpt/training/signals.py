"""Which signals end a run: all whose default would end the process, but for those of UNHANDLED.

Handlers written in Python run in the main thread between two of its instructions, which can be minutes apart. So they
do nothing here: the interpreter also writes the number of each signal into a pipe, which the watchdog's thread reads.
"""

import contextlib
import os
import signal

HARMLESS = "its default does nothing"
PAUSES = "it stops the process, which continues later"
IGNORED_BY_PYTHON = "Python ignores it, and the call fails with an OSError"
FAULT = "an error of the process itself, whose memory cannot be trusted"
CANNOT_BE_CAUGHT = "it cannot be caught"
UNHANDLED: dict[str, str] = {
    "SIGKILL": CANNOT_BE_CAUGHT, "SIGSTOP": CANNOT_BE_CAUGHT,
    "SIGCHLD": HARMLESS, "SIGCONT": HARMLESS, "SIGURG": HARMLESS, "SIGWINCH": HARMLESS, "SIGINFO": HARMLESS,
    "SIGTSTP": PAUSES, "SIGTTIN": PAUSES, "SIGTTOU": PAUSES,
    "SIGPIPE": IGNORED_BY_PYTHON, "SIGXFSZ": IGNORED_BY_PYTHON,
    "SIGILL": FAULT, "SIGTRAP": FAULT, "SIGABRT": FAULT, "SIGBUS": FAULT, "SIGFPE": FAULT, "SIGSEGV": FAULT,
    "SIGSYS": FAULT, "SIGEMT": FAULT,
}
HANDLED = frozenset(int(s) for s in signal.valid_signals()) - {int(getattr(signal, name, 0)) for name in UNHANDLED}

# Signals that come again by themselves, so that a second one does not mean that somebody is impatient: from timers and
# limits of the kernel, and when a terminal goes away from its shell and from the kernel.
REPEATED_BY_ITSELF = frozenset({signal.SIGXCPU, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO,
                                signal.SIGHUP})


def signal_name(signum: int) -> str:
    """SIGTERM for 15; SIGRTMIN+2 for 36."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"SIGRTMIN+{signum - signal.SIGRTMIN}"


class SignalPipe:
    """The numbers of the signals of HANDLED, as they arrive. A context manager, entered by the main thread.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored; one that somebody else handles stays theirs.
    """

    def __enter__(self) -> "SignalPipe":
        self.read_fd, self.write_fd = os.pipe()
        os.set_blocking(self.read_fd, False)
        os.set_blocking(self.write_fd, False)
        self.previous_fd = signal.set_wakeup_fd(self.write_fd, warn_on_full_buffer=False)
        defaults = (signal.SIG_DFL, signal.default_int_handler)
        self.previous = {s: signal.getsignal(s) for s in sorted(HANDLED) if signal.getsignal(s) in defaults}
        for s in self.previous:
            signal.signal(s, lambda signum, frame: None)
        return self

    def __exit__(self, *error: object) -> None:
        for s, handler in self.previous.items():
            signal.signal(s, handler)
        signal.set_wakeup_fd(self.previous_fd)
        os.close(self.read_fd)
        os.close(self.write_fd)

    def wake(self) -> None:
        """End a wait for this pipe."""
        os.write(self.write_fd, b"\0")

    def read(self) -> list[int]:
        """The numbers that have arrived since the last call."""
        with contextlib.suppress(BlockingIOError):
            return [n for n in os.read(self.read_fd, 4096) if n in self.previous]
        return []
