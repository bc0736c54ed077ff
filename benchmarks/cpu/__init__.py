"""CPU workloads W1 to W5 for Polybatch and for other engines, interleaved in one run."""
