"""Rasters in and out: the only part of the package that opens them."""
