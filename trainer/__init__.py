"""Trains an adapter from a dataset: pictures and captions in, `weights.zip` out."""
