"""Benchmarks, experiments and fuzzing. The product never imports them."""
