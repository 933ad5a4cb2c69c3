"""The miniature: a base model of a few million parameters that really draws.

The same classes as Z-Image, trained on a procedural world whose pictures a judge can read, so
that claims about learning and distillation become numbers on a CPU. See `docs/miniature.md`.
"""
