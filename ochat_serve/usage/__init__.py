"""Who used how much: durable counters per key and UTC day, in SQLite or PostgreSQL."""
