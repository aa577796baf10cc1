"""Avalanche's continual-learning strategies as editors."""
