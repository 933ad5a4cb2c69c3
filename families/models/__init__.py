"""The base models: one file for each family, which says everything that is special about it.

Every file here is found by `families.registry`. It must be readable without PyTorch, which takes a
second to import: methods import what they need of PyTorch and diffusers themselves.
"""
