"""The testbed from Python and from notebooks: a run in one call, and the run that it leaves as an object."""
