"""Benchmarks, and the reproduction of published results. A package, so that no other one of this name is found first."""
