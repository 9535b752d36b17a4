"""Out of the spool's tables: readings that are no longer needed, or dropped."""

import sqlite3

from spool.insertion import ADD_COUNTER, SET_META


def delete_readings(
    conn: sqlite3.Connection, seq: int, counter: str, older_than_us: int | None
) -> int:
    """Delete readings up to ``seq``, a prefix, and count them; return how many.

    Args:
        conn: Within a transaction.
        seq: The last one to go.
        counter: ``pruned`` or ``dropped``.
        older_than_us: If given, only those received before this time.
    """
    sql = "DELETE FROM reading_row WHERE seq <= ?"
    parameters: tuple[int, ...] = (seq,)
    if older_than_us is not None:
        # Only a prefix may go, or seq would get holes: stop at the first that is younger.
        sql += (
            " AND seq < coalesce((SELECT min(seq) FROM reading_row"
            " WHERE seq <= ? AND received_us >= ?), ?)"
        )
        parameters = (seq, seq, older_than_us, seq + 1)
    deleted = conn.execute(sql, parameters).rowcount
    if deleted:
        conn.execute(ADD_COUNTER, (counter, deleted))
        if counter == "dropped":
            conn.execute(SET_META, ("dropped_through_seq", str(seq)))
    return deleted
