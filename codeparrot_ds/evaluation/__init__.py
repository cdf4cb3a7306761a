"""Evaluation of converted models: validation loss and completions."""
