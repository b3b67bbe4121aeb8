"""The forest world: a forest that a model can learn."""
