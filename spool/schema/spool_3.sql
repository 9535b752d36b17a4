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
