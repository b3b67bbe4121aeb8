"""Score a model on the test chips: the reference's zero-shot experiments.

    python -m biomass_jax.main --config evaluate --workdir OUT --config.bundle=BUNDLE --config.data.path=PATH

On one biome, where PATH is the published folder of that biome, or shards that know their biomes:

    ... --config.data.path=granite-geospatial-biomass-datasets/taiga_datasplit
    ... --config.data.path=SHARDS --config.data.biome=taiga

Writes metrics.json, scores.csv, binwise_rmse.csv (the reference's columns) and figures into OUT.

Hardware: any; Swin-B at about 7 chips/s on two CPU cores.
Expected of the released model (RMSE in Mg/ha, bins 0-100, 100-200, 200-300, 0-300): all biomes 35.29, 67.20, 131.23,
50.81; taiga 16.64, 79.10, 168.39, 30.76. --config.reference=True scores labels on no-data pixels too, as it did.
"""

from ml_collections import config_dict

from biomass_jax.configs import common
from biomass_jax.evaluation.config import Evaluate


def get_config() -> config_dict.ConfigDict:
    """Fields of an evaluation."""
    return common.config_of(Evaluate, "evaluate").lock()
