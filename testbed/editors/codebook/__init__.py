"""Editors that keep keys with entry weights or vectors beside the model, and answer for prompts near a key."""
