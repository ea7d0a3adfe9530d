"""A clock for time-outs and step times, which stands still while the whole process is stopped."""

import threading
import time

PAUSE_SECONDS = 2.0  # without a reading of the clock, after which the process was stopped; read it much more often


class RunningClock:
    """Seconds that this process was able to run since the clock was made.

    A process is stopped by SIGSTOP, a frozen control group, or a suspended computer. It then uses no CPU time, which
    distinguishes it from one whose other threads waited for a long call.

    Attributes:
        paused: seconds that the process was stopped.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.paused = 0.0
        self.started = self.last = time.monotonic()
        self.last_cpu = time.process_time()

    def time(self) -> float:
        """The seconds so far. Some thread has to call this all the time, at least once a second."""
        with self.lock:
            now, cpu = time.monotonic(), time.process_time()
            gap = now - self.last
            if gap > PAUSE_SECONDS and cpu - self.last_cpu < gap / 2:
                self.paused += gap
            self.last, self.last_cpu = now, cpu
            return now - self.started - self.paused
