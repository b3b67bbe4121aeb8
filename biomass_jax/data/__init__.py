"""Bands, records, rasters and input pipelines."""
