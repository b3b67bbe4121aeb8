"""PyTorch checkpoints to model bundles and back."""
