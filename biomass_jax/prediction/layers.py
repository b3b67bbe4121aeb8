"""What a map has of each pixel: the layers' names and units, and their values from what the model gives."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from biomass_jax.bundle import Bundle
from biomass_jax.data.raster.zonal import SD
from biomass_jax.errors import BundleError, PredictionError
from biomass_jax.uncertainty.calibration import Calibration
from biomass_jax.uncertainty.spread import WAYS, Spread, own_channels

AUTO = "auto"
CHOICES = (AUTO, *WAYS)
DI = "di"
KEEP = "keep"
OUTSIDE = (KEEP, "nodata")
ENDINGS = {"mean": "", "sd": SD, "lo": "_lo", "hi": "_hi"}


class Layers:
    """The layers of a bundle's maps.

    A calibrated bundle's are `agbd`, `agbd_sd`, `agbd_lo` and `agbd_hi`; of one that isn't, what the model gives. The
    label's name stands for `agbd`. `di`, the dissimilarity to the training chips, comes last.

    Args:
        bundle: a model.
        uncertainty: `auto`, the way that the bundle was calibrated for, else the model's own where it has one, else
            none; or one of `spread.WAYS`.
        samples: for `dropout` and `drop_path`; None for those of the calibration, else 10.
        di: whether to give it; None where the bundle has an area of applicability.
        biome: of all pixels, where the calibration knows some; "" for any.
        outside: what becomes of pixels whose dissimilarity is above the threshold, one of `OUTSIDE`.

    Attributes:
        spread: how the uncertainty comes about.
        calibration: what makes intervals of it, or None.
        di: whether the dissimilarity is given.
        threshold: of it, up to which a place is like the training chips; None where it isn't given.

    Raises:
        BundleError: a calibration that can't be read.
        PredictionError: another way than the bundle was calibrated for, a biome that the calibration doesn't know, or a
            dissimilarity to chips that the bundle knows nothing of.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        uncertainty: str = AUTO,
        samples: int | None = None,
        di: bool | None = None,
        biome: str = "",
        outside: str = KEEP,
    ) -> None:
        section = bundle.meta.get("uncertainty") or {}
        known = dict(section.get("spread") or {})
        if uncertainty == AUTO:
            uncertainty = known.get("way") or _own_way(bundle)
        self.spread = Spread(uncertainty, samples or known.get("samples", 10), known.get("seed", 0))
        told = section.get("calibration")
        try:
            self.calibration = Calibration.from_json(told) if told and uncertainty != "none" else None
        except BundleError as error:
            raise BundleError(f"{bundle.path}: {error}") from error
        if self.calibration is not None and self.spread.about() != known:
            raise PredictionError(
                f"{bundle.path}: its intervals were calibrated for {_words(known)}, asked for is "
                f"{_words(self.spread.about())}; leave uncertainty and samples out, or calibrate the bundle for that"
            )
        self.biome = biome
        known_biomes = sorted({group.biome for group in self.calibration.groups} - {""}) if self.calibration else []
        if biome and (self.calibration is None or biome not in known_biomes):
            theirs = "it is not calibrated" if self.calibration is None else ", ".join(known_biomes) or "none"
            raise PredictionError(f"{bundle.path}: biome is {biome!r}; the calibration knows of biomes: {theirs}")
        self.di = "applicability" in section if di is None else di
        if self.di and "applicability" not in section:
            raise PredictionError(
                f"{bundle.path}: di is asked for, but the bundle has no area of applicability; biomass-jax calibrate "
                "gives it one"
            )
        self.threshold: float | None = section["applicability"]["threshold"] if self.di else None
        if outside not in OUTSIDE:
            raise PredictionError(f"outside is {outside!r}; expected one of {', '.join(OUTSIDE)}")
        if outside != KEEP and not self.di:
            raise PredictionError(f"{bundle.path}: outside is {outside!r}, which takes the dissimilarity; add di")
        self._outside, self._nodata = outside, bundle.nodata
        self._label: str = bundle.meta["output"]["bands"][0]
        self._unit: str = bundle.meta["output"]["units"]

    def named(self, channels: tuple[str, ...]) -> dict[str, str]:
        """Name and unit of each layer, in order; `channels` are `Forward`'s."""
        given = [name for name in channels if name != DI] if self.calibration is None else list(ENDINGS)
        found = {f"{self._label}{ENDINGS[name]}": self._unit for name in given}
        return found | ({DI: "1"} if DI in channels else {})

    def finish(self, values: np.ndarray, channels: tuple[str, ...], biomes: np.ndarray | None = None) -> np.ndarray:
        """What the model gave of each pixel as what the map has of it.

        Args:
            values: float32 (...) of a mean alone, else (..., channels).
            channels: `Forward`'s.
            biomes: of each pixel (...), where they aren't all `biome`.

        Returns:
            float32 (...) of a single layer, else (..., layers). NaN stays NaN; with `outside` the bundle's no-data
            value where the model isn't applicable.
        """
        if len(channels) == 1:
            return values
        raw: Mapping[str, np.ndarray] = {name: values[..., number] for number, name in enumerate(channels)}
        if self.calibration is not None:
            sd, lo, hi = self.calibration.apply(raw, self.biome if biomes is None else biomes)
            more = [raw[DI]] if DI in channels else []
            values = np.stack([raw["mean"], sd, lo, hi, *more], axis=-1)
        if self._outside != KEEP and self.threshold is not None:
            values[raw[DI] > self.threshold] = self._nodata
        return values

    def settings(self) -> dict[str, Any]:
        """What a map's values depend on, beside the bundle; nothing of a map of biomass alone, as it always was."""
        found: dict[str, Any] = {}
        if self.spread.way != "none":
            found["uncertainty"] = self.spread.about()
        if self.di:
            found["di"] = True
        if self.biome:
            found["biome"] = self.biome
        if self._outside != KEEP:
            found["outside"] = self._outside
        return found

    def tags(self) -> dict[str, str]:
        """Of a map: the intervals' level, what they were calibrated on, where the model is applicable."""
        found = {}
        if self.calibration is not None:
            found["INTERVAL_LEVEL"] = f"{self.calibration.level:g}"
            found["CALIBRATION"] = json.dumps(self.calibration.to_json(), sort_keys=True)
        if self.threshold is not None:
            found["DI_THRESHOLD"] = f"{self.threshold:.9g}"
        return found


def _own_way(bundle: Bundle) -> str:
    return "none" if bundle.task != "biomass" or own_channels(bundle.module()) == ("mean",) else "model"


def _words(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in about.items()) or "nothing"
