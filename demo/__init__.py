"""`make demo`: trains on a few images and generates with the result, as a user would.

The base model is the miniature, a small test model that is included, so it takes 2 minutes without
a GPU.
"""
