"""Figures of regions: from maps to the numbers that are reported."""
