"""Cog without Docker: helpers of `train.py` and `predict.py`, their OpenAPI schema, and a server.

Independent of images and training. This is the only package that imports `train.py` and
`predict.py`, and only to read their signatures.
"""
