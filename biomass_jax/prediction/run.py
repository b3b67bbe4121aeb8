"""`config.mode = 'predict'`: maps of every input, in the workdir."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from biomass_jax.data import raster
from biomass_jax.data.bands import parse_band_list
from biomass_jax.prediction.predictor import Predictor
from biomass_jax.prediction.progress import duration
from biomass_jax.prediction.stream import PredictionError

log = logging.getLogger(__name__)

PREDICTOR_FIELDS = ("batch_size", "tile", "stride", "margin", "blend", "tiling", "dtype", "matmul_precision")


def run(config: Any, workdir: Path, *, shardings: Callable[[], dict[str, Any]]) -> None:
    """Map `config.inputs` with `config.bundle` into `workdir`.

    Args:
        config: of configs/predict.py.
        workdir: where maps go.
        shardings: gives `Predictor`'s batch_sharding and replicated; called when the inputs are known to be there.

    Raises:
        PredictionError: a field is missing, or some inputs failed (its message is the table).
        BundleError, RasterError, TilingError, BandError: see `Predictor`.
    """
    for field, what in (("bundle", "the model bundle's folder"), ("inputs", "the images to map")):
        if _text(config[field]) is None:
            raise PredictionError(f"config.{field} is not given; add --config.{field}=PATH, {what}")
    options = {
        "bands": parse_band_list(config.bands),
        "mask": _text(config.mask),
        "mask_keep": tuple(config.mask_keep),
        "overwrite": config.overwrite,
        "quicklook": config.quicklook,
    }
    items = raster.find_inputs(config.inputs)
    log.info("%d input%s, maps go to %s", len(items), "" if len(items) == 1 else "s", workdir)
    predictor = Predictor.open(
        config.bundle,
        **shardings(),
        **{field: config[field] for field in PREDICTOR_FIELDS},
    )
    results = predictor.predict_dir(config.inputs, workdir, progress=True, **options)
    written = [result for result in results if result.status == "written"]
    log.info(
        "%d maps written in %s, %d finished before",
        len(written),
        duration(sum(result.seconds for result in written)),
        len(results) - len(written),
    )


def _text(value: str | None) -> str | None:
    """A text field's value; the flag parser makes the word None of `--config.mask=None`."""
    return None if value in (None, "", "None") else value
