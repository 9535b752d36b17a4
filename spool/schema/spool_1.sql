-- spool.db, format 1. The collector is the only writer; everybody else opens it mode=ro.
-- Tables hold what programs need; the views below hold what people read.

-- What this file is: epoch (a UUID, new for every new file), app_env (what it was filled
-- under), created_at, and what the collector remembers of its broker session.
CREATE TABLE meta (
    key   TEXT PRIMARY KEY NOT NULL,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- One accepted reading. A row is inserted once and never updated; it is deleted when every
-- enabled sink has it and its retention is over, or by SPOOL_FULL_POLICY=drop-oldest.
-- AUTOINCREMENT: without it an emptied table would start again at 1, below the cursors,
-- and the forwarders would skip new rows.
CREATE TABLE reading_row (
    seq          INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id     BLOB    NOT NULL CHECK (length(event_id) = 16),
    received_us  INTEGER NOT NULL,  -- when the collector took it, µs since 1970 UTC
    timestamp_us INTEGER NOT NULL,  -- when the sensor measured it, µs since 1970 UTC
    site_code    TEXT    NOT NULL CHECK (site_code <> ''),
    sensor_id    TEXT    NOT NULL CHECK (sensor_id <> ''),
    pi_tag       TEXT    NOT NULL CHECK (pi_tag <> ''),
    value        REAL    NOT NULL,
    topic        TEXT    NOT NULL,
    payload      BLOB    NOT NULL,  -- as received: UTF-8 JSON
    crc          INTEGER NOT NULL   -- CRC-32 of the row; a flipped bit passes SQLite's own check
) STRICT;

-- One message that was no reading, with the reason. A ring: the oldest go first, and how
-- many went is counted, so garbage cannot fill the disk.
CREATE TABLE rejected_row (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    received_us   INTEGER NOT NULL,
    reason        TEXT    NOT NULL,  -- a code, see docs
    detail        TEXT    NOT NULL,  -- a sentence
    topic         TEXT    NOT NULL,  -- bytes that are not UTF-8 stand as \xNN
    payload       BLOB    NOT NULL,  -- the first 64 KiB
    payload_bytes INTEGER NOT NULL,  -- its whole length
    qos           INTEGER NOT NULL,
    retained      INTEGER NOT NULL
) STRICT;

-- Per reason, also for those the ring has dropped.
CREATE TABLE rejected_total (
    reason   TEXT PRIMARY KEY NOT NULL,
    count    INTEGER NOT NULL,
    first_us INTEGER NOT NULL,
    last_us  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Running totals of this file since it was made; changed in the transaction of the rows
-- they count, so that received = spooled + duplicates + rejected at every moment.
CREATE TABLE counter (
    name  TEXT PRIMARY KEY NOT NULL,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- The sinks' positions as the collector last saw them in the sinks' own files.
CREATE TABLE sink_progress (
    sink          TEXT PRIMARY KEY NOT NULL,
    enabled       INTEGER NOT NULL CHECK (enabled IN (0, 1)),
    cursor_seq    INTEGER NOT NULL,  -- in this file's epoch; 0 where the sink has no cursor yet
    delivered     INTEGER NOT NULL,
    dead_letters  INTEGER NOT NULL,
    dropped       INTEGER NOT NULL,
    state         TEXT    NOT NULL,  -- what the forwarder says of itself; 'no file' without one
    detail        TEXT    NOT NULL,  -- and why
    as_of_us      INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- A row per enabled sink. Computed from positions, so it answers at once with any number of
-- rows: seq has no holes but at the low end, where rows were pruned or dropped.
CREATE VIEW backlog AS
WITH bound AS (
    SELECT
        coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'reading_row'), 0) AS last_seq,
        coalesce(
            (SELECT min(seq) FROM reading_row),
            (SELECT seq + 1 FROM sqlite_sequence WHERE name = 'reading_row'),
            1
        ) AS first_seq
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
    state,
    delivered,
    dead_letters,
    dropped,
    detail
FROM pending
ORDER BY sink;

-- Everything still spooled, newest seq last, in text. A payload that could act on a terminal
-- (MQTT lets anything through, JSON lets DEL and C1 through) is shown in hex, as X'…'.
CREATE VIEW readings AS
WITH control_characters (pattern) AS (
    SELECT '*[' || char(1) || '-' || char(31) || char(127) || '-' || char(159) || char(65533) || ']*'
)
SELECT
    seq,
    lower(hex(event_id)) AS event_id,
    site_code,
    sensor_id,
    pi_tag,
    -- the remainder is lifted above zero first: a time before 1970 divides downwards
    strftime('%Y-%m-%dT%H:%M:%S',
        (timestamp_us - (timestamp_us % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
        || printf('.%06dZ', (timestamp_us % 1000000 + 1000000) % 1000000) AS timestamp,
    value,
    topic,
    CASE
        WHEN instr(payload, x'00')
            OR replace(replace(replace(CAST(payload AS TEXT), char(9), '\t'), char(10), '\n'), char(13), '\r') GLOB pattern
        THEN quote(payload)
        ELSE replace(replace(replace(CAST(payload AS TEXT), char(9), '\t'), char(10), '\n'), char(13), '\r')
    END AS payload,
    strftime('%Y-%m-%dT%H:%M:%S', received_us / 1000000, 'unixepoch')
        || printf('.%06dZ', received_us % 1000000) AS received_at
FROM reading_row, control_characters;

-- Newest last. Garbage may hold terminal escapes; see the view readings.
CREATE VIEW rejected AS
WITH control_characters (pattern) AS (
    SELECT '*[' || char(1) || '-' || char(31) || char(127) || '-' || char(159) || char(65533) || ']*'
)
SELECT
    id,
    strftime('%Y-%m-%dT%H:%M:%S', received_us / 1000000, 'unixepoch')
        || printf('.%06dZ', received_us % 1000000) AS received_at,
    reason,
    detail,
    CASE WHEN topic GLOB pattern OR instr(topic, char(0)) THEN quote(CAST(topic AS BLOB))
    ELSE topic END AS topic,
    CASE
        WHEN instr(payload, x'00')
            OR replace(replace(replace(CAST(payload AS TEXT), char(9), '\t'), char(10), '\n'), char(13), '\r') GLOB pattern
        THEN quote(payload)
        ELSE replace(replace(replace(CAST(payload AS TEXT), char(9), '\t'), char(10), '\n'), char(13), '\r')
    END AS payload,
    payload_bytes,
    qos,
    retained
FROM rejected_row, control_characters;

CREATE VIEW rejected_summary AS
SELECT
    t.reason,
    t.count,
    strftime('%Y-%m-%dT%H:%M:%SZ', t.first_us / 1000000, 'unixepoch') AS first_at,
    strftime('%Y-%m-%dT%H:%M:%SZ', t.last_us / 1000000, 'unixepoch') AS last_at,
    (SELECT r.topic FROM rejected AS r WHERE r.reason = t.reason ORDER BY r.id DESC LIMIT 1)
        AS last_topic,
    (SELECT r.detail FROM rejected_row AS r WHERE r.reason = t.reason ORDER BY r.id DESC LIMIT 1)
        AS last_detail
FROM rejected_total AS t
ORDER BY t.count DESC;

CREATE VIEW counters AS SELECT name, value FROM counter ORDER BY name;
