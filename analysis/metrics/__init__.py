"""Numbers computed from stored answers."""
