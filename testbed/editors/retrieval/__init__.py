"""Editors that keep facts beside the model and put them into prompts."""
