"""Tries to break the promise: power cuts, kills, faults of storage, cloud and broker."""
