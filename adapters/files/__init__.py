"""Reading and writing files from untrusted sources: containers, tensors, JSON; atomic writes."""
