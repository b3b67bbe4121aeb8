"""Training data from HLS granules and GEDI orbits.

    python -m data_prep.prepare --config configs/prepare.py --out OUT --config.season=2020

Reads OUT/granules/hls and OUT/granules/gedi unless other folders are named, and leaves training shards in OUT/shards.
What is finished is kept, so that a stopped run goes on where it was when the same command is given again.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Fields of a run of data preparation."""
    config = config_dict.ConfigDict()
    config.tiles = ()  # MGRS tiles as ('10SFF', '10SGF'); all that have granules where empty
    config.season = config_dict.placeholder(str)  # a year (dates by each tile's latitude) or START/STOP, STOP excluded
    # Lines (southernmost latitude, 'MM-DD', 'MM-DD', years added to the first, to the second); built-in if empty.
    config.season_table = ()
    config.label_years = 0  # shots of the same days of so many years before and after count too

    config.granules = config_dict.ConfigDict()
    config.granules.hls = ""  # folder of HLS granules' folders; OUT/granules/hls where empty
    config.granules.gedi = ""  # folder of GEDI L4A files; OUT/granules/gedi where empty
    config.granules.download = False  # get what the tiles need from NASA's archives first
    config.granules.max_cloud = 100.0  # percent of a scene that is downloaded

    config.composite = config_dict.ConfigDict()
    config.composite.sensors = ("L30",)  # and, or instead, S30
    config.composite.statistic = "mean"  # median
    config.composite.min_clear = 1  # fewest clear scenes of a pixel
    config.composite.drop_water = False
    config.composite.drop_high_aerosol = False

    config.gedi = _gedi()

    config.labels = config_dict.ConfigDict()
    config.labels.shot_owner = "nearest"  # all: a shot counts in each tile that contains it, as in the reference

    config.chips = config_dict.ConfigDict()
    config.chips.size = 224  # pixels
    config.chips.min_labels = 20
    config.chips.max_nodata = 0.05  # largest share of pixels without data
    config.chips.biomes = ""  # polygon file that names biomes
    config.chips.biome_field = ""  # its column

    config.splits = config_dict.ConfigDict()
    config.splits.kind = "block"  # tile, random
    config.splits.block_km = 50.0
    config.splits.buffer_m = 0.0  # least distance between chips of two splits
    config.splits.fractions = (0.8, 0.1, 0.1)  # train, val, test
    config.splits.seed = 0
    config.splits.stratify = "biome"  # a column of the index, or none

    config.shards = config_dict.ConfigDict()
    config.shards.records_per_shard = 256
    config.shards.seed = 0  # of the order of records
    config.shards.reference_statistics = False  # count zeros, as granite-geospatial-biomass does
    return config.lock()


def _gedi() -> config_dict.ConfigDict:
    """Which shots are kept."""
    gedi = config_dict.ConfigDict()
    gedi.box = ()  # (west, south, east, north) in degrees; whole orbits where empty
    gedi.algorithm_run_flag = True  # want 1
    gedi.l4_quality_flag = True  # want 1
    gedi.outlier_flag = True  # version 3 alone
    gedi.agbd_valid = True  # finite and >= 0
    gedi.degrade_tens = (0, 1, 2, 3, 4, 6)  # digits of degrade_flag that are admitted
    gedi.degrade_ones = (0, 3, 8)
    gedi.algorithm_10 = "auto"  # drop it where it is wrong (release 002_01); drop, keep
    gedi.leaf_off_flag = True  # want anything but 1
    gedi.sensitivity_min = config_dict.placeholder(float)
    gedi.full_power_only = False
    gedi.night_only = False
    gedi.max_relative_se = config_dict.placeholder(float)  # removes low biomass, not bad shots
    gedi.max_agbd = config_dict.placeholder(float)
    return gedi
