"""From HLS granules and GEDI orbits to training shards; never imports JAX."""
