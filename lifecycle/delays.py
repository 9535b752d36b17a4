"""How long readings gather, in the collector and in the sinks: all by COMMIT_DELAY_MS.

Each commit costs a sync and some pages, and each batch a request and a commit as well, for one
reading or for a thousand. One setting says how much latency may be paid for fewer of them.
"""

COMMIT_DELAY_MS_MAX = 1_000
"""With one commit a second nothing worth mention is left to save, and what a broker has sent and
not yet seen acknowledged (a second's readings) comes again after each disconnect."""

PUBSUB_GATHER_S = 0.005
"""The least time from one batch to Pub/Sub to the next while readings come, at any delay: whoever
subscribes wants them soon, and each commit of the collector brings several."""

BIGQUERY_GATHER_COMMITS = 5
BIGQUERY_GATHER_LEAST_S = 0.25
BIGQUERY_GATHER_MOST_S = 5.0
"""Nobody looks at a table more often than that."""


def bigquery_gather_s(commit_delay_ms: int) -> float:
    """Return the same for BigQuery, for each of its write methods, in seconds."""
    gather_s = BIGQUERY_GATHER_COMMITS * commit_delay_ms / 1000
    return min(max(gather_s, BIGQUERY_GATHER_LEAST_S), BIGQUERY_GATHER_MOST_S)
