"""A `$MODEL_VAULT` for tests: the real tokenizers, and the real model classes made small.

The weights are random. They prove shapes, layouts and plumbing, never quality.
"""
