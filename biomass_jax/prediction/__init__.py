"""Biomass maps from images of any size."""
