"""Which signals end a run: every signal of this system is handled, or is listed with the reason why not."""

import os
import resource
import signal

import pytest

from blockgpt.training.signals import CANNOT_BE_CAUGHT, FAULT, HANDLED, UNHANDLED, SignalPipe, signal_name

CONTINUES, STOPS, ENDS = "continues", "stops", "ends"


def default_effect(signum):
    """What a signal does to a process that does not handle it."""
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if signum not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.kill(os.getpid(), signum)
        os._exit(0)
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return STOPS
    return ENDS if os.WIFSIGNALED(status) else CONTINUES


@pytest.mark.slow
def test_every_signal_that_ends_a_process_is_handled_or_has_a_reason_why_not():
    for signum in map(int, signal.valid_signals()):
        reason = UNHANDLED.get(signal_name(signum))
        assert (reason is None) == (signum in HANDLED), signum
        effect = default_effect(signum)
        if effect == ENDS and reason not in (FAULT, CANNOT_BE_CAUGHT):  # else Python has replaced the default
            assert signum in HANDLED or signal.getsignal(signum) == signal.SIG_IGN, signal_name(signum)
        if reason is None:
            assert effect == ENDS, signal_name(signum)


@pytest.fixture
def defaults():
    """The signals that end a process have their default effects, as at the start of a run."""
    before = {s: signal.signal(s, signal.SIG_DFL) for s in HANDLED}
    yield
    after = {s: signal.signal(s, handler) for s, handler in before.items()}
    assert set(after.values()) <= {signal.SIG_DFL, signal.SIG_IGN}


def test_every_handled_signal_arrives_in_the_pipe(defaults):
    for signum in sorted(HANDLED):
        with SignalPipe() as pipe:
            signal.raise_signal(signum)
            pipe.wake()
            assert pipe.read() == [signum] and pipe.read() == [], signal_name(signum)


def test_an_ignored_signal_stays_ignored_and_that_of_a_library_its_own(defaults):
    arrived = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signal.signal(signal.SIGALRM, lambda signum, frame: arrived.append(signum))
    with SignalPipe() as pipe:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGALRM)
        assert pipe.read() == [] and arrived == [signal.SIGALRM]
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_every_signal_has_a_name():
    names = [signal_name(signum) for signum in sorted(map(int, signal.valid_signals()))]
    assert len(set(names)) == len(names) and "SIGTERM" in names
