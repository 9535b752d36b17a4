"""``python -m tests.torture.skewed SECONDS collector``, or ``… forwarder pubsub``: a wrong clock.

The same program; only its time of day is another one, as on a machine without time service.
"""

import runpy
import sys
import time


def skew(seconds: int) -> None:
    """Move the time of day that this process sees; durations stay right."""
    seconds_of, nanoseconds_of = time.time, time.time_ns
    time.time = lambda: seconds_of() + seconds
    time.time_ns = lambda: nanoseconds_of() + seconds * 10**9


if __name__ == "__main__":
    skew(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
