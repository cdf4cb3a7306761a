"""What a converted model is worth: validation loss, completions."""
