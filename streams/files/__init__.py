"""Streams that read files people already have, without dates."""
