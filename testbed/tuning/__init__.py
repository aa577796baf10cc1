"""Choice of an editor's settings on development edits: `python -m testbed.tune`."""
