"""Errors that a user can fix. The message is one line: what is wrong, where, and what to do next.

Tested in tests/launch/test_cli.py.
"""


class LigatureError(Exception):
    """Stops a command with one line on stderr and with `exit_code`, without a traceback."""

    exit_code = 1


class RecipeError(LigatureError):
    """A recipe or an option that cannot be run: an unknown key, a wrong type or an impossible combination."""

    exit_code = 2


class DataError(LigatureError):
    """Images, captions or shards that are missing, broken or too often unreadable."""


class CheckpointError(LigatureError):
    """A checkpoint that is missing, incomplete, altered or of another shape."""


class Interrupted(LigatureError):
    """The run saved its state and stopped at a step boundary because it was asked to. The same command resumes it.

    The exit code is `EX_TEMPFAIL`, which launchers read as "requeue me".
    """

    exit_code = 75


class RunHeld(LigatureError):
    """Another process is writing into the run's folder.

    The exit code is `EX_UNAVAILABLE`: starting again at once does not help.
    """

    exit_code = 69


class Superseded(LigatureError):
    """Another process has taken over the run, so this one must stop.

    The exit code is `EX_NOPERM`: a launcher never requeues it.
    """

    exit_code = 77


class SickRun(LigatureError):
    """Too many steps in a row had a loss or a gradient that is not finite or far outside its history."""


class RankLost(LigatureError):
    """A rank died or hangs, so the others cannot go on. Start the run again, on other machines if it happens there again.

    The exit code is `EX_PROTOCOL`: the other side did not do its part. Unlike exit code 75, it means that nothing was saved
    after the last checkpoint.
    """

    exit_code = 76
