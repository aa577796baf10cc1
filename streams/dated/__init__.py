"""Streams whose facts carry dates."""
