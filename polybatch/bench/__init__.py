"""Benchmarks of Polybatch itself: workloads, random adapters, limits of the machine, a meter, a runner.

`polybatch bench` runs them alone; `benchmarks/cpu` runs the same workloads beside other engines.
"""
