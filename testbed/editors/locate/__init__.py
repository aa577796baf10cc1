"""Locate-then-edit methods, and the search, keys and solver that they share."""
