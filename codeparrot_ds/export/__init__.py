"""Conversion of ZeRO checkpoints to Hugging Face directories with a certificate, and publishing."""
