"""Checkpoints on disk and weights on their way into another network."""
