"""Benchmarks from local files, and how choices and refusals are judged."""
