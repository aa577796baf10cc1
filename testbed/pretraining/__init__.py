"""How the tiny model is trained, and how a model is taught what held before the first edit."""
