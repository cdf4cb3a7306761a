"""Access to the tensors of a checkpoint (files, ZeRO partitions) without loading it into memory."""
