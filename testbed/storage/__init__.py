"""Run folders and caches: files that are there whole or not at all."""
