"""Token ids on disk: Megatron-LM indexed datasets with a manifest, and the order in which training reads them."""
