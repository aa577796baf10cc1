"""Speed and memory, measured: `python -m testbed.bench`."""
