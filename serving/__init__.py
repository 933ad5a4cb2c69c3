"""Cog without Docker: what the Cog faces share, the schema of their inputs, and a server for them.

Nothing here knows about images or training. This is the only room that imports `train.py` and
`predict.py`, and only to read what they declare.
"""
