"""Starts runs: the demo, sweeps, several processes, clusters."""
