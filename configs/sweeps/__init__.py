"""What sweeps vary, one file a search space."""
