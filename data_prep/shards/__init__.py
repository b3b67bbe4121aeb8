"""Chips to array_record shards."""
