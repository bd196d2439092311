"""Where sessions are kept: in memory, in a SQLite file, in Redis."""
