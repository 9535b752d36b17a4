"""When to try again: a pure function, clock and randomness passed in."""

BACKOFF_FIRST_S = 0.25
BACKOFF_MAX_S = 30.0
HOLD_RETRY_S = 60.0
"""What only a person can mend is looked at again once a minute."""


def backoff_s(failures: int, jitter: float) -> float:
    """Return how long to wait after the given number of failures in a row.

    Doubles from BACKOFF_FIRST_S to BACKOFF_MAX_S; the upper half of each step is left to
    chance, so that many gates do not come back in the same instant.

    Args:
        failures: 1 after the first failure.
        jitter: From 0 (the least wait) to 1 (the most).
    """
    # Bounded before the power: after hours of outage it would not fit a float.
    exponent = min(max(failures, 1) - 1, 16)
    ceiling = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0**exponent)
    return ceiling * (0.5 + 0.5 * jitter)


def pause_for_rate_s(rows: int, max_rate: int, elapsed_s: float) -> float:
    """Return how long to wait so that ``rows`` in ``elapsed_s`` stay below ``max_rate``.

    Args:
        rows: Delivered just now.
        max_rate: Rows per second; 0 for no limit.
        elapsed_s: How long that took.
    """
    return max(0.0, rows / max_rate - elapsed_s) if max_rate else 0.0
