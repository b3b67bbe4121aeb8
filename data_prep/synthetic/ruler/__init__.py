"""The ruler world: every pixel and label tells where it belongs."""
