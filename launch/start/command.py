"""How one of our processes starts another `ligature` command, ends it with its own end, and passes its exit code on.

Tested in tests/launch/start/test_local.py.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable

from runtime.errors import LigatureError

PR_SET_PDEATHSIG = 1
"""Linux's option of `prctl` that asks for a signal when the parent ends."""


def ligature_command(*arguments: str) -> list[str]:
    """Return the command line of a `ligature` command, run by this process's Python."""
    return [sys.executable, "-m", "launch.cli", *arguments]


def run_command(*arguments: str) -> None:
    """Print a `ligature` command line and run it as a process, in this process's environment.

    Raises:
        LigatureError: The command failed; the error has its exit code.
    """
    print_heading("ligature " + " ".join(arguments))
    process = subprocess.run(
        ligature_command(*arguments), env=os.environ, check=False, preexec_fn=end_with_parent(os.getpid())
    )
    if code := process.returncode:
        raise error_with_code(
            f"stopped in `ligature {arguments[0]}` (exit code {code}); the same command resumes from there", code
        )


def print_heading(text: str) -> None:
    """Print a line that separates the output of one step from the next."""
    print(f"\n== {text}", flush=True)


def error_with_code(message: str, code: int) -> LigatureError:
    """Return an error that ends this process with another process's exit code."""
    error = LigatureError(message)
    error.exit_code = code
    return error


def end_with_parent(parent: int) -> Callable[[], None] | None:
    """Return a function that a new process runs first, so that it ends with its parent, even if that is killed by `kill -9`.

    On Linux the process asks the kernel for SIGTERM at its parent's end. A stage then saves at its step boundary and
    leaves; other commands end at once.

    Args:
        parent: Process id of the parent.

    Returns:
        A `preexec_fn` for `subprocess`; None on systems other than Linux.
    """
    if sys.platform != "linux":
        return None
    set_signal = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork: little is safe after it

    def request_signal() -> None:
        # The parent may have ended before the request: then nobody would ever send the signal.
        if set_signal(PR_SET_PDEATHSIG, signal.SIGTERM) != 0 or os.getppid() != parent:
            os._exit(1)

    return request_signal
