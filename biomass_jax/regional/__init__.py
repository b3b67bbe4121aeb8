"""From maps to the figures that are reported of regions."""
