"""The part of a prediction that runs on the device: no-data, z-scoring, the model, all in one compiled function."""

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from biomass_jax.data.bands import FILL
from biomass_jax.errors import PredictionError

log = logging.getLogger(__name__)

# (variables, z-scored float32 (B, H, W, bands)) -> (B, H, W)
ModelFunction = Callable[[Any, jax.Array], jax.Array]
PRECISIONS = ("default", "high", "highest")
DTYPES = ("float32", "bfloat16")
# Images a core that a CPU computes at a time: with more of them what lies between two layers leaves its caches.
IMAGES_A_CORE = 2


def no_data(images: jax.Array, fill: jax.Array) -> jax.Array:
    """`bands.no_data` on the device.

    Args:
        images: (..., bands) digital numbers, integers or floats.
        fill: float32 scalar, the file's fill value, NaN where it has none; traced, so files don't recompile.

    Returns:
        bool (...), True where there is no data.
    """
    values = images.astype(jnp.float32)
    missing = (values == fill) | (values == FILL) | jnp.isnan(values)
    return jnp.any(missing, axis=-1) | jnp.all(values == 0, axis=-1)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Forward:
    """Digital numbers in, Mg/ha out; one program for each shape and type of batch, compiled ahead where asked.

    Batches are split over the devices of `batch_sharding` where their number divides the batch, and predicted whole on
    every device where it doesn't. The bundle's variables are first touched by the first call, so that they can be read
    from disk while `prepare` compiles.
    """

    def __init__(
        self,
        bundle: Any,
        *,
        dtype: str,
        matmul_precision: str,
        batch_sharding: Any,
        replicated: Any,
        model_fn: ModelFunction | None,
    ) -> None:
        if dtype not in DTYPES:
            raise PredictionError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        if matmul_precision not in PRECISIONS:
            raise PredictionError(f"matmul_precision is {matmul_precision!r}; expected one of {', '.join(PRECISIONS)}")
        self._bundle = bundle
        self._dtype = dtype
        # Less than full precision is the very point of bfloat16.
        self._precision = matmul_precision if dtype == "float32" else "default"
        self._batch_sharding = batch_sharding
        self._replicated = replicated
        self._stub = model_fn
        self._means = np.asarray(bundle.means, np.float32)
        self._stds = np.asarray(bundle.stds, np.float32)
        self._lock = threading.Lock()
        self._programs: dict[tuple[tuple[int, ...], str], Future[Any]] = {}
        self._variables: Any = None

    @property
    def devices(self) -> int:
        """How many devices share a batch."""
        return 1 if self._batch_sharding is None else self._batch_sharding.num_devices

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`: what computes."""
        if self._batch_sharding is None:
            return jax.default_backend()
        return next(iter(self._batch_sharding.device_set)).platform

    def prepare(self, shape: tuple[int, int, int, int], dtype: np.dtype) -> None:
        """Compile for batches of this shape and type in a thread; what goes wrong is raised by the first call."""
        future, mine = self._claim(shape, dtype)
        if mine:
            threading.Thread(target=self._compile_into, args=(future, shape, dtype), name="compiler").start()

    def wait(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """The compiled program for batches of this shape and type, once it and the variables are ready."""
        future, mine = self._claim(shape, dtype)
        if mine:
            self._compile_into(future, shape, dtype)
        program = future.result()
        if self._variables is None:
            self._variables = self._place(self._bundle.variables, self._replicated)
        return program

    def __call__(self, images: np.ndarray, fill: float | None) -> jax.Array:
        """Start the forward pass of a batch.

        Args:
            images: (B, H, W, bands) digital numbers, int16 or float32.
            fill: the file's fill value, None where it has none.

        Returns:
            (B, H, W) float32 Mg/ha, still being computed; pixels without data get a number too.
        """
        program = self.wait(images.shape, images.dtype)
        batch = self._place(images, self._sharding(len(images)))
        return program(self._variables, batch, self._place(_fill_scalar(fill), self._replicated))

    def _claim(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[Future[Any], bool]:
        """The program for a shape and type, and whether the caller is the one who has to compile it."""
        key = (tuple(shape), np.dtype(dtype).name)
        with self._lock:
            mine = key not in self._programs
            return self._programs.setdefault(key, Future()), mine

    def _compile_into(self, future: Future[Any], shape: tuple[int, ...], dtype: np.dtype) -> None:
        try:
            batch = jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding(shape[0]))
            fill = jax.ShapeDtypeStruct((), np.float32, sharding=self._replicated)
            future.set_result(jax.jit(self._run).lower(self._abstract_variables(), batch, fill).compile())
        except BaseException as error:
            future.set_exception(error)

    def _run(self, variables: Any, images: jax.Array, fill: jax.Array) -> jax.Array:
        """(B, H, W, bands) digital numbers -> (B, H, W) float32, on one CPU part by part where they come out even."""
        part = IMAGES_A_CORE * cores()
        if self.platform != "cpu" or self.devices > 1 or len(images) <= part or len(images) % part:
            return self._run_part(variables, images, fill)
        parts = images.reshape(-1, part, *images.shape[1:])
        return jax.lax.map(lambda some: self._run_part(variables, some, fill), parts).reshape(images.shape[:-1])

    def _run_part(self, variables: Any, images: jax.Array, fill: jax.Array) -> jax.Array:
        """(B, H, W, bands) digital numbers -> (B, H, W) float32; no-data pixels are 0 before z-scoring."""
        present = jnp.where(no_data(images, fill)[..., None], 0, images).astype(jnp.float32)
        with jax.default_matmul_precision(self._precision):
            return self._model()(variables, (present - self._means) / self._stds).astype(jnp.float32)

    def _model(self) -> ModelFunction:
        return self._stub or self._bundle.module(self._dtype).apply

    def _abstract_variables(self) -> Any:
        """Shapes of the variables without waiting for their values."""
        if self._stub is None:
            from biomass_jax.models.build import abstract_variables

            shapes = abstract_variables(self._bundle.module(self._dtype))
        else:
            shapes = self._bundle.variables
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._replicated), shapes)

    def _sharding(self, batch: int) -> Any:
        return self._batch_sharding if batch % self.devices == 0 else self._replicated

    @staticmethod
    def _place(tree: Any, sharding: Any) -> Any:
        return jax.device_put(tree) if sharding is None else jax.device_put(tree, sharding)


def _fill_scalar(fill: float | None) -> np.ndarray:
    return np.asarray(np.nan if fill is None else fill, np.float32)
