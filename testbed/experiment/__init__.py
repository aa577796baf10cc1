"""One experiment: its configuration, schedule, loop, and what is rebuilt from its folder."""
