"""Editors that learn to edit from train edits before the first edit, and the training that they share."""
