-- spool.db, format 3: signs of life, the broker's state, and one view of all that is wrong.

-- The collector's sign of life, written by the thread that commits the readings. One row.
CREATE TABLE beat (
    id          INTEGER PRIMARY KEY CHECK (id = 1),
    mode        TEXT    NOT NULL,  -- APP_ENV
    pid         INTEGER NOT NULL,  -- 0 before the first start under this format
    start_ticks INTEGER NOT NULL,  -- field 22 of /proc/PID/stat: tells a process from its successor
    started_us  INTEGER NOT NULL,
    beat_us     INTEGER NOT NULL,
    limit_s     INTEGER NOT NULL,  -- older than this: the process is dead, stopped or stuck
    state       TEXT    NOT NULL CHECK (state IN ('running', 'stopped', 'failed')),
    detail      TEXT    NOT NULL   -- why it ended
) STRICT;

INSERT INTO beat VALUES (1, '', 0, 0, 0, CAST((julianday('now') - 2440587.5) * 86400e6 AS INTEGER), 40, 'running', '');

-- The connection to the broker, written when it changes. One row, or none before the first.
CREATE TABLE broker_link (
    id        INTEGER PRIMARY KEY CHECK (id = 1),
    connected INTEGER NOT NULL CHECK (connected IN (0, 1)),  -- and subscribed
    address   TEXT    NOT NULL,
    detail    TEXT    NOT NULL,  -- why it is not connected
    since_us  INTEGER NOT NULL
) STRICT;

CREATE VIEW broker AS
SELECT
    iif(connected, 'connected', 'not connected') AS state,
    strftime('%Y-%m-%dT%H:%M:%SZ', since_us / 1000000, 'unixepoch') AS since,
    address,
    detail
FROM broker_link;

-- What a forwarder says of itself, as the collector last saw it in the sink's file.
ALTER TABLE sink_progress ADD COLUMN mode TEXT NOT NULL DEFAULT '';           -- its APP_ENV
ALTER TABLE sink_progress ADD COLUMN logged INTEGER NOT NULL DEFAULT 0;       -- APP_ENV=LOCAL: not sent
ALTER TABLE sink_progress ADD COLUMN state_since_us INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sink_progress ADD COLUMN beat_us INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sink_progress ADD COLUMN life TEXT NOT NULL DEFAULT 'running'
    CHECK (life IN ('running', 'silent', 'stopped', 'failed'));

-- The conditions of the sinks' files, as the collector last saw them there.
CREATE TABLE sink_condition (
    sink     TEXT    NOT NULL,
    name     TEXT    NOT NULL,
    severity TEXT    NOT NULL,
    since_us INTEGER NOT NULL,
    detail   TEXT    NOT NULL,
    remedy   TEXT    NOT NULL,
    PRIMARY KEY (sink, name)
) STRICT, WITHOUT ROWID;

-- Whether the collector lives, by its last sign of life against the clock of now.
CREATE VIEW collector AS
WITH age AS (SELECT *, (julianday('now') - 2440587.5) * 86400.0 - beat_us / 1e6 AS age_s FROM beat)
SELECT
    CASE WHEN age.state = 'running' AND age_s > limit_s THEN 'silent' ELSE age.state END AS state,
    mode,
    pid,
    strftime('%Y-%m-%dT%H:%M:%SZ', nullif(started_us, 0) / 1000000, 'unixepoch') AS started_at,
    strftime('%Y-%m-%dT%H:%M:%SZ', beat_us / 1000000, 'unixepoch') AS as_of,
    round(age_s, 1) AS age_s,
    limit_s,
    detail
FROM age;

DROP VIEW health;

-- All that is wrong with this installation, one row each; empty when all is well. What a dead
-- collector had noted before stays: as of its last sign of life.
CREATE VIEW health AS
WITH wrong (subject, name, severity, since_us, detail, remedy) AS (
    SELECT
        'collector', 'collector_' || c.state, 'CRITICAL', b.beat_us,
        CASE c.state
            WHEN 'stopped' THEN 'the collector was stopped (' || c.detail || '): nothing is received, the broker keeps what it can'
            WHEN 'failed' THEN 'the collector has ended with an error: ' || c.detail
            ELSE 'no sign of life of the collector (pid ' || c.pid || ') since ' || c.as_of
                || '; the limit is ' || c.limit_s || ' s: it is dead, suspended, or waits for a lock on its file or for its disk'
        END,
        CASE c.state
            WHEN 'stopped' THEN 'supervisorctl start collector; if it does not stay up: supervisorctl tail collector'
            ELSE 'supervisorctl status collector; supervisorctl tail collector; if it runs: supervisorctl restart collector'
        END
    FROM collector AS c, beat AS b WHERE c.state <> 'running'
    UNION ALL
    SELECT
        'collector', 'clock_stepped', 'WARNING', b.beat_us,
        'the clock stands ' || CAST(-c.age_s AS INTEGER) || ' s before the last sign of life of the collector',
        'timedatectl; date'
    FROM collector AS c, beat AS b WHERE c.age_s < -c.limit_s
    UNION ALL
    SELECT
        CASE
            WHEN name GLOB 'broker_*' OR name GLOB 'session_*' OR name GLOB 'certificate_*' OR name GLOB 'qos_*'
            THEN 'broker' ELSE 'collector'
        END,
        name, severity, since_us, detail, remedy
    FROM condition
    UNION ALL
    SELECT
        sink, 'forwarder_' || life, 'CRITICAL', nullif(beat_us, 0),
        CASE
            WHEN life = 'stopped' THEN 'forwarder-' || sink || ' was stopped: nothing is delivered to this sink, the spool keeps it'
            WHEN life = 'failed' THEN 'forwarder-' || sink || ' has ended with an error: ' || detail
            WHEN beat_us = 0 THEN 'forwarder-' || sink || ' of this release has not run here: ' || iif(detail <> '', detail, state)
            ELSE 'no sign of life of forwarder-' || sink || ' since '
                || strftime('%Y-%m-%dT%H:%M:%SZ', beat_us / 1000000, 'unixepoch') || ': it is dead, suspended, or stuck'
        END,
        CASE
            WHEN life = 'stopped' THEN 'supervisorctl start forwarder-' || sink || '; if it does not stay up: supervisorctl tail forwarder-' || sink
            ELSE 'supervisorctl status forwarder-' || sink || '; supervisorctl tail forwarder-' || sink
                || '; if it runs: supervisorctl restart forwarder-' || sink
        END
    FROM sink_progress WHERE enabled AND life <> 'running' AND state NOT IN ('undeclared', 'unreadable')
    UNION ALL
    SELECT
        sink, 'sink_file_unreadable', 'CRITICAL', as_of_us, detail,
        'supervisorctl tail forwarder-' || sink
    FROM sink_progress WHERE enabled AND state = 'unreadable'
    UNION ALL
    SELECT sink, 'sink_on_hold', 'CRITICAL', nullif(state_since_us, 0), detail, 'the detail names it; delivery goes on within a minute after it'
    FROM sink_progress WHERE enabled AND life = 'running' AND state IN ('on hold', 'spool damaged')
    UNION ALL
    SELECT sink, 'sink_retrying', 'WARNING', state_since_us, detail, 'wait: it goes on by itself when the service can be reached'
    FROM sink_progress
    WHERE enabled AND life = 'running' AND state = 'retrying' AND as_of_us - state_since_us > 300e6
    UNION ALL
    SELECT sink, name, severity, since_us, detail, remedy FROM sink_condition
)
SELECT
    subject,
    name,
    severity,
    strftime('%Y-%m-%dT%H:%M:%SZ', since_us / 1000000, 'unixepoch') AS since,
    detail,
    remedy
FROM wrong
ORDER BY severity, subject, name;

DROP VIEW backlog;

-- A row per enabled sink. Computed from positions, so it answers at once with any number of
-- rows: seq has no holes but at the low end, where rows were pruned or dropped. The state is
-- that of the forwarder only where forwarder and collector live.
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

-- spool.db, format 3: texts from the network are shown safely whatever their bytes are.
-- shown() in a view is spelled out by spool/shown.py, which says how it shows what.

DROP VIEW readings;

-- Everything still spooled, newest seq last, in text.
CREATE VIEW readings AS
SELECT
    seq,
    lower(hex(event_id)) AS event_id,
    shown(site_code) AS site_code,
    shown(sensor_id) AS sensor_id,
    shown(pi_tag) AS pi_tag,
    -- the remainder is lifted above zero first: a time before 1970 divides downwards
    strftime('%Y-%m-%dT%H:%M:%S',
        (timestamp_us - (timestamp_us % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
        || printf('.%06dZ', (timestamp_us % 1000000 + 1000000) % 1000000) AS timestamp,
    value,
    shown(topic) AS topic,
    shown(payload) AS payload,
    strftime('%Y-%m-%dT%H:%M:%S', received_us / 1000000, 'unixepoch')
        || printf('.%06dZ', received_us % 1000000) AS received_at
FROM reading_row;

DROP VIEW rejected_summary;

DROP VIEW rejected;

-- Newest last.
CREATE VIEW rejected AS
SELECT
    id,
    strftime('%Y-%m-%dT%H:%M:%S', received_us / 1000000, 'unixepoch')
        || printf('.%06dZ', received_us % 1000000) AS received_at,
    reason,
    shown(detail) AS detail,
    shown(topic) AS topic,
    shown(payload) AS payload,
    payload_bytes,
    qos,
    retained
FROM rejected_row;

CREATE VIEW rejected_summary AS
SELECT
    t.reason,
    t.count,
    strftime('%Y-%m-%dT%H:%M:%SZ', t.first_us / 1000000, 'unixepoch') AS first_at,
    strftime('%Y-%m-%dT%H:%M:%SZ', t.last_us / 1000000, 'unixepoch') AS last_at,
    (SELECT r.topic FROM rejected AS r WHERE r.reason = t.reason ORDER BY r.id DESC LIMIT 1)
        AS last_topic,
    (SELECT r.detail FROM rejected AS r WHERE r.reason = t.reason ORDER BY r.id DESC LIMIT 1)
        AS last_detail
FROM rejected_total AS t
ORDER BY t.count DESC;
