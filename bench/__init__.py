"""Benchmarks: our figures beside reference figures, interleaved, in one run."""
