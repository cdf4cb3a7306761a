"""Run generated programs, which are hostile until proved otherwise, and say which pass."""
