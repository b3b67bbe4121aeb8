"""Map above-ground biomass from satellite images.

    python -m biomass_jax.main --config predict --workdir OUT --config.bundle=BUNDLE --config.inputs=PATH

Writes OUT/<input's stem>_agbd.tif for each image. A map that is finished is kept, so that a stopped run resumes where
it was when the same command is given again.
"""

from ml_collections import config_dict

from biomass_jax.configs import common
from biomass_jax.prediction.config import Predict


def get_config() -> config_dict.ConfigDict:
    """Fields of a prediction run."""
    return common.config_of(Predict, "predict").lock()
