"""Prediction and training on several GPUs and machines, with Ray Serve and Ray jobs.

Optional: `requirements-fleet.txt` has its packages, and no other package imports this one.
"""
