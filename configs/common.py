"""Fields that all runs share. Configs start from `get_config` and add their own.

Not a run of its own: take one of the other files in this folder.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Shared fields with their defaults; unlocked, so that a config can add to them."""
    config = config_dict.ConfigDict()
    config.mode = config_dict.placeholder(str)  # what main.py runs; each config sets its own
    config.bundle = config_dict.placeholder(str)  # folder of the model: weights, bands, statistics
    config.batch_size = config_dict.placeholder(int)  # images a step over all devices together; each config's own
    config.dtype = "float32"  # or bfloat16, inside the model; weights and results stay float32
    config.matmul_precision = "default"  # default | high | highest, of float32 products, as JAX has it
    return config
