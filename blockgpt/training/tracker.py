"""The same numbers to Weights & Biases, which may fail, sleep or be out of reach: the run is none the wiser."""

import contextlib
import math
import os
import queue
import sys
import threading

from blockgpt.errors import first_line

WANDB_SETTINGS = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off",  # the console is ours
                  "WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "60"}  # a dead network must not hold the run
TRACKER_QUEUE = 1000  # records that may wait for the tracker; what finds no room is lost, and counted
TRACKER_PATIENCE = 1.25  # × WANDB_FINISH_TIMEOUT seconds, and the run ends without its tracker


class WandbTracker:
    """The same numbers to Weights & Biases, from a thread of its own: whatever it does, the run goes on.

    Nobody waits for the tracker but `finish`, for TRACKER_PATIENCE * WANDB_FINISH_TIMEOUT seconds. Its thread tells
    nothing: what it has to say is said by the run's, at the next record.
    """

    def __init__(self, config, run_dir, record, warn):
        """record: of the run, with its `wandb_id`; not changed from here on. warn: called with a line."""
        self.warn, self.said, self.lost = warn, queue.SimpleQueue(), 0
        self.records, self.broken, self.ending = queue.Queue(TRACKER_QUEUE), False, None
        for name, value in WANDB_SETTINGS.items():
            os.environ.setdefault(name, value)
        # A daemon: one that hangs is left behind.
        self.thread = threading.Thread(target=self._work, args=(config, run_dir, record), name="wandb", daemon=True)
        self.thread.start()

    def log(self, kind, values):
        """Hand over a record; never waits."""
        if self.broken:
            return self._tell()
        try:
            self.records.put_nowait((kind, values))
        except queue.Full:
            self.lost += 1
        self._tell()

    def finish(self, record):
        """Let the tracker end, within its time; record: what run.json says at last."""
        self.ending = record
        with contextlib.suppress(queue.Full):
            self.records.put_nowait(None)  # wakes a thread that waits; one that works looks at `ending`
        patience = self._patience()
        self.thread.join(patience)
        self._tell()
        if self.thread.is_alive():
            self.broken, self.lost = True, self.lost + sum(item is not None for item in [*self.records.queue])
            self.warn(f"wandb: not done after {patience:.3g} s, the run ends without it"
                      + (f" ({self.lost} records at least did not get there)" if self.lost else ""))
            threading.Thread(target=teardown, name="wandb teardown", daemon=True).start()
        elif self.lost:
            self.warn(f"wandb: too slow: {self.lost} records were not sent (metrics.jsonl has them all)")

    @staticmethod
    def _patience():
        try:
            seconds = float(os.environ["WANDB_FINISH_TIMEOUT"])
        except ValueError:  # wandb itself will say so
            seconds = math.nan
        return TRACKER_PATIENCE * (seconds if 0 < seconds < threading.TIMEOUT_MAX / 2
                                   else float(WANDB_SETTINGS["WANDB_FINISH_TIMEOUT"]))

    def _tell(self):
        while not self.said.empty():
            self.warn(self.said.get())

    def _work(self, config, run_dir, record):
        """The thread: everything that wandb does."""
        try:
            import wandb

            mode = os.environ.get("WANDB_MODE")
            if mode is None and not wandb.login(prompt=False, verify=False):  # do not stop to ask for a key
                mode = "offline"
                self.said.put("wandb: not logged in, logging offline (wandb login; wandb sync)")
            run = wandb.init(project=config.wandb_project, name=run_dir.name, dir=str(run_dir), mode=mode,
                             id=record["wandb_id"], resume="allow", config=record, allow_val_change=True)
            while item := self._next():
                kind, values = item
                numbers = {f"{kind}/{k}": v for k, v in flatten(values).items() if k != "step"}
                run.log(numbers, step=values["step"])
            run.summary.update({"status": self.ending["status"], **self.ending["results"]})
            run.finish(exit_code=0 if self.ending["status"] in ("finished", "interrupted") else 1)
            teardown()  # here, where it may take its time; else wandb does it when the interpreter ends
        except ImportError as error:
            self._give_up(f"wandb cannot be imported ({first_line(error)}), logging without it (pip install wandb)")
        except BaseException as error:  # a tracker's fault, of whatever kind, is never the run's
            self._give_up(f"wandb: {type(error).__name__}: {first_line(error)}; logging goes on without it")

    def _next(self):
        """The next record, or None when the run has ended and all are sent."""
        if self.ending is not None and self.records.empty():
            return None
        return self.records.get()

    def _give_up(self, line):
        if not self.broken:  # nobody listens any more
            self.broken = True
            self.said.put(line)


def teardown():
    """End wandb's own process, and with it what wandb would do at the interpreter's end, however long it took."""
    with contextlib.suppress(Exception):
        getattr(sys.modules["wandb"], "teardown", lambda: None)()


def flatten(values, prefix=""):
    """{'a': {'b': 1}, 'c': [2, 3]} -> {'a/b': 1, 'c/0': 2, 'c/1': 3}."""
    flat = {}
    for k, v in values.items():
        v = dict(enumerate(v)) if isinstance(v, list) else v
        flat |= flatten(v, f"{prefix}{k}/") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return flat
