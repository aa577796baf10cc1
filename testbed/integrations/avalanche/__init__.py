"""The testbed inside Avalanche: benchmarks of streams and strategies of editors."""
