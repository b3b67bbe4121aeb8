"""Biomass, or another label, from labelled chips as a task of the loop."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from biomass_jax import figures
from biomass_jax.data import bands
from biomass_jax.data.labels import BIOMASS, Label
from biomass_jax.models.initialisation import draw_variables
from biomass_jax.pipeline import augment as transforms
from biomass_jax.tasks import losses, scores
from biomass_jax.tasks.base import Arrays, InputStatistics, first_chips, model_keys


@dataclasses.dataclass(frozen=True)
class Regression:
    """Biomass, or another label, from labelled chips.

    Attributes:
        module: `BiomassModel`.
        statistics: of the inputs.
        loss: one of `losses.CHOICES`, one of a spread exactly where the module has that spread.
        huber_delta: in the label's unit, where `huber` turns from square to linear.
        nll_beta: of `beta_nll`, whose `val/loss` is the likelihood without the weight: weighted ones of different
            scales can't be compared.
        spread_only: nothing but `head/spread` learns; the rest is as in a prediction, without dropout, drop path or new
            batch statistics. `pinball` has a term for the mean only where the mean learns.
        augment: arguments of `transforms.augment`.
        reference: as the reference does, keep labels on no-data pixels and the bands of those that aren't filled, and
            have as `val/loss` the batch-size-weighted mean of per-batch RMSEs instead of the loss over all pixels.
        label: what is learnt, for pictures.
    """

    module: Any
    statistics: InputStatistics
    loss: str = "rmse"
    huber_delta: float = 50.0
    nll_beta: float = 0.5
    spread_only: bool = False
    augment: tuple[tuple[str, Any], ...] = ()
    reference: bool = False
    label: Label = BIOMASS

    def init(self, key: jax.Array) -> Arrays:
        """See `Task`."""
        image = jax.ShapeDtypeStruct((1, 64, 64, self.module.in_channels), jnp.float32)
        variables = draw_variables(self.module, key, image)
        return {"params": variables["params"], "batch_stats": variables["batch_stats"]}

    def inputs(self, batch: Arrays, key: jax.Array) -> Arrays:
        """{"image": z-scored float32 [B, H, W, 6], "label": float32 [B, H, W] in its unit, -1 for none}."""
        image, label, _ = transforms.clean(
            batch["image"], batch["label"], fill=self.statistics.fill, reference=self.reference
        )
        image, label = transforms.augment(key, image, label, **dict(self.augment))
        return {"image": transforms.normalize(image, self.statistics.means, self.statistics.stds), "label": label}

    def loss_sums(self, variables: Arrays, inputs: Arrays, key: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        """See `Task`; sums over labelled pixels."""
        image, label = inputs["image"], inputs["label"]
        if self.spread_only:
            outputs, batch_stats = self._on_frozen_features(variables, image), variables["batch_stats"]
        else:
            outputs, updated = self.module.apply(
                variables, image, train=True, rngs=model_keys(key), mutable=["batch_stats"]
            )
            batch_stats = updated["batch_stats"]
        if self._has_spread:
            total, count = losses.spread_sums(outputs, label, self.loss, nll_beta=self.nll_beta, **self._pinball())
        else:
            total, count = losses.loss_sums(outputs, label, self.loss, huber_delta=self.huber_delta)
        return total, count, batch_stats

    @property
    def _has_spread(self) -> bool:
        return self.loss in losses.SPREAD_KINDS

    def _pinball(self) -> dict[str, Any]:
        """Arguments of the losses of a spread that `pinball` alone reads."""
        if self.loss != "pinball":
            return {}
        mean_scale = None if self.spread_only else self.module.spread_scale
        return {"quantile_levels": self.module.quantile_levels, "mean_scale": mean_scale}

    def _on_frozen_features(self, variables: Arrays, image: jax.Array) -> jax.Array:
        """The module's outputs, their gradient that of the last layers alone."""
        maps = self.module.apply(variables, image, method="encode")
        features = jax.lax.stop_gradient(self.module.apply(variables, maps, method="decode"))
        return self.module.apply(variables, features, image.shape[1:3], method="estimate")

    def finish(self, total: jax.Array, count: jax.Array) -> jax.Array:
        """See `Task`."""
        return losses.finish(total, count, self.loss)

    def evaluate(self, variables: Arrays, batch: Arrays, number: jax.Array) -> tuple[Arrays, Arrays]:
        """{"prediction", "label"}, float32 [B, H, W] in the label's unit; padded rows have no labels.

        Of a model with a spread, the mean is the prediction, and "spread" [B, H, W, C - 1] has its further outputs.
        """
        del number  # nothing is drawn
        image, label, nodata = transforms.clean(
            batch["image"], batch["label"], fill=self.statistics.fill, reference=self.reference
        )
        inputs = transforms.normalize(image, self.statistics.means, self.statistics.stds)
        outputs = {"prediction": self.module.apply(variables, inputs), "label": label}
        if self._has_spread:
            found = outputs["prediction"]
            outputs |= {"prediction": found[..., 0], "spread": found[..., 1:]}
        return outputs, first_chips(outputs | {"image": image, "nodata": nodata})

    def figure(self, shown: dict[str, np.ndarray], titles: Sequence[str]) -> Any:
        """RGB, prediction and footprints of some chips."""
        rgb = [bands.BAND_NAMES.index(name) for name in ("RED", "GREEN", "BLUE")]
        panels = []
        for i, title in enumerate(titles):
            nodata = shown["nodata"][i]
            image = np.where(nodata[..., None], np.nan, shown["image"][i][..., rgb])
            prediction = np.where(nodata, np.nan, shown["prediction"][i])
            panels.append(figures.ChipPanel(image, prediction, shown["label"][i], title))
        name, unit = ("AGB" if self.label == BIOMASS else self.label.name.upper()), self.label.unit
        return figures.chip_panels(panels, title="Validation chips", name=name, unit=unit)

    def scorer(self) -> "RegressionScorer":
        """See `Task`."""
        return RegressionScorer(self.loss, self.huber_delta, self.reference, self._pinball())


class RegressionScorer:
    """Exact scores over all labelled pixels of a split: float64 sums, and three of them a batch."""

    def __init__(
        self, loss: str, huber_delta: float, mean_of_batches: bool, pinball: dict[str, Any] | None = None
    ) -> None:
        self._loss, self._delta, self._mean_of_batches, self._pinball = (
            loss,
            huber_delta,
            mean_of_batches,
            pinball or {},
        )
        self._sums = scores.RegressionSums()
        self._batches: list[tuple[float, int, int]] = []  # total, labelled pixels, chips

    def add(self, outputs: dict[str, np.ndarray], valid: np.ndarray) -> None:
        """See `Scorer`."""
        prediction, label = outputs["prediction"][valid], outputs["label"][valid]
        self._sums.add(prediction, label)
        known = label >= 0
        prediction, target = prediction[known].astype(np.float64), label[known].astype(np.float64)
        if self._loss in losses.SPREAD_KINDS:
            found = np.concatenate([prediction[:, None], outputs["spread"][valid][known]], axis=-1)
            pixel = losses.spread_pixel_losses(found, target, self._loss, **self._pinball)
        else:
            pixel = losses.pixel_losses(np.abs(prediction - target), self._loss, self._delta)  # the root comes last
        self._batches.append((float(pixel.sum()), target.size, int(valid.sum())))

    def vector(self) -> np.ndarray:
        """See `Scorer`: the sums, then three numbers a batch."""
        return np.concatenate([self._sums.to_array(), np.asarray(self._batches, np.float64).ravel()])

    def results(self, vectors: list[np.ndarray]) -> dict[str, Any]:
        """`val/loss`, `val/rmse`, `val/mae`, `val/bias`, `val/r2`, `val/n`; None where no pixel has a label.

        All but the loss are of the mean.
        """
        sums, size = scores.RegressionSums(), scores.RegressionSums.SIZE
        for vector in vectors:
            sums.merge(scores.RegressionSums.from_array(vector[:size]))
        # Processes saw parts of the same batches.
        batches = np.sum([vector[size:].reshape(-1, 3) for vector in vectors], axis=0)
        if self._mean_of_batches:
            loss = scores.batch_weighted_rmse((total, int(n), int(chips)) for total, n, chips in batches)
        else:
            total, n, _ = batches.sum(axis=0)
            mean = total / n if n else 0.0
            loss = float(np.sqrt(mean) if self._loss == "rmse" else mean)
        return {"val/loss": loss} | {f"val/{name}": value for name, value in sums.results().items()}
