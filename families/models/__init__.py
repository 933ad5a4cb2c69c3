"""The base models: one file for each family, with everything that is specific to it.

`families.registry` finds every file in this folder. A file must not import PyTorch at the top,
which takes a second: methods import what they need of PyTorch and diffusers.
"""
