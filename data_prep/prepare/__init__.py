"""From granules to shards, for many tiles."""
