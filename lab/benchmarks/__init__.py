"""What is claimed, measured: each file prints one table, and its command stands beside it."""
