"""Training of the tiny model, and of models on the answers that held before the first edit."""
