"""Benchmarks, and the reproduction of published results: a package, so that no other of its name is found first."""
