"""Editors that keep keys with values beside the model and act near a key."""
