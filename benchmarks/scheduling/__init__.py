"""What scheduling promises, shown in the simulator, and the simulator's own fidelity to the real engine."""
