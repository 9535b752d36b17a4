"""``python -m tests.harness.impatient pubsub``: the forwarder, with less patience.

The same program with shorter waits. They are constants on purpose, not settings, so this
changes them before the program begins; everything else is as it is.
"""

import sys

from forwarder import __main__ as program
from forwarder import appendcalls, backoff, batch_delivery, bigquery, idlecheck, pubsub, writeapi
from lifecycle import leave

HOLD_RETRY_S = 0.5
BACKOFF_MAX_S = 0.5
DEADLINE_S = 2.0

if __name__ == "__main__":
    for module, name, value in (
        (batch_delivery, "HOLD_RETRY_S", HOLD_RETRY_S),
        (idlecheck, "HOLD_RETRY_S", HOLD_RETRY_S),
        (backoff, "BACKOFF_MAX_S", BACKOFF_MAX_S),
        (pubsub, "DEADLINE_S", DEADLINE_S),
        (bigquery, "DEADLINE_S", DEADLINE_S),
        (appendcalls, "DEADLINE_S", DEADLINE_S),
        (writeapi, "DEADLINE_S", DEADLINE_S),
    ):
        if not hasattr(module, name):
            raise AttributeError(f"{module.__name__} no longer has {name}")
        setattr(module, name, value)
    leave(program.main(sys.argv[1:]))
