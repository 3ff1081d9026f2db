"""Examples: how a client's data is read."""
