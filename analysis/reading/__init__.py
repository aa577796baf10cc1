"""Run folders as tables of answers."""
