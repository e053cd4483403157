"""Losses: pure functions without state, random numbers or logging."""
