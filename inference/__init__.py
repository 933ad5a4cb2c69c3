"""An adapter and a prompt in, images out."""
