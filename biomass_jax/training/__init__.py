"""Training: sharding, optimisers, losses and the loop."""
