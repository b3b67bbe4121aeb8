"""Training data from HLS granules and GEDI orbits.

    python -m data_prep prepare --config prepare --out OUT --config.season=2020

Reads OUT/granules/hls and OUT/granules/gedi unless other folders are named, and leaves training shards in OUT/shards.
What is finished is kept, so that a stopped run resumes where it was when the same command is given again.

Chips of two splits lie 10,000 m apart or more (`splits.buffer_m`), which costs about a fifth of the chips of a single
tile; the run says how many. A world of a tile or less, as the demo's, is too small for it and sets 0.
"""

from ml_collections import config_dict

from biomass_jax.runtime.settings import to_config
from data_prep.settings import Prepare


def get_config() -> config_dict.ConfigDict:
    """Fields of a run of data preparation; docs/data.md lists them."""
    return to_config(Prepare).lock()
