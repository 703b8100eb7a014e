-- vincache's cache. Every row can be had again from vPIC: the file may be deleted at any time.
-- Executed on every connection that vincache opens on a file; of it, a cluster gets what is one transaction. It changes nothing that
-- is already there.

PRAGMA journal_mode = WAL;      -- readers never wait for the writer, nor it for them
PRAGMA synchronous  = NORMAL;   -- with WAL, a killed process loses nothing; a power cut may lose the last rows, never the file
PRAGMA journal_size_limit = 8388608;  -- bytes: a -wal that a reader held up and let grow is cut to this when it begins anew

BEGIN IMMEDIATE;                -- several workers may start at once: each waits for its turn

CREATE TABLE IF NOT EXISTS vehicles (
    vin                   TEXT    NOT NULL,      -- 17 characters, A-Z and 0-9
    model_year_asked      TEXT    NOT NULL,      -- part of the question; empty: not given
    make                  TEXT    NOT NULL,
    model                 TEXT    NOT NULL,
    model_year            TEXT    NOT NULL,
    body_class            TEXT    NOT NULL,
    error_code            TEXT    NOT NULL,      -- comma-separated, as vPIC gives it
    error_text            TEXT    NOT NULL,
    additional_error_text TEXT    NOT NULL,
    suggested_vin         TEXT    NOT NULL,
    possible_values       TEXT    NOT NULL,
    source                TEXT    NOT NULL,      -- vpic | offline
    decoded               INTEGER NOT NULL,      -- 0: nothing is known of this VIN
    fetched_at            INTEGER NOT NULL,      -- unix seconds
    expires_at            INTEGER NOT NULL,      -- unix seconds
    PRIMARY KEY (vin, model_year_asked)
) STRICT, WITHOUT ROWID;
-- No further index: every statement finds its rows by vin, or reads the table from end to end, but for this one: the rows that
-- were decoded offline are to be asked of vPIC, in this order. It costs vPIC's rows nothing.
CREATE INDEX IF NOT EXISTS unconfirmed ON vehicles (expires_at) WHERE source = 'offline';

-- What else vPIC said, apart from the row that a hit reads: it is six times as large.
CREATE TABLE IF NOT EXISTS attributes (
    vin                   TEXT    NOT NULL,
    model_year_asked      TEXT    NOT NULL,
    attributes            TEXT    NOT NULL,      -- a JSON object, under vPIC's own names
    PRIMARY KEY (vin, model_year_asked)
) STRICT;

-- A row and its attributes as one, so that a single statement stores both.
CREATE VIEW IF NOT EXISTS records AS
SELECT vehicles.*, attributes.attributes FROM vehicles LEFT JOIN attributes USING (vin, model_year_asked);

CREATE TRIGGER IF NOT EXISTS records_stored INSTEAD OF INSERT ON records BEGIN
    INSERT OR REPLACE INTO vehicles VALUES (
        new.vin, new.model_year_asked, new.make, new.model, new.model_year, new.body_class, new.error_code,
        new.error_text, new.additional_error_text, new.suggested_vin, new.possible_values, new.source,
        new.decoded, new.fetched_at, new.expires_at
    );
    DELETE FROM attributes WHERE vin = new.vin AND model_year_asked = new.model_year_asked;
    INSERT INTO attributes SELECT new.vin, new.model_year_asked, new.attributes WHERE new.attributes IS NOT NULL;
END;

CREATE TRIGGER IF NOT EXISTS attributes_removed AFTER DELETE ON vehicles BEGIN
    DELETE FROM attributes WHERE vin = old.vin AND model_year_asked = old.model_year_asked;
END;

-- When a VIN was last removed: what was being fetched at that time is not stored.
CREATE TABLE IF NOT EXISTS removals (
    vin                   TEXT    NOT NULL PRIMARY KEY,
    removed_at            INTEGER NOT NULL       -- unix nanoseconds
) STRICT, WITHOUT ROWID;

-- Work that one process does for all that share the cache.
CREATE TABLE IF NOT EXISTS leases (
    work                  TEXT    NOT NULL PRIMARY KEY,  -- sweep: to delete rows that expired long ago
    leased_until          INTEGER NOT NULL       -- unix seconds: no other process begins before
) STRICT, WITHOUT ROWID;

PRAGMA application_id = 0x56494E43;              -- "VINC": this file is ours
PRAGMA user_version   = 2;                       -- the number of this schema; a table or an index more does not change it

COMMIT;
