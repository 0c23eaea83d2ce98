"""Measurements and reproductions: see each file."""
