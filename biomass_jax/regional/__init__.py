"""From maps to the figures of regions: mosaics, zones, change, other maps."""
