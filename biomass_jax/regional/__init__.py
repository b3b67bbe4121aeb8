"""From maps to the figures that are reported of regions: mosaics, zones, change."""
