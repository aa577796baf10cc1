"""Editors to compare with: none, the truth, plain fine-tuning."""
