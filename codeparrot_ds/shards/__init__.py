"""Token ids on disk: Megatron-LM's indexed datasets with a manifest, and the order in which they are read."""
