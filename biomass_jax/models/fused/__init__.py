"""Parts of the model as kernels for GPUs (Pallas on Triton), and when they compute instead of plain JAX."""
