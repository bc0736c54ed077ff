"""Polybatch: an LLM inference engine whose batch may be heterogeneous in every way at once."""

__version__ = "0.1.0"
