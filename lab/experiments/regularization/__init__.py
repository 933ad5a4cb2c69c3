"""What regularization images change."""
