"""Inspects, converts, merges, resizes, bakes and extracts LoRA files (`python -m adapters`)."""
