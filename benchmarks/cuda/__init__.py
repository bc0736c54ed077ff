"""Benchmarks of the engine on one GPU, each figure beside what the card could do at best."""
