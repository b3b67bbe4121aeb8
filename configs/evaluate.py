"""Score a model on the test chips: the reference's zero-shot experiments.

    python -m biomass_jax.main --config configs/evaluate.py --workdir OUT --config.bundle=BUNDLE --config.data.path=PATH

On one biome, where PATH is the published folder of that biome, or shards that know their biomes:

    ... --config.data.path=granite-geospatial-biomass-datasets/taiga_datasplit
    ... --config.data.path=SHARDS --config.data.biome=taiga

Writes metrics.json, scores.csv, binwise_rmse.csv (the reference's columns) and figures into OUT.

Hardware: any; Swin-B at about 7 chips/s on two CPU cores.
Expected of the released model (RMSE in Mg/ha, bins 0-100, 100-200, 200-300, 0-300): all biomes 35.29, 67.20, 131.23,
50.81; taiga 16.64, 79.10, 168.39, 30.76. --config.reference=True scores labels on no-data pixels too, as it did.
"""

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
    """Fields of an evaluation."""
    config = common.get_config()
    config.mode = "evaluate"
    config.matmul_precision = "highest"  # float32 as such; TPUs and some GPUs would round to fewer bits
    config.seed = 0  # of the intervals' draws
    config.resamples = 1000  # of tiles, for 95 % intervals; 0 = no intervals
    config.reference = False  # see above
    config.experiment = config_dict.placeholder(str)  # its name in tables and titles; None = model and data

    # batch_size: chips a step; where it is not given, 4 a device on CPU and 32 a device elsewhere.

    config.data = config_dict.ConfigDict()
    config.data.path = config_dict.placeholder(str)  # shards (data_prep), or folders of GeoTIFFs as published
    config.data.split = "test"  # or val, train
    # Names of a GeoTIFF's bands where its descriptions don't say, as configs/predict.py has them.
    config.data.bands = config_dict.placeholder(str)
    config.data.statistics = "bundle"  # means and stds of the bundle, or of the data's own train split: dataset
    config.data.means = config_dict.placeholder(tuple)  # or explicitly, one number for each of the model's bands
    config.data.stds = config_dict.placeholder(tuple)
    config.data.threads = 8  # that read chips
    config.data.biome = config_dict.placeholder(str)  # slug of the only biome to score
    config.data.biomes = config_dict.placeholder(str)  # polygons that tell biomes: any file that GDAL reads, GeoParquet
    config.data.biome_field = config_dict.placeholder(str)  # their column of names

    config.figures = config_dict.ConfigDict()
    config.figures.chips = ()  # ids of chips to draw, or their beginnings: ("10SFF_144",)
    config.figures.count = 4  # where none are named: so many, evenly spread over the split
    return config.lock()
