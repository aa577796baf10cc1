# pyright: strict
"""What an edit, a question, a stored row, a plug-in and a right answer are; the standard library and numpy only."""
