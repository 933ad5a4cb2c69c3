"""The base models: one file for what is special about each family, one table for their data."""
