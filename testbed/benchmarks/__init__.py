"""Benchmarks from local files, and the judging of choices and refusals."""
