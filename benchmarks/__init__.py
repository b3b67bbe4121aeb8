"""Speed and memory, one command a figure; each prints a table and writes JSON."""
