"""Shards to checkpoints with DeepSpeed."""
