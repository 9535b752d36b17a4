"""The collector: from the broker to the spool, and back to the broker with "received"."""
