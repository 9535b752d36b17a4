-- pubsub.db and bigquery.db, format 5: a sign of life, and what was only logged counts apart.
--
-- The counter logged: readings that APP_ENV=LOCAL wrote to the log in the place of the service.
-- delivered + logged + dead_lettered + dropped = what the cursor has passed.

-- The forwarder's sign of life, written by the thread that delivers. One row.
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

INSERT INTO beat VALUES (1, '', 0, 0, 0, CAST((julianday('now') - 2440587.5) * 86400e6 AS INTEGER), 420, 'running', '');

DROP VIEW health;

-- What is wrong with this sink; empty when all is well. The view of spool.db has all sinks.
CREATE VIEW health AS
WITH age AS (
    SELECT *, (julianday('now') - 2440587.5) * 86400.0 - beat_us / 1e6 AS age_s FROM beat
),
wrong (name, severity, since_us, detail, remedy) AS (
    SELECT
        'forwarder_' || iif(state = 'running', 'silent', state), 'CRITICAL', beat_us,
        CASE state
            WHEN 'stopped' THEN 'this forwarder was stopped'
            WHEN 'failed' THEN 'this forwarder has ended with an error'
            ELSE 'no sign of life for ' || CAST(age_s AS INTEGER) || ' s (pid ' || pid || ')'
        END || iif(detail <> '', ' (' || detail || ')', '')
            || ': nothing is delivered to this sink, the spool keeps it',
        'supervisorctl status'
    FROM age WHERE state <> 'running' OR age_s > limit_s
    UNION ALL
    SELECT 'sink_on_hold', 'CRITICAL', since_us, detail, 'the detail names it; delivery goes on within a minute after it'
    FROM status WHERE state IN ('on hold', 'spool damaged')
    UNION ALL
    SELECT 'sink_retrying', 'WARNING', since_us, detail, 'wait: it goes on by itself when the service can be reached'
    FROM status
    WHERE state = 'retrying' AND (julianday('now') - 2440587.5) * 86400.0 - since_us / 1e6 > 300
    UNION ALL
    SELECT name, severity, since_us, detail, remedy FROM condition
)
SELECT
    name,
    severity,
    strftime('%Y-%m-%dT%H:%M:%SZ', since_us / 1000000, 'unixepoch') AS since,
    detail,
    remedy
FROM wrong
ORDER BY severity, name;

-- pubsub.db and bigquery.db, format 5: texts from the network and from services are shown safely
-- whatever their bytes are. shown() is spelled out by spool/shown.py.

DROP VIEW dead_letters;

CREATE VIEW dead_letters AS
SELECT
    id,
    strftime('%Y-%m-%dT%H:%M:%SZ', died_us / 1000000, 'unixepoch') AS died_at,
    reason,
    shown(detail) AS detail,
    seq,
    lower(hex(event_id)) AS event_id,
    shown(site_code) AS site_code,
    shown(sensor_id) AS sensor_id,
    shown(pi_tag) AS pi_tag,
    value,
    shown(topic) AS topic,
    shown(payload) AS payload
FROM dead_letter;

DROP VIEW held_sites;

CREATE VIEW held_sites AS
SELECT
    shown(h.site_code) AS site_code,
    h.first_seq,
    a.through_seq,
    strftime('%Y-%m-%dT%H:%M:%SZ', h.since_us / 1000000, 'unixepoch') AS since,
    shown(h.detail) AS detail
FROM held_site AS h, ahead AS a
ORDER BY h.first_seq;
