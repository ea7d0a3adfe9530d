"""Give up root's right to read every file, so that a test of unreadable files is real where tests run as root."""

import ctypes
import os
import traceback

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
CAPABILITY_VERSION = 0x20080522


def give_up_privileges():
    """From here on the modes of files count for this process, and for what it executes, as for any user."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capset(header, none) == 0, os.strerror(ctypes.get_errno())


def run_unprivileged(function):
    """str(function()), or the message of what it raises, of a forked process for which the modes of files count."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            give_up_privileges()
            text = str(function())
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        except BaseException:
            text = traceback.format_exc()
        os.write(write_end, text.encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    return text
