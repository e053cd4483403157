"""Measures what a pretraining is worth, and shows it."""
