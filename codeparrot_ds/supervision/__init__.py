"""Supervision of training jobs: start, watch and restart attempts."""
