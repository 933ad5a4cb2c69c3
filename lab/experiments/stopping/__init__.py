"""When to stop: the loss on held-out images against the likeness of generated ones."""
