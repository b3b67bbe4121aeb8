"""Map above-ground biomass from satellite images.

    python -m biomass_jax.main --config configs/predict.py --workdir OUT --config.bundle=BUNDLE --config.inputs=PATH

Writes OUT/<input's stem>_agbd.tif for each image. A map that is finished is kept, so that a stopped run goes on where
it was when the same command is given again.
"""

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
    """Fields of a prediction run."""
    config = common.get_config()
    config.mode = "predict"
    config.matmul_precision = "highest"  # float32 as such; TPUs and some GPUs would round to fewer bits

    # A file, folder, pattern (quoted), VRT, URL, or a folder of one HLS granule's single-band files.
    config.inputs = config_dict.placeholder(str)
    # One name for each band of the files where their descriptions don't say, None for an unused band:
    # "None,BLUE,GREEN,RED,NIR_NARROW,SWIR_1,SWIR_2,None". A text, because flags can't spell a None in a tuple.
    config.bands = config_dict.placeholder(str)

    # batch_size: tiles a step; where it is not given, 4 a device on CPU and 32 a device elsewhere.

    # Rasters larger than a tile in either direction are mapped tile by tile (pixels).
    config.tile = 224  # the size that the model was trained on
    config.stride = 192
    config.margin = 8  # outer pixels of a tile that are not used
    config.blend = "cosine"  # ramps over the overlap of tiles; none: their plain mean
    config.tiling = "default"  # reference_0_99, reference_1_2: the published algorithms, to compare with their maps

    config.mask = config_dict.placeholder(str)  # a raster of land-cover classes, on any grid
    config.mask_keep = ()  # its classes to map, as (10, 95); everything else becomes no-data

    config.quicklook = False  # a PNG beside each map: the image, and the map with its scale
    config.overwrite = False  # make maps again that are finished
    return config.lock()
