"""Errors that are meant for the user: one clear sentence each, never a traceback in the terminal."""

from __future__ import annotations


class MergeidError(Exception):
    """Bad input. The message is one sentence that names the file, tensor or option, what was expected and
    what to do; the command line prints it and exits with `exit_code`.
    """

    exit_code = 2


class WillNotMerge(MergeidError):
    """The answer is "no": the plan says that the pair will not merge. Nothing was written."""

    exit_code = 1


class MergeidWarning(UserWarning):
    """Something worth knowing that does not stop the work (printed on stderr, exit code unchanged)."""
