"""Training with DeepSpeed: from shards to checkpoints."""
