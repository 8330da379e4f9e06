//! The tables of the projection.
//!
//! What came from `LOG` and what came from `CTL` meets only in `sessions` and `branches`, and there
//! every column is written from one of the two, or by an operation that does not care about order.
//! So the rows do not depend on how the two streams interleave, and a rebuilt projection is equal.
//! `nodes.id` and `turns.id` are local: they order what is of one stream, and are not compared.

/// The version of the tables. A file of another version is thrown away and rebuilt.
pub const VERSION: i64 = 3;

/// Marks the file as ours (`PRAGMA application_id`): "VLST".
pub const APPLICATION_ID: i64 = 0x564c_5354;

/// Bodies up to so many bytes are kept in the projection; larger ones are read from the log.
pub const BODY_BYTES_KEPT: usize = 4096;

/// `nodes.stream` of what `LOG` holds.
pub const LOG: i64 = 0;
/// `nodes.stream` of what `CTL` holds.
pub const CTL: i64 = 1;

/// Makes the tables.
pub const TABLES: &str = "
-- Up to where each stream is applied; local, changes in the same transaction as the rows.
CREATE TABLE cursors (
    ns TEXT NOT NULL, stream INTEGER NOT NULL,
    created_ms INTEGER NOT NULL, seq INTEGER NOT NULL,
    hash BLOB, -- of the node at seq; NULL when that message carries none
    PRIMARY KEY (ns, stream)
) WITHOUT ROWID;

-- Every node once, at its first place in its stream.
CREATE TABLE nodes (
    id INTEGER PRIMARY KEY,
    ns TEXT NOT NULL, stream INTEGER NOT NULL, seq INTEGER NOT NULL,
    hash BLOB NOT NULL, kind TEXT NOT NULL, time_ms INTEGER NOT NULL,
    turn INTEGER,               -- turns.id, for what belongs to one
    session TEXT,               -- for session events and seals
    parents BLOB NOT NULL,      -- 32 bytes each, as the log has them
    body_hash BLOB NOT NULL, body_len INTEGER NOT NULL,
    body BLOB,                  -- NULL: read it from the log
    emitter TEXT NOT NULL, attempt INTEGER NOT NULL, took_us INTEGER,
    reached INTEGER NOT NULL DEFAULT 0, -- the winning end of its turn reaches it through parents
    place TEXT                  -- where it counts, if it was lost and given back; else seq says it
);
CREATE UNIQUE INDEX nodes_by_hash ON nodes (ns, hash);
CREATE UNIQUE INDEX nodes_by_place ON nodes (ns, stream, seq);
CREATE INDEX nodes_by_turn ON nodes (turn) WHERE turn IS NOT NULL;
CREATE INDEX nodes_by_session ON nodes (ns, session) WHERE session IS NOT NULL;

-- Messages that carry a node the stream had before, or none, or one that belongs to nothing.
CREATE TABLE set_aside (
    ns TEXT NOT NULL, stream INTEGER NOT NULL, seq INTEGER NOT NULL,
    duplicate INTEGER NOT NULL, hash BLOB, reason TEXT NOT NULL,
    orphan INTEGER NOT NULL,    -- belongs to a turn that the log does not have, or not yet
    PRIMARY KEY (ns, stream, seq)
) WITHOUT ROWID;

-- The last messages of each stream as they came, to give back what the log may lose; see tail.rs.
CREATE TABLE tail (
    ns TEXT NOT NULL, stream INTEGER NOT NULL, seq INTEGER NOT NULL,
    time_ms INTEGER NOT NULL, total INTEGER NOT NULL, -- bytes up to this one, for the bound
    hash BLOB NOT NULL, subject TEXT NOT NULL, headers TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (ns, stream, seq)
) WITHOUT ROWID;

CREATE TABLE sessions (
    ns TEXT NOT NULL, id TEXT NOT NULL,
    agent TEXT NOT NULL,        -- of the session's start; until that is read, of its first turn
    name TEXT,                  -- from here on: CTL
    started_ms INTEGER, default_branch TEXT,
    turns INTEGER NOT NULL DEFAULT 0, open INTEGER NOT NULL DEFAULT 0, -- LOG
    active_ms INTEGER NOT NULL, -- the largest of both
    PRIMARY KEY (ns, id)
) WITHOUT ROWID;
CREATE INDEX sessions_by_name ON sessions (ns, name);
CREATE INDEX sessions_by_activity ON sessions (ns, active_ms, id);

CREATE TABLE branches (
    ns TEXT NOT NULL, session TEXT NOT NULL, name TEXT NOT NULL,
    made_seq INTEGER, fork_of TEXT, forked_from BLOB, fork_submission TEXT, -- CTL
    last_turn INTEGER, sealed BLOB,    -- LOG; of the dated name of a sealed line the promotion, from CTL
    PRIMARY KEY (ns, session, name)
) WITHOUT ROWID;

CREATE TABLE turns (
    id INTEGER PRIMARY KEY,
    ns TEXT NOT NULL, submission TEXT NOT NULL,
    agent TEXT NOT NULL, session TEXT NOT NULL, branch TEXT NOT NULL,
    number INTEGER NOT NULL,    -- turns before it on its line, as its invoke says
    previous INTEGER,           -- turns.id of the one before it
    timeout_ms INTEGER NOT NULL,
    state BLOB,                 -- that it began with
    source TEXT,                -- submission of the turn that it runs again
    invoke INTEGER NOT NULL,    -- nodes.id
    end_node INTEGER            -- nodes.id of the first end, by place
);
CREATE UNIQUE INDEX turns_by_submission ON turns (ns, submission);
CREATE INDEX turns_by_session ON turns (ns, session);
CREATE INDEX turns_open ON turns (ns, id) WHERE end_node IS NULL;

CREATE TABLE requests (
    node INTEGER PRIMARY KEY, turn INTEGER NOT NULL, key BLOB NOT NULL,
    service TEXT NOT NULL, backend TEXT NOT NULL, operation TEXT NOT NULL,
    selector TEXT NOT NULL, label TEXT NOT NULL
);
CREATE INDEX requests_by_turn ON requests (turn);

CREATE TABLE results (
    node INTEGER PRIMARY KEY, turn INTEGER NOT NULL, key BLOB NOT NULL,
    request INTEGER,            -- nodes.id of its parent
    won INTEGER NOT NULL,       -- the first one to its key, by place
    ok INTEGER NOT NULL, http INTEGER NOT NULL, content_type TEXT NOT NULL,
    state BLOB, tokens_in INTEGER, tokens_out INTEGER,
    replayed BLOB,              -- hash of the result of another turn that it was taken from
    repaired INTEGER NOT NULL   -- and it was replaced
);
CREATE INDEX results_by_key ON results (turn, key);

CREATE TABLE ends (
    node INTEGER PRIMARY KEY, turn INTEGER NOT NULL,
    outcome TEXT NOT NULL, code TEXT NOT NULL, state BLOB
);
CREATE INDEX ends_by_turn ON ends (turn);
";
