"""Attempts to train, watched to their end and started again."""
