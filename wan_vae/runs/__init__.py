"""One way through a decode or encode: chunks, passes, strips, shards, clock and report."""
