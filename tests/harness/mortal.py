"""``python -m tests.harness.mortal bigquery``: the forwarder, which kills itself at a named point.

The same program; ``MORTAL_AT`` names the point, ``MORTAL_COUNT`` how often it is passed before
the process sends itself SIGKILL, which nothing can catch. Without MORTAL_AT nothing is changed.
"""

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from forwarder import __main__ as program
from forwarder.writeapi import Appender, WriteApi
from lifecycle import leave
from spool import AppendJournal, SinkState

if TYPE_CHECKING:
    from collections.abc import Callable

POINTS: dict[str, tuple[type, str, bool]] = {
    "before the journal": (AppendJournal, "add", False),
    "after the journal": (AppendJournal, "add", True),
    "before a request is sent": (Appender, "send", False),
    "after a request was sent": (Appender, "send", True),
    "before an answer is read": (Appender, "receive", False),
    "after an answer was read": (Appender, "receive", True),
    "before the cursor": (SinkState, "settle", False),
    "after the cursor": (SinkState, "settle", True),
    "after a stream was made": (WriteApi, "create_stream", True),
    "after a stream was noted": (AppendJournal, "begin_stream", True),
    "before rows are left out": (AppendJournal, "leave_out", False),
    "after rows were left out": (AppendJournal, "leave_out", True),
    "after a stream was finalized": (WriteApi, "finalize_stream", True),
}


def arm(point: str, count: int) -> None:
    """Let this process die when it passes ``point`` for the ``count``-th time."""
    owner, name, after = POINTS[point]
    original: Callable[..., Any] = getattr(owner, name)
    left = count

    def pass_by(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - stands for any method
        nonlocal left
        left -= 1
        if not after and left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if after and left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, pass_by)


if __name__ == "__main__":
    if os.environ.get("MORTAL_AT"):
        arm(os.environ["MORTAL_AT"], int(os.environ["MORTAL_COUNT"]))
    leave(program.main(sys.argv[1:]))
