"""The part of an evaluation that runs on the device: no-data, z-scoring, the model, in one compiled function."""

from typing import Any

import jax
import numpy as np

from biomass_jax.data import bands
from biomass_jax.errors import EvaluationError
from biomass_jax.pipeline import augment as transforms

PRECISIONS = ("default", "high", "highest")
DTYPES = ("float32", "bfloat16")


class Forward:
    """Chips and labels in; predictions, the labels that count and no-data out.

    Args:
        bundle: a model of task `biomass`, its variables where `replicated` says.
        fill: the data set's.
        means: (bands,) digital numbers, in the order of the bundle's bands.
        stds: likewise.
        dtype: `float32` or `bfloat16` inside the model.
        matmul_precision: `default`, `high` or `highest`, for float32.
        keep_labels: score labels on no-data too, as the reference does.
        batch_sharding: where batches lie; None is the default device.
        replicated: where variables lie; None is the default device.

    Raises:
        EvaluationError: another task, a band that chips don't have, a wrong setting.
    """

    def __init__(
        self,
        bundle: Any,
        *,
        fill: float | None,
        means: np.ndarray,
        stds: np.ndarray,
        dtype: str = "float32",
        matmul_precision: str = "highest",
        keep_labels: bool = False,
        batch_sharding: Any = None,
        replicated: Any = None,
    ) -> None:
        if dtype not in DTYPES:
            raise EvaluationError(f"config.dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        if matmul_precision not in PRECISIONS:
            raise EvaluationError(
                f"config.matmul_precision is {matmul_precision!r}; expected one of {', '.join(PRECISIONS)}"
            )
        if bundle.task != "biomass":
            raise EvaluationError(f"{bundle.path}: a bundle of task {bundle.task!r}; scores need one of task 'biomass'")
        self._order = _band_order(bundle)
        self._model = bundle.module(dtype)
        self._variables = bundle.variables
        self._fill, self._means, self._stds, self._keep_labels = fill, means, stds, keep_labels
        # Less than full precision is the very point of bfloat16.
        self._precision = matmul_precision if dtype == "float32" else "default"
        self._sharding = batch_sharding
        shardings = (replicated, batch_sharding, batch_sharding)
        placed: dict[str, Any] = {} if batch_sharding is None else {"in_shardings": shardings}
        self._run = jax.jit(self._predict, **placed)

    @property
    def devices(self) -> int:
        """How many devices share a batch."""
        return 1 if self._sharding is None else self._sharding.num_devices

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`: what computes."""
        return jax.default_backend() if self._sharding is None else next(iter(self._sharding.device_set)).platform

    def __call__(self, image: np.ndarray, label: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Start the forward pass of a batch.

        Args:
            image: (B, H, W, 6) digital numbers as stored, bands as in `bands.BAND_NAMES`; `devices` divides B.
            label: (B, H, W) float32, -1 for none.

        Returns:
            predictions (B, H, W) float32, labels (B, H, W) float32 with -1 where there is no data, and bool (B, H, W),
            True there; all still being computed.
        """
        if self._sharding is not None:  # placed by hand: with several processes, jit takes no NumPy arrays to split
            image, label = jax.device_put((image, label), self._sharding)
        return self._run(self._variables, image, label)

    def _predict(self, variables: Any, image: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        cleaned, label, missing = transforms.clean(image, label, fill=self._fill, keep_labels=self._keep_labels)
        if self._order is not None:
            cleaned = cleaned[..., self._order]
        scored = transforms.normalize(cleaned, self._means, self._stds)
        with jax.default_matmul_precision(self._precision):
            prediction = self._model.apply(variables, scored)
        return prediction.astype(np.float32), label, missing


def _band_order(bundle: Any) -> np.ndarray | None:
    """Places of the bundle's bands among a chip's; None where they are the same."""
    unknown = [name for name in bundle.bands if name not in bands.BAND_NAMES]
    if unknown:
        raise EvaluationError(
            f"{bundle.path}: the model takes bands {', '.join(unknown)}; chips have {', '.join(bands.BAND_NAMES)}"
        )
    if tuple(bundle.bands) == bands.BAND_NAMES:
        return None
    return np.array([bands.BAND_NAMES.index(name) for name in bundle.bands])
