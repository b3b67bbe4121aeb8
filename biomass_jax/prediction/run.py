"""`config.mode = 'predict'`: maps of every input, in the workdir; several processes share the inputs."""

import dataclasses
import glob
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from biomass_jax.data import processes, raster
from biomass_jax.data.bands import parse_band_list
from biomass_jax.prediction import maps
from biomass_jax.prediction.predictor import Predictor
from biomass_jax.prediction.progress import duration
from biomass_jax.prediction.stream import PredictionError

log = logging.getLogger(__name__)

PREDICTOR_FIELDS = ("batch_size", "tile", "stride", "margin", "blend", "tiling", "dtype", "matmul_precision")


def run(config: Any, workdir: Path, *, shardings: Callable[[], dict[str, Any]]) -> None:
    """Map `config.inputs` with `config.bundle` into `workdir`.

    Of n processes, number i maps every n-th input from the i-th on, in the order of their maps' names; each input has
    a map of its own, so the same maps are written by any number of them. They end together, and the first one sums up.

    Args:
        config: of configs/predict.py.
        workdir: where maps go.
        shardings: gives `Predictor`'s batch_sharding and replicated; called when the inputs are known to be there.

    Raises:
        PredictionError: a field is missing, or some inputs failed, of whichever process (its message is the table).
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
    if jax.process_count() == 1:
        mine = Share.of(predictor.predict_dir(config.inputs, workdir, progress=True, **options))
    else:
        mine = map_share(predictor, config.inputs, items, workdir, options, jax.process_index(), jax.process_count())
    shares = [Share(**json.loads(data)) for data in processes.gather(json.dumps(dataclasses.asdict(mine)).encode())]
    sum_up(shares, items)


@dataclasses.dataclass
class Share:
    """What one process has done: seconds of each map written, maps finished before, (input, reason) of each failure."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    finished: int = 0
    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, results: Sequence[maps.MapResult]) -> "Share":
        """Of maps without a failure."""
        written = [result.seconds for result in results if result.status == "written"]
        return cls(written, len(results) - len(written))

    def add(self, other: "Share") -> None:
        """Take another one's maps."""
        self.seconds += other.seconds
        self.finished += other.finished
        self.failures += other.failures


def map_share(
    predictor: Predictor,
    inputs: str,
    items: Sequence[raster.InputItem],
    workdir: Path,
    options: dict[str, Any],
    process_index: int,
    process_count: int,
) -> Share:
    """Map one process's share of the inputs; an input that fails doesn't stop the others.

    Args:
        predictor: with the settings of the run.
        inputs: what was asked for.
        items: what stands behind it.
        workdir: where the maps of all processes go.
        options: of `Predictor.predict_dir`.
        process_index: i.
        process_count: n.

    Raises:
        BundleError, PredictionError: no input would fare better.
    """
    done = Share()
    layer = predictor.bundle.meta["output"]["bands"][0]
    for item in items[process_index::process_count]:
        try:
            source = inputs if len(items) == 1 else address(item)
            path = maps.map_path(workdir, item.relative, layer)
            done.add(Share.of(predictor.predict_dir(source, path, progress=True, **options)))
        except raster.RasterError as error:  # gone since the inputs were found
            done.failures.append((item.name, maps.reason(item.name, error)))
        except PredictionError as error:
            if not error.failures:
                raise
            done.failures += [(name, maps.reason(name, why)) for name, why in error.failures]
    return done


def address(item: raster.InputItem) -> str:
    """The path or pattern that stands for just this one of several inputs."""
    if item.paths == (item.name,):
        return item.name
    return f"{glob.escape(item.name)}.B*{Path(item.paths[0]).suffix}"  # band files of a granule, perhaps among others


def sum_up(shares: Sequence[Share], items: Sequence[raster.InputItem]) -> None:
    """Say what all processes did.

    Raises:
        PredictionError: some inputs failed; the first process's message is the table of which and why.
    """
    whole = Share()
    for share in shares:
        whole.add(share)
    if whole.failures:
        places = {item.name: place for place, item in enumerate(items)}
        failures = sorted(whole.failures, key=lambda failure: places.get(failure[0], len(items)))
        errors: list[tuple[str, Exception]] = [(name, PredictionError(why)) for name, why in failures]
        message = maps.failure_table(errors, len(items))
        if jax.process_index() > 0:  # one table is enough
            message = f"{len(errors)} of {len(items)} inputs failed; process 0 says which"
        raise PredictionError(message, failures=errors)
    log.info(
        "%d maps written in %s, %d finished before",
        len(whole.seconds),
        duration(max(sum(share.seconds) for share in shares)),
        whole.finished,
    )


def _text(value: str | None) -> str | None:
    """A text field's value; the flag parser makes the word None of `--config.mask=None`."""
    return None if value in (None, "", "None") else value
