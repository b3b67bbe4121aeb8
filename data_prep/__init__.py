"""From HLS granules and GEDI orbits to training shards; never imports JAX."""

from pathlib import Path

# `python -m data_prep.labels` and its like are found there.
__path__ = [*__path__, str(Path(__file__).parent / "old_spellings")]
