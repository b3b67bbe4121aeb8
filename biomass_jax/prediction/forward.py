"""What of predictions and scores runs on the device: no-data, z-scores and the model, in one compiled function."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from biomass_jax.bundle import Bundle
from biomass_jax.errors import PredictionError
from biomass_jax.models.build import abstract_variables, in_compute_dtype
from biomass_jax.models.fused.choice import CHOICES, check_here
from biomass_jax.pipeline.augment import normalize, without_fill
from biomass_jax.runtime import cpu, mesh, numerics
from biomass_jax.uncertainty.applicability import dissimilarity, feature_stage, to_pixels
from biomass_jax.uncertainty.spread import ModelFunction, Spread, channels_of, with_spread

log = logging.getLogger(__name__)

PRECISIONS = ("default", "high", "highest")
DTYPES = ("float32", "bfloat16")


class Forward:
    """Digital numbers in, labels out, and how sure the model is of them; one program for each shape and type of batch.

    Batches are split over the devices of `batch_sharding` where their number divides the batch, and predicted whole on
    every device where it doesn't.

    Args:
        bundle: a model of task `biomass`, its variables where `replicated` says.
        dtype: `float32` or `bfloat16` inside the model.
        matmul_precision: `default`, `high` or `highest`, for float32.
        attention: `auto`, `einsum` or `fused`, see models/fused/choice.py.
        means: (bands,) digital numbers in the order of the bundle's bands; the bundle's own where None.
        stds: likewise.
        batch_sharding: where batches go; None is the default device.
        replicated: where the variables go; None is the default device.
        reference: set filled bands to 0 and not the whole pixel, see `augment.without_fill`.
        model_fn: another model, that gives a mean alone.
        spread: how the uncertainty comes about; None for none.
        di: give the dissimilarity to the training chips too, for which the bundle needs an area of applicability.

    Attributes:
        channels: what there is of a pixel: `mean`; `sd`, or `lo` and `hi` (in its unit, not calibrated); `di`.

    Raises:
        PredictionError: a bundle of another task, or a wrong setting.
        ConfigError: `attention` is `fused` where it can't be.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        dtype: str = "float32",
        matmul_precision: str = "highest",
        attention: str = "auto",
        means: np.ndarray | None = None,
        stds: np.ndarray | None = None,
        batch_sharding: jax.sharding.Sharding | None = None,
        replicated: jax.sharding.Sharding | None = None,
        reference: bool = False,
        model_fn: ModelFunction | None = None,
        spread: Spread | None = None,
        di: bool = False,
    ) -> None:
        for name, value, choices in (
            ("dtype", dtype, DTYPES),
            ("matmul_precision", matmul_precision, PRECISIONS),
            ("attention", attention, CHOICES),
        ):
            if value not in choices:
                raise PredictionError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
        if model_fn is None and bundle.task != "biomass":
            raise PredictionError(
                f"{bundle.path}: a bundle of task {bundle.task!r}; maps and scores need one of task 'biomass'"
            )
        check_here(attention, "attention")
        # Less than full precision is the very point of bfloat16.
        self._precision = matmul_precision if dtype == "float32" else "default"
        self._batch_sharding, self._replicated, self._reference = batch_sharding, replicated, reference
        module = None if model_fn else bundle.module(dtype, attention=attention)
        spread = spread or Spread()
        try:
            channels = channels_of(module, spread)
        except PredictionError as error:
            raise PredictionError(f"{bundle.path}: {error}") from error
        self.channels: tuple[str, ...] = (*channels, *(("di",) if di else ()))
        stage, self._stride = feature_stage(module.patch_size, len(module.depths)) if di and module else (None, 0)
        one_by_one = self.platform == "cpu" and self.devices == 1
        self._model = with_spread(module, spread, stub=model_fn, stage=stage, one_by_one=one_by_one)
        self._means = np.asarray(bundle.means if means is None else means, np.float32)
        self._stds = np.asarray(bundle.stds if stds is None else stds, np.float32)
        self._bundle = bundle
        self._variables: tuple[Any, Any] | None = None  # maps that are kept need no weights
        self._centres: dict[str, np.ndarray] = (bundle.applicability or {}) if di else {}
        self._stub, self._dtype = model_fn is not None, dtype
        self._run = jax.jit(mesh.traced_for(batch_sharding)(self._predict))
        self._programs: dict[tuple[tuple[int, ...], np.dtype], Future[jax.stages.Compiled]] = {}
        self._compiler = ThreadPoolExecutor(1, "compiler")

    @property
    def devices(self) -> int:
        """How many devices share a batch."""
        return 1 if self._batch_sharding is None else self._batch_sharding.num_devices

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`: what computes."""
        if self._batch_sharding is None:
            return jax.default_backend()
        device: jax.Device = next(iter(self._batch_sharding.device_set))
        return device.platform

    def batch_size(self, given: int | None, *, processes: int = 1) -> int:
        """Images a batch over all processes, which their devices can share.

        Args:
            given: as asked for, rounded up. None: 4 a device on CPU, where larger batches gain nothing and pad the last
                one with more; 32 a device elsewhere.
            processes: that share a batch.
        """
        shares = self.devices * processes
        if given is None:
            return (4 if self.platform == "cpu" else 32) * shares
        size = -(-given // shares) * shares
        if size != given:
            log.info("batch_size %d becomes %d: %d devices", given, size, shares)
        return size

    def prepare(self, shape: tuple[int, ...], dtype: np.dtype) -> Future[jax.stages.Compiled]:
        """Compile for batches of this shape and type in a thread, while the weights and the first image are read."""
        key = tuple(shape), np.dtype(dtype)
        if key not in self._programs:
            self._programs[key] = self._compiler.submit(self._compile, *key)
        return self._programs[key]

    def _compile(self, shape: tuple[int, ...], dtype: np.dtype) -> jax.stages.Compiled:
        def described(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._replicated)

        variables = self._bundle.variables
        if not self._stub:
            module = abstract_variables(self._bundle.module())
            variables = jax.eval_shape(lambda known: in_compute_dtype(known, self._dtype), module)
        batch = jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding(shape[0]))
        with numerics.fixed():
            known = jax.tree.map(described, (variables, self._centres))
            return self._run.lower(known, batch, described(np.float32(0))).compile()

    def _sharding(self, count: int) -> jax.sharding.Sharding | None:
        return self._batch_sharding if count % self.devices == 0 else self._replicated

    def __call__(self, images: np.ndarray, fill: float | None) -> jax.Array:
        """Start the forward pass of a batch.

        Args:
            images: (B, H, W, bands) digital numbers, int16 or float32, bands in the bundle's order.
            fill: the file's fill value, None where it has none.

        Returns:
            (B, H, W) float32 in the label's unit, or (B, H, W, channels) where there are more than the mean, still
            being computed; pixels without data get numbers too.
        """
        program = self.prepare(images.shape, images.dtype)
        if self._variables is None:
            variables = self._bundle.variables
            weights = variables if self._stub else in_compute_dtype(variables, self._dtype)
            self._variables = jax.device_put((weights, self._centres), self._replicated)
        batch = jax.device_put(images, self._sharding(len(images)))
        scalar = np.asarray(np.nan if fill is None else fill, np.float32)  # traced: files don't recompile
        return program.result()(self._variables, batch, jax.device_put(scalar, self._replicated))

    def _predict(self, variables: tuple[Any, Any], images: jax.Array, fill: jax.Array) -> jax.Array:
        """(B, H, W, bands) digital numbers -> float32, on one CPU part by part where they come out even."""
        part = cpu.images_at_once() if self.platform == "cpu" and self.devices == 1 else len(images)
        if len(images) <= part or len(images) % part:
            return self.compute(variables, images, fill)
        parts = images.reshape(-1, part, *images.shape[1:])
        found = jax.lax.map(lambda some: self.compute(variables, some, fill), parts)
        return found.reshape(len(images), *found.shape[2:])

    def compute(self, variables: tuple[Any, Any], images: jax.Array, fill: ArrayLike) -> jax.Array:
        """All that runs on the device, as a function to be traced; no-data pixels are 0 before z-scoring.

        Args:
            variables: the model's, with products' weights in the type of computing, and the arrays of the area of
                applicability, {} without `di`.
            images: (B, H, W, bands) digital numbers; sizes may be unknown (`jax.export`).
            fill: the file's fill value, NaN where it has none.

        Returns:
            float32 as `__call__` says.
        """
        present = without_fill(images, fill, reference=self._reference)
        with jax.default_matmul_precision(self._precision):
            values, features = self._model(variables[0], normalize(present, self._means, self._stds))
        values = values.astype(jnp.float32)
        if features is None:
            return values
        size = images.shape[1], images.shape[2]
        di = to_pixels(dissimilarity(variables[1], features), size, self._stride)
        return jnp.concatenate([values.reshape(*di.shape, -1), di[..., None]], axis=-1)
