"""The miniature: a small test model of a few million parameters, included.

The same classes as Z-Image, trained on a procedural dataset of simple shapes. A classifier of
generated images measures learning and distillation on a CPU. See `docs/miniature.md`.
"""
