"""A stream of real facts about countries, from a table in the package."""
