"""Collect documents into a deduplicated corpus with provenance."""
