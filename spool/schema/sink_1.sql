-- pubsub.db and bigquery.db, format 1. The forwarder of that sink is the only writer;
-- everybody else opens it mode=ro.

CREATE TABLE meta (
    key   TEXT PRIMARY KEY NOT NULL,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- How far this sink is: every reading up to seq, in the spool of that epoch, was delivered,
-- stands in dead_letter, or lies in a gap. One row.
CREATE TABLE cursor (
    id         INTEGER PRIMARY KEY CHECK (id = 1),
    epoch      TEXT    NOT NULL,
    seq        INTEGER NOT NULL CHECK (seq >= 0),
    updated_us INTEGER NOT NULL
) STRICT;

-- A reading that the service refuses for its own sake, with a copy of the row: the spool
-- prunes the original.
CREATE TABLE dead_letter (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    died_us      INTEGER NOT NULL,
    reason       TEXT    NOT NULL,  -- a code
    detail       TEXT    NOT NULL,  -- the service's own words
    epoch        TEXT    NOT NULL,
    seq          INTEGER NOT NULL,
    event_id     BLOB    NOT NULL,
    received_us  INTEGER NOT NULL,
    timestamp_us INTEGER NOT NULL,
    site_code    TEXT    NOT NULL,
    sensor_id    TEXT    NOT NULL,
    pi_tag       TEXT    NOT NULL,
    value        REAL    NOT NULL,
    topic        TEXT    NOT NULL,
    payload      BLOB    NOT NULL,
    crc          INTEGER NOT NULL,
    -- a crash between two writes must not make two dead letters of one reading
    UNIQUE (epoch, seq)
) STRICT;

-- Readings that this sink never saw because they had left the spool, with the reason.
CREATE TABLE gap (
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    noted_us  INTEGER NOT NULL,
    epoch     TEXT    NOT NULL,
    first_seq INTEGER NOT NULL,
    last_seq  INTEGER NOT NULL CHECK (last_seq >= first_seq),
    reason    TEXT    NOT NULL
) STRICT;

-- Running totals: delivered + dead_lettered + dropped = what the cursor has passed.
CREATE TABLE counter (
    name  TEXT PRIMARY KEY NOT NULL,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- What the forwarder is doing: 'delivering', 'retrying' or 'on hold', since when and why.
CREATE TABLE status (
    id       INTEGER PRIMARY KEY CHECK (id = 1),
    state    TEXT    NOT NULL,
    detail   TEXT    NOT NULL,
    since_us INTEGER NOT NULL
) STRICT;

-- A payload that could act on a terminal is shown in hex, as X'…'.
CREATE VIEW dead_letters AS
WITH control_characters (pattern) AS (
    SELECT '*[' || char(1) || '-' || char(31) || char(127) || '-' || char(159) || char(65533) || ']*'
)
SELECT
    id,
    strftime('%Y-%m-%dT%H:%M:%SZ', died_us / 1000000, 'unixepoch') AS died_at,
    reason,
    detail,
    seq,
    lower(hex(event_id)) AS event_id,
    site_code,
    sensor_id,
    pi_tag,
    value,
    topic,
    CASE
        WHEN instr(payload, x'00')
            OR replace(replace(replace(CAST(payload AS TEXT), char(9), '\t'), char(10), '\n'), char(13), '\r') GLOB pattern
        THEN quote(payload)
        ELSE replace(replace(replace(CAST(payload AS TEXT), char(9), '\t'), char(10), '\n'), char(13), '\r')
    END AS payload
FROM dead_letter, control_characters;

CREATE VIEW counters AS SELECT name, value FROM counter ORDER BY name;

CREATE VIEW now AS
SELECT
    s.state,
    strftime('%Y-%m-%dT%H:%M:%SZ', s.since_us / 1000000, 'unixepoch') AS since,
    s.detail,
    c.seq AS cursor_seq,
    strftime('%Y-%m-%dT%H:%M:%SZ', c.updated_us / 1000000, 'unixepoch') AS cursor_moved_at
FROM status AS s LEFT JOIN cursor AS c;
