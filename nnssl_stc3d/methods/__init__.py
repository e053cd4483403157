"""Pretraining methods: a configuration and a module each."""
