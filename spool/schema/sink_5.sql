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
