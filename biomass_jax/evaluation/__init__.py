"""Scores of a model against labels: sums, tables by biomass, biome and tile, intervals, and the run that makes them."""
