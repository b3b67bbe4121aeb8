"""HLS granules to composites."""
