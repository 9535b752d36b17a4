-- pubsub.db and bigquery.db, format 3: dead letters have a budget, and health says what its
-- owner knows to be wrong with the file.

-- What one dead letter takes, without reading it: its texts and its payload, and 190 bytes for
-- the numbers, the epoch (twice: also in the index), headers and the slack of pages.
ALTER TABLE dead_letter ADD COLUMN kept_bytes INTEGER NOT NULL GENERATED ALWAYS AS (
    190 + length(CAST(reason AS BLOB)) + length(CAST(detail AS BLOB))
    + length(CAST(site_code AS BLOB)) + length(CAST(sensor_id AS BLOB))
    + length(CAST(pi_tag AS BLOB)) + length(CAST(topic AS BLOB)) + length(payload)
) VIRTUAL;

-- What all of them take, against DEAD_LETTER_MAX_BYTES. One row. The triggers change it in the
-- transaction of the rows, so it is right after a crash, and nothing is ever counted by reading.
CREATE TABLE dead_letter_usage (
    id         INTEGER PRIMARY KEY CHECK (id = 1),
    kept       INTEGER NOT NULL,
    kept_bytes INTEGER NOT NULL,
    max_bytes  INTEGER NOT NULL  -- the setting at the forwarder's last start
) STRICT;

INSERT INTO dead_letter_usage (id, kept, kept_bytes, max_bytes)
SELECT 1, count(*), coalesce(sum(kept_bytes), 0), 0 FROM dead_letter;

CREATE TRIGGER dead_letter_added AFTER INSERT ON dead_letter BEGIN
    UPDATE dead_letter_usage SET kept = kept + 1, kept_bytes = kept_bytes + NEW.kept_bytes;
END;

CREATE TRIGGER dead_letter_removed AFTER DELETE ON dead_letter BEGIN
    UPDATE dead_letter_usage SET
        kept = max(0, kept - 1), kept_bytes = max(0, kept_bytes - OLD.kept_bytes);
END;

-- The counter dead_lettered never goes down: dead_lettered = kept + discarded, and
-- delivered + dead_lettered + dropped is still what the cursor has passed. (In a file that took
-- the place of a damaged one, what could not be copied from it is missing in kept.)
CREATE VIEW dead_letter_budget AS
SELECT
    u.kept,
    u.kept_bytes,
    u.max_bytes,
    round(100.0 * u.kept_bytes / nullif(u.max_bytes, 0), 1) AS percent,
    coalesce((SELECT value FROM counter WHERE name = 'dead_lettered'), 0) AS dead_lettered,
    coalesce((SELECT value FROM counter WHERE name = 'dead_letters_discarded'), 0) AS discarded
FROM dead_letter_usage AS u;

-- What the forwarder knows to be wrong at present, one row per condition. Written when it
-- changes, not at each turn; an empty table means that nothing is known to be wrong.
CREATE TABLE condition (
    name     TEXT    PRIMARY KEY NOT NULL,  -- a code: lower case, underscores
    severity TEXT    NOT NULL CHECK (severity IN ('WARNING', 'CRITICAL')),
    since_us INTEGER NOT NULL,              -- when it was first seen, µs since 1970 UTC
    detail   TEXT    NOT NULL,              -- what it is, with figures
    remedy   TEXT    NOT NULL               -- what to do about it
) STRICT, WITHOUT ROWID;

-- Empty when all is well.
CREATE VIEW health AS
SELECT
    name,
    severity,
    strftime('%Y-%m-%dT%H:%M:%SZ', since_us / 1000000, 'unixepoch') AS since,
    detail,
    remedy
FROM condition
ORDER BY severity, name;
