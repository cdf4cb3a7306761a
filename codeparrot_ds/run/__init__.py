"""The definition of a run and its files: recipe and run directory. Does not import torch."""
