"""A look at every host before training."""
