"""Experiments on the miniature: claims about training, measured, with their raw tables.

Each experiment is a package with its design, its runner and its report; what they share lies
beside them: prompts, drawing, measures, the table, statistics.
"""
