-- spool.db, format 2: what is wrong now, for people.

-- What the collector knows to be wrong at present, one row per condition. Written when it
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

-- The ring of rejected messages counts all that a message takes, not its payload alone
-- (spool/insertion.py, cost_bytes).
UPDATE counter
SET value = (
    SELECT coalesce(sum(
        length(payload) + length(CAST(topic AS BLOB)) + length(CAST(detail AS BLOB)) + 100
    ), 0) FROM rejected_row
)
WHERE name = 'rejected_kept_bytes';
