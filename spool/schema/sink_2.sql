-- pubsub.db and bigquery.db, format 2: the append journal, which only bigquery.db uses.

-- The stream that this forwarder made and alone appends to. One row, or none yet.
CREATE TABLE append_stream (
    id          INTEGER PRIMARY KEY CHECK (id = 1),
    name        TEXT    NOT NULL,
    next_offset INTEGER NOT NULL CHECK (next_offset >= 0),  -- behind the last cut
    begun_us    INTEGER NOT NULL
) STRICT;

-- What each append under way holds, durable before it is sent: after a crash the same rows go
-- to the same offset again, and the service tells whether it has them. Gone once the cursor
-- has passed it.
CREATE TABLE append_cut (
    start_offset INTEGER PRIMARY KEY CHECK (start_offset >= 0),
    epoch        TEXT    NOT NULL,
    first_seq    INTEGER NOT NULL,
    last_seq     INTEGER NOT NULL CHECK (last_seq >= first_seq),
    row_count    INTEGER NOT NULL CHECK (row_count > 0)
) STRICT;

-- Rows within a cut that the service refused: they are not in the append, and will be dead
-- letters when the cursor passes them.
CREATE TABLE append_left_out (
    epoch  TEXT    NOT NULL,
    seq    INTEGER NOT NULL,
    reason TEXT    NOT NULL,
    detail TEXT    NOT NULL,
    PRIMARY KEY (epoch, seq)
) STRICT, WITHOUT ROWID;

CREATE VIEW appends AS
SELECT
    s.name AS stream,
    c.start_offset,
    c.row_count,
    c.first_seq,
    c.last_seq
FROM append_cut AS c, append_stream AS s
ORDER BY c.start_offset;
