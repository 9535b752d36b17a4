"""The exit codes that the supervisor and the operator see."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Why a process ended. The numbers are those of sysexits.h."""

    CLEAN = 0
    """Asked to stop, and everything in hand was finished first."""
    BUG = 70
    """An error that nobody foresaw (EX_SOFTWARE). A restart may help; a report does."""
    STORAGE = 75
    """The disk or a file on it failed (EX_TEMPFAIL). A restart tries again."""
    CONFIG = 78
    """Wrong or contradicting settings (EX_CONFIG). An operator has to change them; a start is tried
    again once they have changed."""
