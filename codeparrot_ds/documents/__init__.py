"""Documents with their provenance, and readers for every input format."""
