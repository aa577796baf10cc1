"""Editors that train low-rank or side matrices."""
