"""Tensors of a checkpoint without loading it: files, ZeRO partitions."""
