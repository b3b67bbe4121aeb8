"""The settings of a prediction run; docs/maps.md lists them."""

import dataclasses

from biomass_jax.runtime.settings import Range, setting


@dataclasses.dataclass
class Predict:
    """Fields of a prediction run."""

    bundle: str | None = setting(None, "folder of the model, from `biomass-jax convert` or a training's `best`")
    base: str | None = setting(
        None, "folder of an adapter's base, where that doesn't lie where it did, see [adapters](adapt.md)"
    )
    inputs: str | None = setting(
        None, "a GeoTIFF, an HLS granule's folder, a folder or pattern of such, a VRT, a URL; see above"
    )
    # A text, because flags can't spell a None in a tuple.
    bands: str | None = setting(None, "names of the files' bands where their descriptions do not say, see above")
    encoding: str = setting(
        "auto", "what the files' numbers are, see above", choices="biomass_jax.data.raster.encoding:ENCODINGS"
    )
    resample: float | None = setting(None, "m, of the pixels that finer images are brought to, see above")
    batch_size: int | None = setting(
        None, "tiles a step, over all devices together; not given, 4 a device on CPUs and 32 elsewhere"
    )
    dtype: str = setting("float32", "or bfloat16, inside the model: faster on TPUs and GPUs, with about 3 digits")
    matmul_precision: str = setting(
        "highest", "default, high, highest; TPUs and some GPUs round float32 products otherwise"
    )
    attention: str = setting(
        "auto",
        "fused, kernels for NVIDIA GPUs, see [speed](performance.md#kernels-for-gpus); einsum, plain JAX; auto, fused "
        "where the model runs on such GPUs and its shapes fit",
        choices="biomass_jax.models.fused.choice:CHOICES",
    )
    tile: int = setting(224, "px, side of a tile: the size that the model was trained on")
    stride: int = setting(192, "px from one tile to the next")
    margin: int = setting(8, "px, rim of a tile that is not used")
    blend: str = setting("cosine", "ramps over the overlap of tiles; none takes their plain mean")
    tiling: str = setting(
        "default", "reference_0_99, reference_1_2: the two published algorithms, to compare with their maps"
    )
    uncertainty: str = setting(
        "auto",
        "how a map says how sure it is: as the bundle was calibrated, else as its model does by itself, else not; "
        "dropout, drop_path, symmetries need no training, see [uncertainty](uncertainty.md)",
        choices="biomass_jax.prediction.layers:CHOICES",
    )
    samples: int | None = setting(
        None, "of dropout and drop_path; not given, those of the calibration, else 10", within=Range(2)
    )
    di: bool | None = setting(
        None, "the band `di`, how unlike the training chips a place is; not given, where the bundle can tell"
    )
    biome: str = setting("", "of all pixels, for the intervals that the bundle has of that biome")
    outside: str = setting(
        "keep",
        "or nodata, which leaves out where `di` is above its threshold, outside the area of applicability",
        choices="biomass_jax.prediction.layers:OUTSIDE",
    )
    adapters: str | None = setting(
        None, "polygons that name adapters of the bundle: each pixel by that of its place, see [adapters](adapt.md)"
    )
    adapter_field: str = setting("adapter", "their column of names: folders, from the file's own on")
    adapter_blend: float = setting(
        16.0, "px over which one model passes into the other at a border, half of them on each side", within=Range(0)
    )
    mask: str | None = setting(None, "a raster of land-cover classes on any grid")
    mask_keep: tuple[int, ...] = setting((), "its classes to map, as `(10, 95)`; all else becomes no-data")
    quicklook: bool = setting(False, "a picture beside each map: the image, and biomass with its scale")
    style: bool = setting(False, "colours beside each map: a .qml that QGIS takes by itself, a ramp for `gdaldem`")
    stac: bool = setting(False, "a STAC item beside each map, for catalogs; wants a CRS and a date")
    allow_empty: bool = setting(False, "write maps in which fewer than 0.1 % of the pixels have a value, too")
    overwrite: bool = setting(False, "make maps again that are finished")
    mode: str | None = setting(None, "what `main` runs")
