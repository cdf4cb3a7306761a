"""Operating-system services: files, object stores, process pools, memory."""
