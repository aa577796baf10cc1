"""The simulated world: facts, pictures and questions with exact truth."""
