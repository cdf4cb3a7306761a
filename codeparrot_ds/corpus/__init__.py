"""Documents in, clean documents with provenance out."""
