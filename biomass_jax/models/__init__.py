"""Models, pure Flax Linen, NHWC."""
