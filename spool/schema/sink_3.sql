-- pubsub.db and bigquery.db, format 3: dead letters have a budget.

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
