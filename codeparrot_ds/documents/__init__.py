"""A document and its provenance, and every format that it comes in."""
