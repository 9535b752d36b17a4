"""Sluice on one machine in half a minute, without a cloud: ``./install.sh --demo``.

Everything is real and lies below one directory: a broker on a port of its own, supervisord
with the installed system's configuration, the collector and both forwarders (APP_ENV=LOCAL:
they log the events instead of sending them), and a simulator of eight sites.

* ``layout``: what lies where; the same shape as the installed system.
* ``processes``: starting processes, and leaving none behind.
* ``broker``, ``supervision``: the two that the demo starts; supervisord starts the rest.
* ``simulator``: the sites. It counts what the broker has acknowledged.
* ``ledger``: what the spool says, read with plain SQL as an operator would.
* ``view``, ``summary``: a line a second; and at the end, whether the two counts agree.

The simulator and the ledger share nothing, so a message lost anywhere between the broker's
acknowledgement and the sinks makes the summary wrong and the exit code 1.
"""
