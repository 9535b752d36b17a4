"""``python -m tests.torture.hasty``: the collector, which reconnects and pings without delay.

The same program with shorter waits, as tests.harness.impatient is for the forwarders.
"""

from collector import __main__ as program
from collector import mqtt
from lifecycle import leave

if __name__ == "__main__":
    for name, value in (
        ("RECONNECT_FIRST_S", 0.01),
        ("RECONNECT_MAX_S", 0.05),
        ("KEEPALIVE_S", 2),
    ):
        if not hasattr(mqtt, name):
            raise AttributeError(f"{mqtt.__name__} no longer has {name}")
        setattr(mqtt, name, value)
    leave(program.main())
