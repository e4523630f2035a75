"""The `ligature` command: runs one command of the table. A mistake becomes one line on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys

from launch.table import find_command, usage
from runtime.errors import LigatureError
from runtime.interrupts import hold_interrupts
from runtime.version import VERSION

REMEDIES = {
    errno.ENOSPC: "free some space and run it again",
    errno.EDQUOT: "free some space and run it again",
} | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR),
    "name a place where it can be read or written",
)
"""What the user can do about a file error. Any other OSError is a bug of ours and keeps its traceback."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command's name and its own arguments; None: those of this process.

    Returns:
        The exit code: 0, 1 for a failure, 2 for a mistake in the command line or recipe, 75 for "start me again".
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        if name == "help" and rest:  # `ligature help pretrain optimizer`
            find_command(rest[0]).load()(["--help", *rest[1:]])
        elif name in ("--help", "-h", "help"):
            print(usage(), flush=True)
        elif name in ("--version", "-V"):
            print(f"ligature {VERSION}", flush=True)
        elif name == "--completion":
            find_command("completion").load()(rest)  # its former name
        else:
            find_command(name).load()(rest)
    except LigatureError as error:
        rank = os.environ.get("RANK", "0")
        message = " ".join(str(error).split())
        if message:  # an error without a message was reported by another rank
            print(f"ligature: {message}" if rank == "0" else f"ligature (rank {rank}): {message}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output (`| head`) has gone: nothing more to print
        # Python flushes stdout once more at exit. On the closed pipe that would fail again, with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        print(f"ligature: {error.strerror} ({error.filename or 'a log'}); {REMEDIES[error.errno]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ligature: interrupted", file=sys.stderr)
        # 128 + SIGINT, the code that shells give a command ended by ctrl-C.
        return 130
    return 0


def entry() -> None:
    """Run the console command and leave the process with its exit code.

    Standard output is flushed first. The process does not wait for the loader threads of a failed run.
    """
    if sys.argv[1:2] in (["pretrain"], ["finetune"]) and not {"-h", "--help"} & set(sys.argv):
        # These stages stop by themselves at a step boundary, and their exit code must reach the launcher.
        hold_interrupts()
    code = main()
    # `os._exit` below writes out no buffers, so the last lines would be lost.
    sys.stdout.flush()
    sys.stderr.flush()
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A rank that stops on an error must not hang in a collective's destructor while the others wait for it.
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
