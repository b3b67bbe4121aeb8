"""Batches for the devices, and what happens to chips on them."""
