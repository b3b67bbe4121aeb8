"""Above-ground biomass maps from satellite images, in JAX."""

__version__ = "0.1.0"
