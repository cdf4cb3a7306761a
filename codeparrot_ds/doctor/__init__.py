"""Checks of every host before training."""
