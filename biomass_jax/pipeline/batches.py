"""Batches for this process, in an order that depends on the seed alone; for a run, on the devices.

Process p of n gets rows [p B/n, (p + 1) B/n) of each global batch, in the order in which one process would read it, so
that neither the order nor a resumed run depends on how many processes there are. Threads read and decode ahead.
"""

import sys
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import grain  # type: ignore[import-untyped]
import jax
import jax.numpy as jnp
import numpy as np

from biomass_jax.data import records
from biomass_jax.data.sources import Chip, Source, chip_of
from biomass_jax.errors import DataError
from biomass_jax.runtime.mesh import DeviceMesh, batch_sharding

CACHES = ("host", "device")
_NO_CHIP = Chip("", "", "")
_PADDING = -1  # number of a row without a chip
_BATCHES_AHEAD = 2


class Batch(NamedTuple):
    """This process's rows of a global batch.

    Attributes:
        arrays: image (b, H, W, 6) int16 or float32 digital numbers, label (b, H, W) float32; of chips on the device
            `index` (b,) int32 instead; for evaluation also valid (b,) bool, False for padding (image 0, label -1,
            index -1).
        chips: of the rows.
    """

    arrays: dict[str, Any]
    chips: list[Chip]


class Batches(Iterator[Batch]):
    """Batches one after another, read ahead by threads."""

    def __init__(self, dataset: Any, start: int = 0) -> None:
        """Begin with global batch `start` of a Grain data set whose elements are batches."""
        self._held = [iter(dataset)]
        grain.experimental.set_next_index(self._held[0], start)
        # Grain's iterators fail noisily when the interpreter ends before they do.
        self._release = weakref.finalize(self, _release, self._held)

    def __next__(self) -> Batch:
        if not self._held:
            raise StopIteration
        try:
            return next(self._held[0])
        except BaseException:  # the end, or a chip that can't be read
            self.close()
            raise

    def close(self) -> None:
        """Stop reading ahead; there are no more batches then."""
        self._release()


def _release(held: list[Any]) -> None:
    while held:
        held.pop().close()


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """Whole global batches in an epoch.

    Raises:
        DataError: there is none.
    """
    chips = sum(seen for _, seen in source.shares)
    if chips < batch_size:
        raise DataError(
            f"{source.info.path}: split {source.info.split} has {chips} chips an epoch, expected at least the "
            f"batch_size {batch_size}; lower batch_size"
        )
    return chips // batch_size


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 8,
    start: int = 0,
    indices_only: bool = False,
) -> Batches:
    """Batches without end, in another order each epoch, every chip at most once an epoch.

    Args:
        source: chips.
        batch_size: B of the global batch.
        seed: of the order, 0 or more.
        process_index: p.
        process_count: n.
        threads: that read and decode.
        start: global batches that are already consumed.
        indices_only: chips are numbers instead of pixels, for DeviceCache.

    Returns:
        Batches. An epoch's last chips that fill no batch are left out, other ones in each epoch.

    Raises:
        DataError: fewer chips than a batch holds, or a batch that can't be split over the processes.
    """
    _check_split(batch_size, process_count)
    steps = steps_per_epoch(source, batch_size)
    order = _epoch(source, seed)[: steps * batch_size].repeat()
    dataset = _read_ahead(order, source, batch_size, process_index, process_count, threads, indices_only, False)
    return Batches(dataset, start)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 8,
    indices_only: bool = False,
) -> Batches:
    """Batches of each chip once, in the source's order; the last one is padded, which `valid` tells.

    Arguments as for `train_batches`.

    Raises:
        DataError: a batch that can't be split over the processes.
    """
    _check_split(batch_size, process_count)
    steps = -(-len(source) // batch_size)
    order = grain.MapDataset.range(steps * batch_size).map(lambda index: index if index < len(source) else _PADDING)
    dataset = _read_ahead(order, source, batch_size, process_index, process_count, threads, indices_only, True)
    return Batches(dataset)


def _check_split(batch_size: int, process_count: int) -> None:
    if batch_size < 1 or batch_size % process_count:
        raise DataError(f"batch_size {batch_size}: expected a multiple of the {process_count} processes, above 0")


def _epoch(source: Source, seed: int) -> Any:
    """The numbers of an epoch's chips; Grain shuffles anew in every repetition."""
    parts, first = [], 0
    for part, (chips, seen) in enumerate(source.shares):
        numbers = grain.MapDataset.range(first, first + chips)
        parts.append(numbers.shuffle(seed=_seed(seed, part))[:seen])
        first += chips
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.concatenate(parts).shuffle(seed=_seed(seed, len(parts)))


def _seed(seed: int, use: int) -> int:
    # Grain counts up from its seed with the epochs: neighbouring seeds of ours must lie far apart.
    return int(np.random.SeedSequence([seed, use]).generate_state(1)[0])


def _read_ahead(
    order: Any,
    source: Source,
    batch_size: int,
    process_index: int,
    process_count: int,
    threads: int,
    indices_only: bool,
    padded: bool,
) -> Any:
    """A Grain data set of this process's batches of an order of chips."""
    rows = batch_size // process_count

    def of_process(index: int) -> int:
        step, row = divmod(index, rows)
        return order[step * batch_size + process_index * rows + row]

    whole = len(order)  # sys.maxsize where it is repeated
    mine = grain.MapDataset.range(whole if whole == sys.maxsize else whole // process_count).map(of_process)
    if indices_only:
        collate = partial(_numbers, chips=source.chips(), padded=padded)
    else:
        mine = mine.map(lambda index: _Row(None if index == _PADDING else source[index]))
        collate = partial(_stack, source=source, padded=padded)
    # As many chips ahead as a batch has, and two batches stacked: the loop never waits for either.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * threads, rows))
    batches = mine.to_iter_dataset(options).batch(rows, batch_fn=collate)
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_BATCHES_AHEAD)


class _Row(NamedTuple):
    """A record, or None for padding; Grain would drop a bare None."""

    record: records.Record | None


def _stack(rows: Sequence[_Row], *, source: Source, padded: bool) -> Batch:
    info = source.info
    image = np.zeros((len(rows), *info.image_shape), info.image_dtype)
    label = np.full(image.shape[:3], records.NO_LABEL, np.float32)
    chips = []
    for number, (record,) in enumerate(rows):
        chips.append(_NO_CHIP if record is None else chip_of(record))
        if record is None:
            continue
        if record["image"].shape != info.image_shape:
            raise DataError(
                f"{info.path}: split {info.split}: chip {record['chip_id']!r}: found {record['image'].shape}, expected "
                f"{info.image_shape} as the others"
            )
        image[number], label[number] = record["image"], record["label"]
    arrays = {"image": image, "label": label}
    return Batch(arrays | {"valid": np.array([row.record is not None for row in rows])} if padded else arrays, chips)


def _numbers(rows: Sequence[int], *, chips: list[Chip], padded: bool) -> Batch:
    index = np.array(rows, np.int32)
    arrays = {"index": index} | ({"valid": index != _PADDING} if padded else {})
    return Batch(arrays, [_NO_CHIP if number == _PADDING else chips[number] for number in rows])


def place(arrays: dict[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, the rows split as `sharding` says."""
    return {name: jax.make_array_from_process_local_data(sharding, values) for name, values in arrays.items()}


class DeviceCache:
    """All chips of a source on the devices, read once; for one process.

    The chips are split over the devices, so that together they hold the source once.
    """

    def __init__(self, source: Source, sharding: jax.sharding.Sharding) -> None:
        """Read every chip; its batches' rows are split over the devices by `sharding`.

        Raises:
            DataError: a chip can't be read.
        """
        devices = len(sharding.device_set)
        rows = -(-len(source) // devices) * devices
        image = np.zeros((rows, *source.info.image_shape), source.info.image_dtype)
        label = np.full(image.shape[:3], records.NO_LABEL, np.float32)
        chips: list[Chip] = []
        for batch in eval_batches(source, batch_size=min(rows, 64)):
            valid = int(batch.arrays["valid"].sum())
            there = slice(len(chips), len(chips) + valid)
            image[there], label[there] = batch.arrays["image"][:valid], batch.arrays["label"][:valid]
            chips += batch.chips[:valid]
        source.remember(chips)
        self._arrays = place({"image": image, "label": label}, sharding)
        self._pick = jax.jit(_pick, out_shardings=sharding)

    def batch(self, indices: np.ndarray) -> dict[str, jax.Array]:
        """Image and label of chips by number (b,) int32, as a batch on the devices; -1 gives image 0, label -1."""
        return self._pick(self._arrays, np.asarray(indices, np.int32))


def _pick(arrays: dict[str, jax.Array], indices: jax.Array) -> dict[str, jax.Array]:
    fills = {"image": 0, "label": records.NO_LABEL}
    there = jnp.where(indices < 0, arrays["image"].shape[0], indices)  # a negative one would count from the end
    return {name: values.at[there].get(mode="fill", fill_value=fills[name]) for name, values in arrays.items()}


class Feed:
    """Training and validation batches of a run, on the devices."""

    def __init__(
        self, train: Source, valid: Source, mesh: DeviceMesh, *, batch_size: int, seed: int, threads: int, cache: str
    ) -> None:
        """Get ready to read; with `cache='device'`, read everything now.

        Args:
            train: training chips.
            valid: validation chips.
            mesh: of `runtime.mesh`.
            batch_size: chips a batch over all devices and processes.
            seed: of the order of training chips.
            threads: that read chips.
            cache: `host` reads as training proceeds, `device` keeps all chips on the devices (one process only).

        Raises:
            DataError: `device` with several processes.
        """
        if cache == "device" and jax.process_count() > 1:
            raise DataError(f"config.data.cache is 'device', and {jax.process_count()} processes run; it takes one")
        self._sources = {"train": train, "valid": valid}
        self._rows = batch_sharding(mesh)
        self._settings: dict[str, Any] = {
            "batch_size": batch_size,
            "threads": threads,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
            "indices_only": cache == "device",
        }
        self._seed = seed
        self._caches: dict[str, DeviceCache] = {}
        if cache == "device":
            self._caches = {name: DeviceCache(source, self._rows) for name, source in self._sources.items()}

    def batches(self, *, start: int) -> Iterator[Batch]:
        """Training batches from the global batch `start` on, without end."""
        found = train_batches(self._sources["train"], seed=self._seed, start=start, **self._settings)
        return self._place("train", found)

    def validation(self) -> Iterator[Batch]:
        """Validation batches; each chip once, the last batch padded, `valid` says where."""
        return self._place("valid", eval_batches(self._sources["valid"], **self._settings))

    def _place(self, name: str, batches: Iterator[Batch]) -> Iterator[Batch]:
        cache = self._caches.get(name)
        for batch in batches:
            arrays = dict(batch.arrays)
            chips = cache.batch(arrays.pop("index")) if cache else {}
            yield batch._replace(arrays=chips | place(arrays, self._rows))
