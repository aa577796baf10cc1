"""Editors that keep facts in a store beside the model and put them into prompts."""
