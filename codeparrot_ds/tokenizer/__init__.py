"""Byte-level BPE: training and exact encoding."""
