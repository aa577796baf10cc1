"""Signs of collapse inside an edited model: one file for each family of signs, found by scan."""
