"""The contracts of editors, streams, probes, monitors and metrics as checks: `testbed check my_editor.py` runs them on a plug-in."""
