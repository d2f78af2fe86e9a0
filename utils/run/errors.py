"""Exit codes of a stage and the exceptions that lead to them."""

from __future__ import annotations

DONE = 0
FAILED = 1
REFUSED = 2
STOPPED = 75  # EX_TEMPFAIL: state is saved, queue me again


class InputError(ValueError):
    """Wrong input or configuration (exit 2): the message says path or key, found, expected and what to do next."""


class StoppedInTime(Exception):
    """Work was interrupted by a signal or a deadline after its state was saved (exit 75)."""


class WorkFailed(RuntimeError):
    """The work itself went wrong in a foreseen way (exit 1): a diverged loss, a broken guarantee. The message says what to do."""
