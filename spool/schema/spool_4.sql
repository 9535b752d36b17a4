-- spool.db, format 4: a commit changes as few pages as can be.
--
-- AUTOINCREMENT has SQLite write the last seq to a page of its own (sqlite_sequence), with each
-- commit. It stands among the counters from here on, on the page that each commit changes anyway.
-- The collector gives each row its seq, in the same transaction; so an emptied table does not
-- start again at 1, and cursors do not skip rows.

INSERT INTO counter (name, value)
VALUES ('last_seq', coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'reading_row'), 0));

-- The rows stay as they are: AUTOINCREMENT says how SQLite chooses a number, and nothing of how
-- rows are stored. Such a change is made in the schema's text
-- (https://www.sqlite.org/lang_altertable.html#otheralter), which a copy of 10 GB is not. What
-- sqlite_sequence has stays: a forwarder of the release before, if it is still running, takes
-- numbers above it for damage and ends. At any higher number it would take the difference for a
-- gap, and pass readings that are still to come.
PRAGMA writable_schema=ON;

UPDATE sqlite_schema SET sql = replace(sql, 'PRIMARY KEY AUTOINCREMENT', 'PRIMARY KEY')
WHERE type = 'table' AND name = 'reading_row';

PRAGMA writable_schema=RESET;

DROP VIEW backlog;

-- A row per enabled sink. Computed from positions, so it answers at once with any number of
-- rows: seq has no holes but at the low end, where rows were pruned or dropped. The state is
-- that of the forwarder only where forwarder and collector live.
CREATE VIEW backlog AS
WITH bound AS (
    SELECT
        value AS last_seq,
        coalesce((SELECT min(seq) FROM reading_row), value + 1) AS first_seq
    FROM counter
    WHERE name = 'last_seq'
),
pending AS (
    SELECT
        p.*,
        max(0, b.last_seq - max(p.cursor_seq, b.first_seq - 1)) AS pending,
        (
            SELECT r.received_us FROM reading_row AS r
            WHERE r.seq > p.cursor_seq ORDER BY r.seq LIMIT 1
        ) AS oldest_us
    FROM sink_progress AS p, bound AS b
    WHERE p.enabled = 1
)
SELECT
    sink,
    pending,
    strftime('%Y-%m-%dT%H:%M:%SZ', oldest_us / 1000000, 'unixepoch') AS oldest_received_at,
    CASE WHEN oldest_us IS NULL THEN 0.0
    ELSE max(0.0, round((julianday('now') - 2440587.5) * 86400.0 - oldest_us / 1e6, 1))
    END AS lag_s,
    strftime('%Y-%m-%dT%H:%M:%SZ', as_of_us / 1000000, 'unixepoch') AS as_of,
    CASE
        WHEN p.state IN ('no file', 'unreadable', 'undeclared') THEN p.state
        WHEN life <> 'running' THEN life
        WHEN c.state <> 'running' THEN 'unknown'
        ELSE p.state
    END AS state,
    delivered,
    dead_letters,
    dropped,
    CASE
        WHEN c.state <> 'running' AND life = 'running'
        THEN 'the collector is ' || c.state || '; ' || p.state || ' as of ' || c.as_of
            || iif(p.detail <> '', ': ' || p.detail, '')
        ELSE p.detail
    END AS detail,
    logged,
    iif(p.mode = 'LOCAL', 'LOCAL: logged, not sent', p.mode) AS mode,
    CASE
        WHEN c.state <> 'running' THEN 'collector ' || c.state
        ELSE coalesce((SELECT k.state || ' since ' || k.since FROM broker AS k), 'not connected')
    END AS broker,
    coalesce(
        (
            SELECT group_concat(h.name, ', ') FROM health AS h
            WHERE h.subject IN (p.sink, 'collector', 'broker')
        ),
        'ok'
    ) AS health
FROM pending AS p, collector AS c
ORDER BY sink;
