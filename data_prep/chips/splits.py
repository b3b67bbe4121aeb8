"""Chips to train, val and test by the ground they lie on, never by file.

`python -m data_prep splits --out OUT` draws the splits of `OUT/chips/chips.parquet` and writes them into it, and draws
`OUT/chips/splits.png`: where they lie, and how far test chips and the chips of a map are from those of training.
"""

import argparse
import dataclasses
import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from biomass_jax import figures
from biomass_jax.data.labels import Label
from biomass_jax.data.raster.grid import epsg_code, grid_of, open_quietly, raster_errors
from biomass_jax.errors import PrepError, name_list
from biomass_jax.runtime.settings import add_options, options_of
from data_prep import ground
from data_prep.chips import index as chip_index
from data_prep.commands import alone_in, command
from data_prep.settings import SPLIT_KINDS, SPLITS, SplitSettings

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

DROPPED = "dropped"
PICTURE = "splits.png"  # beside the index
_FIRST_SERVED = ("train", "test", "val")  # where blocks are too few for all


def split_by_blocks(chips: "GeoDataFrame", settings: SplitSettings) -> tuple[np.ndarray, dict[str, int]]:
    """Draw each chip's split.

    All chips of a block go to one split. Stratum by stratum, blocks are drawn in an order given by the seed, each to
    the split that lacks most chips there; of two blocks one goes to train and one to test, and with three or more no
    split goes without. With `folds` or `leave_out`, test is given, and the rest is drawn so between train and val. Then
    a chip that meets ground of a test chip leaves train and val, and one that meets a val chip leaves train:
    neighbouring tiles show the same ground. A warning says which strata a split has no chips of.

    Args:
        chips: GeoDataFrame of the index: geometry (EPSG:4326), chip_id, tile and the column `stratify`.
        settings: of `kind`, `block` has equal-area blocks of edge `block_km`, `tile` takes a tile for a block,
            `folds` deals the blocks to `folds` folds of which `fold` is test, and `random` takes each chip by itself,
            as the reference (it leaks, and nothing is dropped). `buffer_m` says how far outlines are grown before they
            are compared; with 0, chips that only share an edge may lie in two splits. The values of the column
            `stratify` get the `fractions` each, as far as blocks allow. `leave_out`, as `biome=taiga`, makes the
            chips of one value of a column test.

    Returns:
        (n,) text `train`, `val`, `test` or `dropped`, and how many were dropped: `train_meets_test`,
        `train_meets_val`, `val_meets_test`.

    Raises:
        PrepError: a setting is none of those above.
    """
    drawn, outlines = _drawn(chips, settings), np.asarray(chips.geometry, object)
    split, dropped = _without_shared_ground(drawn, outlines, settings.buffer_m)
    if settings.kind == "random":
        warnings.warn(
            f"a random split leaks: neighbours of train chips are tested, and {sum(dropped.values())} of {len(split)} "
            "chips share ground with one of another split, or lie closer than buffer_m. Its scores are too good; use "
            "kind block or tile",
            stacklevel=2,
        )
        split, dropped = drawn, dict.fromkeys(dropped, 0)
    wanted = _wanted(settings)
    empty = [name for name in wanted if not (split == name).any()]
    if empty:
        warnings.warn(
            f"no chip is left for {', '.join(empty)}: {len(split)} chips are too few for kind {settings.kind} with "
            f"block_km {settings.block_km:g} and buffer_m {settings.buffer_m:g}; take a smaller buffer_m, smaller "
            "blocks that are still larger than it, or more tiles",
            stacklevel=2,
        )
    _tell_strata(by_stratum(chips, split, settings), [name for name in wanted if name not in empty], settings)
    return split, dropped


def _drawn(chips: "GeoDataFrame", settings: SplitSettings) -> np.ndarray:
    """The split of each chip (n,) before any is dropped. PrepError as for `split_by_blocks`."""
    fractions = _checked(settings)
    outlines = np.asarray(chips.geometry, object)
    names = _block_names(chips, outlines, settings)
    strata = np.full(len(names), "all", object)
    if settings.stratify != "none":
        strata = _column(chips, settings.stratify, "stratify")
    if settings.leave_out:
        test = _left_out(chips, settings.leave_out)
    elif settings.kind == "folds":
        test = _folds(names, strata, settings.folds, settings.seed) == settings.fold
    else:
        return _draw(names, strata, fractions, settings.seed)
    rest = fractions["train"] + fractions["val"]
    if not rest > 0:
        raise PrepError(f"fractions: found {settings.fractions}, expected a share above 0 for train: test is given")
    shares = {"train": fractions["train"] / rest, "val": fractions["val"] / rest, "test": 0.0}
    split = np.full(len(names), "test", object)
    split[~test] = _draw(names[~test], strata[~test], shares, settings.seed)
    return split


def _checked(settings: SplitSettings) -> dict[str, float]:
    """The fractions by split. PrepError for settings that are wrong whatever the chips are."""
    fractions = dict(zip(SPLITS, settings.fractions, strict=False))
    if len(settings.fractions) != len(SPLITS) or min(fractions.values()) < 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise PrepError(
            f"fractions: found {settings.fractions}, expected shares from 0 on for {', '.join(SPLITS)} that add up to 1"
        )
    if settings.kind not in SPLIT_KINDS:
        raise PrepError(f"kind: found {settings.kind!r}, expected one of {', '.join(SPLIT_KINDS)}")
    if not (np.isfinite(settings.buffer_m) and settings.buffer_m >= 0):
        raise PrepError(f"buffer_m: found {settings.buffer_m}, expected metres from 0 on")
    if settings.kind == "folds" and not (settings.folds >= 2 and 0 <= settings.fold < settings.folds):
        raise PrepError(
            f"fold: found {settings.fold} of folds {settings.folds}, expected 2 folds or more, and one of them by its "
            "number from 0 on"
        )
    if settings.leave_out and settings.kind not in ("block", "tile"):
        raise PrepError(
            f"leave_out: found {settings.leave_out!r} with kind {settings.kind}, expected kind block or tile, by which "
            "the other chips go to train and val"
        )
    return fractions


def _wanted(settings: SplitSettings) -> list[str]:
    """The splits that get chips."""
    given = settings.leave_out or settings.kind == "folds"
    return [
        name for name, share in zip(SPLITS, settings.fractions, strict=False) if share > 0 or (given and name == "test")
    ]


def _left_out(chips: "GeoDataFrame", text: str) -> np.ndarray:
    """bool (n,): the chips of `COLUMN=VALUE`. PrepError where there are none."""
    name, equals, value = text.partition("=")
    if not equals:
        raise PrepError(f"leave_out: found {text!r}, expected COLUMN=VALUE, as biome=SLUG or tile=10SFF")
    values = _column(chips, name, "leave_out")
    if not (values == value).any():
        there = name_list(f"{one} ({number})" for one, number in sorted(Counter(values).items()))
        raise PrepError(f"leave_out: no chip of {name} {value!r}; found {there}")
    return values == value


def by_stratum(chips: "GeoDataFrame", split: np.ndarray, settings: SplitSettings) -> dict[str, dict[str, int]]:
    """Chips of each split and `dropped` by value of the column `stratify`; {} without one."""
    if settings.stratify == "none":
        return {}
    counts = Counter(zip(_column(chips, settings.stratify, "stratify"), split.tolist(), strict=True))
    values = sorted({value for value, _ in counts})
    return {value: {name: counts[value, name] for name in (*SPLITS, DROPPED)} for value in values}


def _tell_strata(counts: Mapping[str, Mapping[str, int]], wanted: Sequence[str], settings: SplitSettings) -> None:
    """A warning that names the strata which lack a split that others have."""
    if settings.leave_out:  # what is left out is for test alone, and nothing else is for test
        wanted = [name for name in wanted if name != "test"]
        held = settings.leave_out.removeprefix(f"{settings.stratify}=")
        counts = {value: found for value, found in counts.items() if value != held}
    lacking = {
        name: [f"{value} ({sum(found.values())})" for value, found in counts.items() if not found[name]]
        for name in wanted
    }
    told = [f"no {name} chips of {name_list(values)}" for name, values in lacking.items() if values]
    if len(counts) > 1 and told:
        warnings.warn(
            f"{settings.stratify} (and its chips): {'; '.join(told)}: too few blocks, or too close to those of another "
            "split; take smaller blocks, a smaller buffer_m or more tiles, or read scores of these with care",
            stacklevel=3,
        )


def _without_shared_ground(
    drawn: np.ndarray, outlines: np.ndarray, buffer_m: float
) -> tuple[np.ndarray, dict[str, int]]:
    """Drop chips that meet a test chip from train and val, then those that meet a val chip still there from train."""
    split = drawn.copy()
    dropped = {}
    for keeper, leaver in (("test", "train"), ("test", "val"), ("val", "train")):
        leavers = np.flatnonzero(split == leaver)
        met = leavers[ground.meets(outlines[leavers], outlines[split == keeper], buffer_m=buffer_m)]
        split[met] = DROPPED
        dropped[f"{leaver}_meets_{keeper}"] = len(met)
    return split, dropped


def _lost_to_buffer(chips: "GeoDataFrame", settings: SplitSettings, dropped: Mapping[str, int]) -> int:
    """How many of the chips dropped would stay with `buffer_m` 0."""
    if not (settings.buffer_m and sum(dropped.values())):
        return 0
    _, without = _without_shared_ground(_drawn(chips, settings), np.asarray(chips.geometry, object), 0.0)
    return sum(dropped.values()) - sum(without.values())


def _column(chips: "GeoDataFrame", name: str, setting: str) -> np.ndarray:
    if name not in chips.columns:
        raise PrepError(f"{setting}: found no column {name!r} in the index, expected one of {', '.join(chips.columns)}")
    return np.array([str(value) for value in chips[name]], object)


def _block_names(chips: "GeoDataFrame", outlines: np.ndarray, settings: SplitSettings) -> np.ndarray:
    if settings.kind in ("block", "folds"):
        lon, lat = ground.centres(outlines).T
        return ground.block_names(lon, lat, settings.block_km)
    return _column(chips, "tile" if settings.kind == "tile" else "chip_id", "kind")


def _blocks_by_stratum(names: np.ndarray, strata: np.ndarray, seed: int) -> dict[str, list[str]]:
    """Blocks of each stratum, that of most of a block's chips, in the order in which the seed draws them."""
    members: dict[str, Counter[str]] = {}
    for name, stratum in zip(names, strata, strict=True):
        members.setdefault(name, Counter())[stratum] += 1
    found: dict[str, list[str]] = {}
    for name in _in_order(members, seed):
        counts = members[name]
        found.setdefault(min(counts, key=lambda s: (-counts[s], s)), []).append(name)
    return dict(sorted(found.items()))


def _in_order(names: Iterable[str], seed: int) -> list[str]:
    """Blocks in the order in which they are drawn; by hash, so that of two blocks it stays when others are added."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())


def _draw(names: np.ndarray, strata: np.ndarray, fractions: Mapping[str, float], seed: int) -> np.ndarray:
    """The split of each chip: (n,) block names, (n,) strata -> (n,) split names."""
    chips_of = Counter(names)
    split_of: dict[str, str] = {}
    for blocks in _blocks_by_stratum(names, strata, seed).values():
        # Each stratum counts for itself: fractions that only hold over all leave some without test chips.
        total = sum(chips_of[name] for name in blocks)
        filled: Counter[str] = Counter()
        drawn = {}
        for name in blocks:
            drawn[name] = max(SPLITS, key=lambda s: fractions[s] * total - filled[s])
            filled[drawn[name]] += chips_of[name]
        _fill_empty(drawn, fractions)
        split_of |= drawn
    split_of = {name: split_of[name] for name in _in_order(split_of, seed)}
    _fill_empty(split_of, fractions)  # one of strata with a block each
    return np.array([split_of[name] for name in names], object)


def _fill_empty(split_of: dict[str, str], fractions: Mapping[str, float]) -> None:
    """Give a split that got nothing a block of the split that has most; a last one only of a split served after it."""
    for place, empty in enumerate(_FIRST_SERVED):
        counts = Counter(split_of.values())
        giver = max(SPLITS, key=lambda s: counts[s])
        if counts[giver] < 2:
            giver = next((s for s in reversed(_FIRST_SERVED[place:]) if counts[s]), empty)
        if fractions[empty] > 0 and not counts[empty] and giver != empty:
            split_of[[name for name, split in split_of.items() if split == giver][-1]] = empty


def _folds(names: np.ndarray, strata: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of each chip (n,), from 0 on: a block goes to the fold with fewest chips of its stratum, then of all.

    Raises:
        PrepError: fewer blocks than folds.
    """
    chips_of = Counter(names)
    if len(chips_of) < folds:
        raise PrepError(f"folds: found {len(chips_of)} blocks for {folds} folds; take fewer, or a smaller block_km")
    fold_of: dict[str, int] = {}
    filled = [0] * folds
    for blocks in _blocks_by_stratum(names, strata, seed).values():
        here = [0] * folds
        for name in blocks:
            fold = min(range(folds), key=lambda f: (here[f], filled[f]))
            fold_of[name] = fold
            here[fold] += chips_of[name]
            filled[fold] += chips_of[name]
    return np.array([fold_of[name] for name in names])


def chips_to_predict(index: Path, chips: "GeoDataFrame") -> np.ndarray:
    """Outlines (n,) of all cells of the index's composites, with labels or without: what a map of them consists of.

    Args:
        index: chips.parquet in its folder of prepared data. Of a composite that isn't there (any more), the cells in
            the index count, with a warning.
        chips: the index, as `chip_index.read_index` gives it.

    Raises:
        RasterError: a composite can't be opened.
    """
    root, about = index.absolute().parent.parent, chip_index.read_metadata(index).get("chips", {})
    size = int(about.get("size") or (chips["size"].iloc[0] if len(chips) else 0))
    found, lost = [np.empty(0, object)], []
    for name in sorted({*about.get("counts", {}), *chips["composite"]}):
        path = root / name
        if not path.is_file():
            lost.append(name)
            found.append(np.asarray(chips.geometry[chips["composite"] == name], object))
            continue
        with raster_errors(str(path)), open_quietly(str(path)) as source:
            grid = grid_of(source)
        rows, cols = (np.arange(0, side - size + 1, size) for side in (grid.height, grid.width))
        places = np.stack(np.meshgrid(rows, cols, indexing="ij"), -1).reshape(-1, 2)
        if len(places):
            epsg = epsg_code(grid.crs, str(path))
            found.append(ground.chip_outlines(epsg, tuple(grid.transform)[:6], places, size))
    if lost:
        warnings.warn(
            f"{name_list(lost)}: no such composite; of its cells those of the index count alone", stacklevel=2
        )
    return np.concatenate(found)


def _about_distances(test: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """Numbers and medians of distances to the nearest train chip (m); None without test, other or train chips."""

    def median(distances: np.ndarray) -> float | None:
        return round(float(np.median(distances)), 1) if len(distances) and np.isfinite(distances).all() else None

    return {
        "test_chips": len(test),
        "test_median_m": median(test),
        "test_touching": int((test == 0).sum()),
        "predicted_chips": len(predicted),
        "predicted_median_m": median(predicted),
    }


def _draw_picture(
    path: Path, outlines: Mapping[str, np.ndarray], test: np.ndarray, predicted: np.ndarray, settings: SplitSettings
) -> None:
    """The map and the histogram as PNG. PrepError where it can't be written."""
    rings = {
        name: [shapely.get_coordinates(part) for part in shapely.get_parts(found)] for name, found in outlines.items()
    }
    finite = [one / 1000 for one in (test, predicted) if np.isfinite(one).all()]
    distances = dict(zip(("test chips", "chips of the map"), finite, strict=False))
    picture = figures.chips_by_split(rings, distances, title=described(settings), buffer_km=settings.buffer_m / 1000)
    try:
        figures.save(path, picture, described(settings))
    except OSError as error:
        raise PrepError(f"{path}: can't write: {error}") from error


def described(settings: SplitSettings) -> str:
    """The split in words: `block of 50 km, buffer 10,000 m`."""
    block = f" of {settings.block_km:g} km" if settings.kind in ("block", "folds") else ""
    fold = f", fold {settings.fold} of {settings.folds}" if settings.kind == "folds" else ""
    left_out = f", {settings.leave_out} left out" if settings.leave_out else ""
    return f"{settings.kind}{block}{fold}{left_out}, buffer {settings.buffer_m:,.0f} m"


def label_histograms(chips: "GeoDataFrame", split: np.ndarray, label: Label) -> dict[str, list[int]]:
    """Labels of each split in the label's bins, summed over its chips' `label_counts`."""
    counts = np.array([np.asarray(one) for one in chips["label_counts"]], np.int64)
    counts = counts.reshape(len(split), len(label.edges))
    return {name: counts[split == name].sum(axis=0).tolist() for name in (*SPLITS, DROPPED)}


def _report(metadata: Mapping[str, Any], histograms: Mapping[str, Sequence[int]], label: Label) -> str:
    """The table that the command prints."""
    edges = [f"{edge:g}" for edge in label.edges]
    bins = [f"{low}-{high}" for low, high in zip(edges, [*edges[1:], ""], strict=True)]
    head = f"  labels by {label.unit}: "
    lines = [f"{'split':8} {'chips':>7} {'labels':>9}{head}" + " ".join(f"{text:>8}" for text in bins)]
    for name, counts in histograms.items():
        numbers = " ".join(f"{count:8d}" for count in counts)
        lines.append(f"{name:8} {metadata['counts'][name]:7d} {sum(counts):9d}{'':{len(head)}}{numbers}")
    gone = ", ".join(f"{number} {reason.replace('_', ' ')}" for reason, number in metadata["dropped"].items())
    lines.append(f"dropped for shared ground: {gone}")
    chips, lost = sum(metadata["counts"].values()), metadata["lost_to_buffer"]
    share = lost / max(chips, 1)
    lines.append(f"of these by buffer_m {metadata['buffer_m']:,.0f} alone: {lost} of {chips} chips ({share:.1%})")
    about = metadata["distances"]
    for what, name in (("test", "test chips"), ("predicted", "chips of a map")):
        median = about[f"{what}_median_m"]
        text = "none" if median is None else f"{median / 1000:.1f} km"
        lines.append(f"median distance of {about[f'{what}_chips']} {name} to the nearest train chip: {text}")
    lines.append(f"test chips that touch a train chip: {about['test_touching']}")
    return "\n".join(lines)


def as_metadata(settings: SplitSettings) -> dict[str, Any]:
    """The settings as the index holds them: fractions by split, None for no column to stratify by."""
    fractions = dict(zip(SPLITS, settings.fractions, strict=False))
    stratify = None if settings.stratify == "none" else settings.stratify
    return dataclasses.asdict(settings) | {"fractions": fractions, "stratify": stratify}


def run(index: Path, settings: SplitSettings) -> dict[str, Any]:
    """Draw the splits of an index and write them into it.

    Args:
        index: chips.parquet.
        settings: see `split_by_blocks`.

    Returns:
        the metadata written: the settings, counts, dropped, lost_to_buffer (those that `buffer_m` 0 would have left),
        strata (counts by value of `stratify`), distances to the nearest train chip (numbers and medians in m of test
        chips and of all cells of the composites, from edge to edge), label_edges, label_histograms.

    Raises:
        PrepError: see `split_by_blocks`; the picture can't be written.
        RasterError: a composite can't be opened.
    """
    chips = chip_index.read_index(index)
    split, dropped = split_by_blocks(chips, settings)
    label = chip_index.label_of(index)
    histograms = label_histograms(chips, split, label)
    found = Counter(split.tolist())
    geometry = np.asarray(chips.geometry, object)
    outlines = {name: geometry[split == name] for name in (*SPLITS, DROPPED)}
    cells = chips_to_predict(index, chips)
    test, predicted = (ground.nearest(some, outlines["train"]) for some in (outlines["test"], cells))
    metadata = {
        **as_metadata(settings),
        "counts": {name: found[name] for name in (*SPLITS, DROPPED)},
        "dropped": dropped,
        "lost_to_buffer": _lost_to_buffer(chips, settings, dropped),
        "strata": by_stratum(chips, split, settings),
        "distances": _about_distances(test, predicted),
        "label_edges": list(label.edges),
        "label_histograms": histograms,
    }
    others = cells[~np.isin(shapely.to_wkb(cells), shapely.to_wkb(geometry))]
    _draw_picture(index.with_name(PICTURE), {"": others, **outlines}, test, predicted, settings)
    chip_index.set_split(index, split.tolist(), metadata)
    print(_report(metadata, histograms, label))
    print(f"where they lie, and how far apart: {index.with_name(PICTURE)}")
    return metadata


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module."""
    parser = argparse.ArgumentParser(prog="python -m data_prep splits", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of prepared data; its chips/chips.parquet is used"
    )
    add_options(parser, SplitSettings)
    args = parser.parse_args(argv)
    with alone_in(args.out):
        run(chip_index.path_in(args.out), SplitSettings(**options_of(args, SplitSettings)))
    return 0
