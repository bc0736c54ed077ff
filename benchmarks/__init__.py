"""Benchmarks: one folder per kind of machine, results as JSON under results/."""
