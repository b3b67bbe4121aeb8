"""GEDI orbits to footprints and labels."""
