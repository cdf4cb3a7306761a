"""This machine: files, object stores, tasks on processes, memory."""
