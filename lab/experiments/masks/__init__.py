"""What masks change if all images of a subject have the same background."""
