"""A bundle as one function of an image: what maps do with a pixel, from digital numbers to the bundle's own unit."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from biomass_jax.bundle import Bundle, software_versions
from biomass_jax.errors import ConvertError
from biomass_jax.pipeline.augment import no_data
from biomass_jax.portable.weights import PRECISIONS, compress, expand
from biomass_jax.prediction.forward import Forward

INPUT = "image"
STEP = 32  # px: a multiple of it is whole tokens in each of Swin-B's four stages


@dataclasses.dataclass(frozen=True)
class Program:
    """A model as a function, and what is to be known of it.

    Attributes:
        bands: of its input, in order.
        output: name of its output, the bundle's label.
        left_out: bands of the bundle's maps that it doesn't give.
        meta: texts that travel with it: `bundle.json`, and `export.json`, which says what input and output are.
    """

    bands: tuple[str, ...]
    output: str
    left_out: tuple[str, ...]
    meta: Mapping[str, str]
    _forward: Forward
    _stored: Mapping[str, Mapping[str, Any]]
    _fill: float
    _nodata: float

    def __call__(self, image: jax.Array) -> jax.Array:
        """The first band of the bundle's maps; to be traced.

        Args:
            image: [B, H, W, bands] float32 digital numbers, H and W multiples of `STEP`.

        Returns:
            [B, H, W] float32 in the bundle's unit, its no-data value where `no_data` says so of the image.
        """
        values = self._forward.compute((expand(self._stored), {}), image, self._fill)
        return jnp.where(no_data(image, self._fill), jnp.float32(self._nodata), values)


def of_bundle(bundle: Bundle, *, form: str, precision: str = "float32") -> Program:
    """The program of a bundle's model. Of an ensemble it is the mean of the members.

    Args:
        bundle: of task `biomass`.
        form: what it will be written as, for the record.
        precision: of the stored weights, one of `weights.PRECISIONS`; computing is float32 in any case.

    Raises:
        PredictionError: a bundle of another task.
        ConvertError: a precision that there isn't, or a model whose patches and stages don't fit `STEP`.
    """
    if precision not in PRECISIONS:
        raise ConvertError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    # By einsums: the kernel for GPUs is a program for one kind of card.
    forward = Forward(bundle, attention="einsum")
    module = bundle.module()
    if STEP % (module.patch_size * 2 ** (len(module.depths) - 1)):
        raise ConvertError(
            f"{bundle.path}: patches of {module.patch_size} px and {len(module.depths)} stages don't fit into "
            f"{STEP} px, of which sizes are multiples; expected those of Swin, 4 px and 4 stages"
        )
    label, *others = bundle.meta["output"]["bands"]
    source, output = bundle.meta["input"], bundle.meta["output"]
    record = {
        "format": form,
        "precision": precision,
        "input": {
            "name": INPUT,
            "dtype": "float32",
            "dimensions": ["batch", "height", "width", "band"],
            "bands": list(bundle.bands),
            "units": source.get("units"),
            "fill": bundle.fill,
            "pixel_size": bundle.pixel_size,
        },
        "output": {
            "name": label,
            "dtype": "float32",
            "dimensions": ["batch", "height", "width"],
            "units": output["units"],
            "nodata": bundle.nodata,
        },
        "weights_sha256": bundle.weights_sha256,
        "software": software_versions(),
    }
    return Program(
        bands=bundle.bands,
        output=label,
        left_out=tuple(others),
        meta={
            "bundle.json": (Path(bundle.path) / "bundle.json").read_text(encoding="utf-8"),
            "export.json": json.dumps(record, indent=2) + "\n",
        },
        _forward=forward,
        _stored=compress(bundle.variables, precision),
        _fill=np.nan if bundle.fill is None else float(bundle.fill),
        _nodata=float(bundle.nodata),
    )
