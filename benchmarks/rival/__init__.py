"""The PyTorch original, rebuilt to race against."""
