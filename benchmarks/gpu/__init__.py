"""What needs a GPU, in one go: `python -m benchmarks.gpu --out DIR`."""
