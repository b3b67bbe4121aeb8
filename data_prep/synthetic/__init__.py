"""Synthetic scenes that stand in for real data in the demo and in tests."""
