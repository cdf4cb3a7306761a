"""Evaluation of models: validation loss, completions, benchmarks of code."""
