"""Chips of composites and labels: index, windows, splits."""
