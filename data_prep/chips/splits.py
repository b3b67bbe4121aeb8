"""Chips to train, val and test by the ground they lie on, never by file.

`python -m data_prep splits --out OUT` draws the splits of `OUT/chips/chips.parquet` and writes them into it.
"""

import argparse
import dataclasses
import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biomass_jax.errors import PrepError
from biomass_jax.runtime.settings import add_options, options_of
from data_prep import ground
from data_prep.chips import index as chip_index
from data_prep.commands import alone_in, command
from data_prep.settings import SPLIT_KINDS, SPLITS, SplitSettings

DROPPED = "dropped"


def split_by_blocks(chips: Any, settings: SplitSettings) -> tuple[np.ndarray, dict[str, int]]:
    """Draw each chip's split.

    All chips of a block go to one split. Blocks are drawn in an order given by the seed, stratum by stratum, each to
    the split that lacks most chips. Then a chip that meets ground of a test chip leaves train and val, and one that
    meets a val chip leaves train: neighbouring tiles show the same ground.

    Args:
        chips: GeoDataFrame of the index: geometry (EPSG:4326), chip_id, tile and the column `stratify`.
        settings: of `kind`, `block` has equal-area blocks of edge `block_km`, `tile` takes a tile for a block, and
            `random` each chip by itself, as the reference (it leaks, and nothing is dropped). `buffer_m` says how far
            outlines are grown before they are compared; with 0, chips that only share an edge may lie in two splits.
            The values of the column `stratify` get the `fractions` each, as far as blocks allow.

    Returns:
        (n,) text `train`, `val`, `test` or `dropped`, and how many were dropped: `train_meets_test`,
        `train_meets_val`, `val_meets_test`.

    Raises:
        PrepError: a setting is none of those above.
    """
    kind, block_km, buffer_m = settings.kind, settings.block_km, settings.buffer_m
    fractions = dict(zip(SPLITS, settings.fractions, strict=False))
    if len(settings.fractions) != len(SPLITS) or min(fractions.values()) < 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise PrepError(
            f"fractions: found {settings.fractions}, expected shares from 0 on for {', '.join(SPLITS)} that add up to 1"
        )
    if kind not in SPLIT_KINDS:
        raise PrepError(f"kind: found {kind!r}, expected one of {', '.join(SPLIT_KINDS)}")
    if not (np.isfinite(buffer_m) and buffer_m >= 0):
        raise PrepError(f"buffer_m: found {buffer_m}, expected metres from 0 on")
    outlines = np.asarray(chips.geometry, object)
    strata = np.full(len(outlines), "all", object)
    if settings.stratify != "none":
        strata = _column(chips, settings.stratify)
    drawn = _draw(_block_names(chips, outlines, kind, block_km), strata, fractions, settings.seed)
    split, dropped = _without_shared_ground(drawn, outlines, buffer_m)
    if kind == "random":
        warnings.warn(
            f"a random split leaks: neighbours of train chips are tested, and {sum(dropped.values())} of {len(split)} "
            "chips share ground with one of another split. Its scores are too good; use kind block or tile",
            stacklevel=2,
        )
        return drawn, dict.fromkeys(dropped, 0)
    empty = [name for name in SPLITS if fractions[name] > 0 and not (split == name).any()]
    if empty:
        warnings.warn(
            f"no chip is left for {', '.join(empty)}: {len(split)} chips are too few for kind {kind} with block_km "
            f"{block_km:g} and buffer_m {buffer_m:g}; take smaller blocks or more tiles",
            stacklevel=2,
        )
    return split, dropped


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


def _column(chips: Any, name: str) -> np.ndarray:
    if name not in chips.columns:
        raise PrepError(f"stratify: found no column {name!r} in the index, expected one of {', '.join(chips.columns)}")
    return np.array([str(value) for value in chips[name]], object)


def _block_names(chips: object, outlines: np.ndarray, kind: str, block_km: float) -> np.ndarray:
    if kind == "block":
        lon, lat = ground.centres(outlines).T
        return ground.block_names(lon, lat, block_km)
    return _column(chips, "tile" if kind == "tile" else "chip_id")


def _draw(names: np.ndarray, strata: np.ndarray, fractions: Mapping[str, float], seed: int) -> np.ndarray:
    """The split of each chip: (n,) block names, (n,) strata -> (n,) split names."""
    chips_of = Counter(names)
    by_stratum: dict[str, list[str]] = {}
    members: dict[str, Counter[str]] = {}
    for name, stratum in zip(names, strata, strict=True):
        members.setdefault(name, Counter())[stratum] += 1
    for name, counts in members.items():  # a block belongs to the stratum of most of its chips
        by_stratum.setdefault(min(counts, key=lambda s: (-counts[s], s)), []).append(name)
    order: list[str] = []
    split_of: dict[str, str] = {}
    filled: Counter[str] = Counter()
    total = 0
    for stratum in sorted(by_stratum):
        # By hash, not by position: the order of two blocks stays when others are added.
        drawn = sorted(by_stratum[stratum], key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
        total += sum(chips_of[name] for name in drawn)
        for name in drawn:
            split = max(SPLITS, key=lambda s: fractions[s] * total - filled[s])
            split_of[name] = split
            filled[split] += chips_of[name]
        order += drawn
    _fill_empty(split_of, order, fractions)
    return np.array([split_of[name] for name in names], object)


def _fill_empty(split_of: dict[str, str], order: Sequence[str], fractions: Mapping[str, float]) -> None:
    """Give a split that got nothing one block of the split that has most, where that one has two."""
    for empty in SPLITS:
        counts = Counter(split_of.values())
        most = max(SPLITS, key=lambda s: counts[s])
        if fractions[empty] > 0 and not counts[empty] and counts[most] > 1:
            split_of[[name for name in order if split_of[name] == most][-1]] = empty


def label_histograms(chips: Any, split: np.ndarray) -> dict[str, list[int]]:
    """Labels of each split in the bins `chip_index.LABEL_EDGES`, summed over its chips' `label_counts`."""
    counts = np.array([np.asarray(one) for one in chips["label_counts"]], np.int64)
    counts = counts.reshape(len(split), len(chip_index.LABEL_EDGES))
    return {name: counts[split == name].sum(axis=0).tolist() for name in (*SPLITS, DROPPED)}


def _report(metadata: Mapping[str, Any], histograms: Mapping[str, Sequence[int]]) -> str:
    """The table that the command prints."""
    edges = [f"{edge:g}" for edge in chip_index.LABEL_EDGES]
    bins = [f"{low}-{high}" for low, high in zip(edges, [*edges[1:], ""], strict=True)]
    lines = [f"{'split':8} {'chips':>7} {'labels':>9}  labels by Mg/ha: " + " ".join(f"{text:>8}" for text in bins)]
    for name, counts in histograms.items():
        numbers = " ".join(f"{count:8d}" for count in counts)
        lines.append(f"{name:8} {metadata['counts'][name]:7d} {sum(counts):9d}  {'':17}{numbers}")
    gone = ", ".join(f"{number} {reason.replace('_', ' ')}" for reason, number in metadata["dropped"].items())
    return "\n".join([*lines, f"dropped for shared ground: {gone}"])


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
        the metadata written: kind, block_km, buffer_m, seed, fractions, stratify, counts, dropped, label_edges,
        label_histograms.
    """
    chips = chip_index.read_index(index)
    split, dropped = split_by_blocks(chips, settings)
    histograms = label_histograms(chips, split)
    found = Counter(split.tolist())
    metadata = {
        **as_metadata(settings),
        "counts": {name: found[name] for name in (*SPLITS, DROPPED)},
        "dropped": dropped,
        "label_edges": list(chip_index.LABEL_EDGES),
        "label_histograms": histograms,
    }
    chip_index.set_split(index, split.tolist(), metadata)
    print(_report(metadata, histograms))
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
