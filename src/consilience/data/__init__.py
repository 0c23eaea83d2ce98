"""Federations from arrays, files and names: partitioners, preprocessing and data sets."""
