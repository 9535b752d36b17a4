-- pubsub.db and bigquery.db, format 4: sites whose readings wait while others are delivered ahead
-- of them, which only pubsub.db uses.

-- How far the other sites are. One row while a site is held, otherwise none.
CREATE TABLE ahead (
    id          INTEGER PRIMARY KEY CHECK (id = 1),
    epoch       TEXT    NOT NULL,
    -- Each reading behind the cursor and up to here was delivered or stands in dead_letter, but
    -- for those of the sites in held_site.
    through_seq INTEGER NOT NULL CHECK (through_seq >= 0)
) STRICT;

-- The sites that wait. The counters count their readings, and those that were delivered ahead of
-- them, once the cursor passes them.
CREATE TABLE held_site (
    site_code TEXT    PRIMARY KEY NOT NULL,
    first_seq INTEGER NOT NULL,  -- its readings from here to ahead.through_seq wait
    detail    TEXT    NOT NULL,  -- why, in the service's own words
    since_us  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Dead letters behind the cursor: kept already, counted when the cursor passes them. Not read from
-- dead_letter, because an operator may have them discarded meanwhile.
CREATE TABLE dead_ahead (
    seq INTEGER PRIMARY KEY
) STRICT;

CREATE VIEW held_sites AS
SELECT
    h.site_code,
    h.first_seq,
    a.through_seq,
    strftime('%Y-%m-%dT%H:%M:%SZ', h.since_us / 1000000, 'unixepoch') AS since,
    h.detail
FROM held_site AS h, ahead AS a
ORDER BY h.first_seq;
