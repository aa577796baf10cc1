"""Signs of collapse inside an edited model: one file a family of signs, found by scan."""
