"""`config.mode = 'predict'`: maps of every input, in the workdir; several processes share the inputs."""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from biomass_jax.data.bands import parse_band_list
from biomass_jax.data.raster.inputs import InputItem, find_inputs
from biomass_jax.errors import PredictionError
from biomass_jax.prediction import maps
from biomass_jax.prediction.config import Predict
from biomass_jax.prediction.predictor import Predictor
from biomass_jax.runtime import processes
from biomass_jax.runtime.progress import duration
from biomass_jax.runtime.settings import check

log = logging.getLogger(__name__)

PREDICTOR_FIELDS = (
    *("batch_size", "tile", "stride", "margin", "blend", "tiling", "dtype", "matmul_precision", "attention"),
    *("uncertainty", "samples", "di", "biome", "outside", "base"),
    *("adapters", "adapter_field", "adapter_blend"),
)


def run(config: ConfigDict, workdir: Path, *, shardings: Callable[[], dict[str, Any]]) -> None:
    """Map `config.inputs` with `config.bundle` into `workdir`.

    Of n processes, number i maps every n-th input from the i-th on, in the order of their maps' names; each input has
    a map of its own, so the same maps are written by any number of them. They end together, and the first one sums up.

    Args:
        config: of configs/predict.py.
        workdir: where maps go.
        shardings: gives `Predictor`'s batch_sharding and replicated; called when the inputs are known to be there.

    Raises:
        ConfigError: a field holds what it can't.
        PredictionError: a field is missing, or some inputs failed, of whichever process (its message is the table).
        BundleError, RasterError, TilingError, BandError: see `Predictor`.
    """
    check(config, Predict)
    for field, what in (("bundle", "the model bundle's folder"), ("inputs", "the images to map")):
        if not config[field]:
            raise PredictionError(f"config.{field} is not given; add --config.{field}=PATH, {what}")
    options = map_options(config)
    items = find_inputs(config.inputs)
    log.info("%d input%s, maps go to %s", len(items), "" if len(items) == 1 else "s", workdir)
    predictor = open_predictor(config, shardings())
    mine = map_share(predictor, items[jax.process_index() :: jax.process_count()], workdir, options)
    shares = [Share(**json.loads(data)) for data in processes.gather(json.dumps(dataclasses.asdict(mine)).encode())]
    sum_up(shares, items)


def map_options(config: ConfigDict | Predict) -> dict[str, Any]:
    """The fields of `MapOptions` that a run's settings tell.

    Raises:
        BandError: the list of bands can't be read.
    """
    return {
        "bands": parse_band_list(config.bands),
        "encoding": config.encoding,
        "resample": config.resample,
        "mask": config.mask or None,
        "mask_keep": tuple(config.mask_keep),
        "allow_empty": config.allow_empty,
        "overwrite": config.overwrite,
        "quicklook": config.quicklook,
        "style": config.style,
        "stac": config.stac,
    }


def open_predictor(config: ConfigDict | Predict, shardings: dict[str, Any]) -> Predictor:
    """The predictor that a run's settings ask for; `shardings` are its batch_sharding and replicated.

    Raises:
        BundleError, TilingError, PredictionError: see `Predictor`.
    """
    settings = {field: getattr(config, field) for field in PREDICTOR_FIELDS}
    return Predictor.open(str(config.bundle), **shardings, **settings)


@dataclasses.dataclass
class Share:
    """What one process has done: maps written and its time, maps finished before, (input, reason) of each failure."""

    written: int = 0
    seconds: float = 0.0
    finished: int = 0
    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def map_share(predictor: Predictor, items: Sequence[InputItem], workdir: Path, options: dict[str, Any]) -> Share:
    """Map one process's share of the inputs; `options` are those of `Predictor.predict_dir`.

    Raises:
        BundleError, PredictionError: no input would fare better.
    """
    began = time.monotonic()
    results, failures = predictor.predict_items(items, workdir, progress=True, **options)
    written = sum(result.status == "written" for result in results)
    return Share(
        written,
        time.monotonic() - began if written else 0.0,
        len(results) - written,
        [(name, maps.reason(name, why)) for name, why in failures],
    )


def sum_up(shares: Sequence[Share], items: Sequence[InputItem]) -> None:
    """Say what all processes did.

    Raises:
        PredictionError: some inputs failed; the first process's message is the table of which and why.
    """
    failures = [failure for share in shares for failure in share.failures]
    if failures:
        places = {item.name: place for place, item in enumerate(items)}
        failures = sorted(failures, key=lambda failure: places.get(failure[0], len(items)))
        errors: list[tuple[str, Exception]] = [(name, PredictionError(why)) for name, why in failures]
        message = maps.failure_table(errors, len(items))
        if jax.process_index() > 0:  # one table is enough
            message = f"{len(errors)} of {len(items)} inputs failed; process 0 says which"
        raise PredictionError(message, failures=errors)
    log.info(
        "%d maps written in %s, %d finished before",
        sum(share.written for share in shares),
        duration(max(share.seconds for share in shares)),
        sum(share.finished for share in shares),
    )
