"""Discrete events around the real scheduler, with a cost model in the executor's place. No torch."""
