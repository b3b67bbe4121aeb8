"""Batches on the devices, for a run: from the pipeline's threads, or from a data set that lies on the device."""

from collections.abc import Iterator
from typing import Any

import jax

from biomass_jax.data.sources import Source
from biomass_jax.errors import DataError
from biomass_jax.pipeline import batches as pipeline
from biomass_jax.runtime import mesh as sharding

CACHES = ("host", "device")


class Feed:
    """Training and validation batches of a run."""

    def __init__(
        self,
        train: Source,
        valid: Source,
        mesh: sharding.DeviceMesh,
        *,
        batch_size: int,
        seed: int,
        threads: int,
        cache: str,
    ) -> None:
        """Get ready to read; with `cache='device'`, read everything now.

        Args:
            train: training chips.
            valid: validation chips.
            mesh: of `runtime.mesh`.
            batch_size: chips a batch over all devices and processes.
            seed: of the order of training chips.
            threads: that read chips.
            cache: `host` reads as training proceeds, `device` keeps all chips on each device (one process only).

        Raises:
            DataError: an unknown cache, or `device` with several processes.
        """
        if cache not in CACHES:
            raise DataError(f"config.data.cache is {cache!r}; expected one of {', '.join(CACHES)}")
        if cache == "device" and jax.process_count() > 1:
            raise DataError(f"config.data.cache is 'device', and {jax.process_count()} processes run; it takes one")
        self._sources = {"train": train, "valid": valid}
        self._rows = sharding.batch_sharding(mesh)
        self._settings: dict[str, Any] = {
            "batch_size": batch_size,
            "threads": threads,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
            "indices_only": cache == "device",
        }
        self._seed = seed
        self._caches: dict[str, pipeline.DeviceCache] = {}
        if cache == "device":
            self._caches = {name: pipeline.DeviceCache(source, self._rows) for name, source in self._sources.items()}

    def batches(self, *, start: int) -> Iterator[pipeline.Batch]:
        """Training batches from the global batch `start` on, without end."""
        found = pipeline.train_batches(self._sources["train"], seed=self._seed, start=start, **self._settings)
        return self._place("train", found)

    def validation(self) -> Iterator[pipeline.Batch]:
        """Validation batches; each chip once, the last batch padded, `valid` says where."""
        return self._place("valid", pipeline.eval_batches(self._sources["valid"], **self._settings))

    def _place(self, name: str, batches: Iterator[pipeline.Batch]) -> Iterator[pipeline.Batch]:
        cache = self._caches.get(name)
        for batch in batches:
            arrays = dict(batch.arrays)
            chips = cache.batch(arrays.pop("index")) if cache else {}
            yield batch._replace(arrays=chips | pipeline.place(arrays, self._rows))
