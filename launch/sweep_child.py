"""Becomes another program that gets SIGTERM when its starter dies: `python sweep_child.py PARENT COMMAND ...`.

Without it, a sweep that is killed with SIGKILL leaves its trials running on the GPUs that its restart wants to use.
Linux only; elsewhere trials outlive a killed sweep, and its restart waits for them.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def words() -> list[str]:
    """What goes before a command of this process that is to go with it; nothing but on POSIX.

    Unlike what could run between fork and exec, it is safe in a process with threads, as JAX has.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid())] if os.name == "posix" else []


def main(argv: list[str]) -> None:
    """Ask for the signal, then turn into the command; the request outlives exec."""
    parent, command = int(argv[0]), argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the request
            sys.exit(f"what started it (process {parent}) is gone")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
