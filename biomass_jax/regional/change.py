"""`biomass-jax change`: what two maps of the same ground tell of its change, and which of it is no chance.

The difference of two maps, after - before, has the variance

    sd_before^2 + sd_after^2 - 2 r sd_before sd_after,

where r is how far the errors of the two dates go together: one model sees the same slopes and the same trees twice, and
errs alike. r is what makes the differences on ground that has not changed as large as they are there.

- With a raster of stable ground the differences there have the mean `offset`, weighted by 1 / (sd_before^2 +
  sd_after^2), which is taken off everywhere, and r follows from their mean square.
- Without one most of the ground is taken for unchanged, and the middle of all differences tells r: a normal
  distribution cut off at its ends is fitted to it (the empirical null of Efron, Large-scale simultaneous hypothesis
  testing, 2004). A common change, such as growth, is not taken off.

**Which changes are significant.** z = (difference - offset) / sd, its two-sided p by the normal distribution. Of all
pixels those count whose p is small enough for a false discovery rate (Benjamini and Hochberg 1995): of the pixels
called changed, at most that share is by chance, on average, where errors of neighbours go together, too (Benjamini and
Yekutieli 2001). Patches smaller than the minimum mapping unit are left out afterwards.
"""

import argparse
import dataclasses
import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from biomass_jax.data.raster import stac
from biomass_jax.data.raster.cog import MapWriter
from biomass_jax.data.raster.grid import Grid
from biomass_jax.data.raster.resample import MaskSource
from biomass_jax.data.raster.warp import MapFile, map_file
from biomass_jax.data.raster.zonal import SD, SIGNIFICANT
from biomass_jax.errors import RegionalError
from biomass_jax.regional import estimators
from biomass_jax.regional.estimators import Correlation, Lattice, Shared
from biomass_jax.regional.significance import (
    STEP,
    central_variance,
    counted,
    least_significant,
    variance,
    without_small_patches,
)
from biomass_jax.regional.styles import write_style
from biomass_jax.runtime import environment
from biomass_jax.runtime.files import check_local
from biomass_jax.runtime.lock import writer_beside
from biomass_jax.runtime.settings import Range, add_options, checked, options_of, setting
from biomass_jax.version import __version__

NODATA = -9999.0
GUARDS = ("sensor", "season", "model")
_PIXELS = 2**21  # read at a time, in whole rows
_SEASON_DAYS = 16  # by which seasons may be shifted: one cycle of Landsat
_MOST_R = 0.99
_LEAST_STABLE = 100  # pixels of stable ground
_STEPS = 60_000  # of the histograms of |z|: 0 to 60
_TOLD = ("ERROR_RANGE_M", "ERROR_NUGGET", "ERROR_SILL", "OFFSET_SE")  # tags, for sums over zones
_REACH = 20_000.0  # metres: pairs of pixels further apart, or than half of the raster's side, tell no correlation
_PATCH = 16  # pixels along the side of the patches that tell how errors go together: whole ones, for near pairs
_TELLING = 50_000  # pixels in these patches, about


@dataclass(frozen=True)
class Change:
    """Settings of the command."""

    stable: str | None = setting(None, "raster whose classes tell what has not changed; most ground where not given")
    stable_keep: tuple[float, ...] = setting((), "its classes that are stable")
    fdr: float = setting(0.05, "false discovery rate", within=Range(0, 0.5, "(]"))
    min_area_ha: float = setting(0.5, "patches of change smaller than this are left out, ha", within=Range(0))
    allow: tuple[str, ...] = setting((), "differences between the maps to go on with: sensor, season, model")


@dataclass(frozen=True)
class Null:
    """What differences are where nothing has changed.

    Attributes:
        offset: Mg/ha, taken off.
        r: correlation of the two maps' errors.
        pixels: that told it.
        z_variance: of z there, which is 1 where r could be told and the maps' sds are right.
    """

    offset: float
    r: float
    pixels: int
    z_variance: float


@dataclass(frozen=True)
class Found:
    """What came of it.

    Attributes:
        path: of the raster.
        null: see `Null`.
        tested: pixels with values in both maps.
        errors: see `Shared`.
        loss: pixels of loss that were kept, and the mean of their difference.
        gain: likewise.
        pixel_ha: area of a pixel in the middle.
        unit: of the maps.
    """

    path: Path
    null: Null
    tested: int
    errors: Shared
    loss: tuple[int, float]
    gain: tuple[int, float]
    pixel_ha: float
    unit: str


class MapPair:
    """Two maps of the same ground: rows of their difference and of both sds."""

    def __init__(self, before: MapFile, after: MapFile, allow: Sequence[str]) -> None:
        """Check that they can be compared.

        Raises:
            RegionalError: they differ in more than the time, or their order is wrong.
        """
        self.before, self.after = before, after
        label = next(iter(before.layers))
        self.names = (label, f"{label}{SD}")
        for one in (before, after):
            if SIGNIFICANT in one.layers:
                raise RegionalError(f"{one.path}: a raster of change; expected a map of one date")
        for one in (before, after):
            if lost := [name for name in self.names if name not in one.layers]:
                raise RegionalError(
                    f"{one.path}: no band {lost[0]}, found {', '.join(one.layers)}; a change needs maps that tell how "
                    "sure they are: predict with a calibrated bundle"
                )
        _check(before, after, allow)

    @property
    def grid(self) -> Grid:
        """Of both."""
        return self.before.grid

    def blocks(self, halo: int = 0) -> Iterator[tuple[int, int, np.ndarray]]:
        """First row, last row + 1, and (3, rows, W): difference, and both sds; NaN where one map has none.

        With `halo`, so many rows more above and below, as far as there are.
        """
        height = max(_PIXELS // self.grid.width, 1)
        for start in range(0, self.grid.height, height):
            stop = min(start + height, self.grid.height)
            first, last = max(start - halo, 0), min(stop + halo, self.grid.height)
            window = (first, 0, last, self.grid.width)
            (one, in_one), (other, in_other) = (file.read(self.names, window) for file in (self.before, self.after))
            (mean_1, sd_1), (mean_2, sd_2) = one.astype(np.float64), other.astype(np.float64)
            values = np.stack([mean_2 - mean_1, sd_1, sd_2])
            values[:, ~(in_one & in_other & (sd_1**2 + sd_2**2 > 0))] = np.nan
            yield start, stop, values


def _check(before: MapFile, after: MapFile, allow: Sequence[str]) -> None:
    if unknown := sorted({*allow} - {*GUARDS}):
        raise RegionalError(f"allow is {unknown[0]!r}; expected of {', '.join(GUARDS)}")
    pair = f"{before.path} and {after.path}"
    if not before.grid.same_as(after.grid):
        raise RegionalError(
            f"{pair}: their grids differ: {before.grid.describe()}, and {after.grid.describe()}; bring both to one grid"
        )
    one, other = (next(iter(file.layers.values())) for file in (before, after))
    if one != other:
        raise RegionalError(f"{pair}: their units differ: {one!r} and {other!r}")
    for guard, tag in (("sensor", "SENSORS"), ("model", "MODEL_SHA256")):
        found = [one.tags.get(tag, "") for one in (before, after)]
        if found[0] != found[1] and guard not in allow:
            raise RegionalError(
                f"{pair}: they differ in their {guard} ({tag} is {found[0]!r} and {found[1]!r}), so that a difference "
                f"need not be a change; --allow {guard} takes it"
            )
    first, second = _season(before), _season(after)
    if first is None or second is None:
        if "season" not in allow:
            lost = before if first is None else after
            raise RegionalError(f"{lost.path}: no tag SEASON tells when it is of; --allow season takes it")
        return
    if first >= second:
        raise RegionalError(f"{pair}: the first is of {first[0]}, the second of {second[0]}; exchange them")
    if max(map(_apart, first, second)) > _SEASON_DAYS and "season" not in allow:
        told = " and ".join(f"{begin} to {end}" for begin, end in (first, second))
        raise RegionalError(
            f"{pair}: their seasons differ ({told}), so that a difference need not be a change; --allow season takes it"
        )


def _season(one: MapFile) -> tuple[date, date] | None:
    first, _, last = one.tags.get("SEASON", "").partition("/")
    try:
        return date.fromisoformat(first), date.fromisoformat(last)
    except ValueError:
        return None


def _apart(one: date, other: date) -> int:
    """Days between two dates if they were of one year."""
    days = abs(one.timetuple().tm_yday - other.timetuple().tm_yday)
    return min(days, 365 - days)


def null_of(pair: MapPair, stable: MaskSource | None) -> Null:
    """What differences are on stable ground, or where most of the ground is taken for stable.

    Raises:
        RegionalError: too few pixels tell it.
    """
    offset = 0.0 if stable is None else _offset(pair, stable)
    count, squares, product = 0, 0.0, 0.0
    histogram = np.zeros(2 * _STEPS, np.int64)
    for u, q in _scaled(pair, stable, offset):
        count, squares, product = count + len(u), squares + float((u**2).sum()), product + float(q.sum())
        histogram += counted(u + STEP * _STEPS, len(histogram))
    if count < _LEAST_STABLE:
        where = "values in both maps" if stable is None else f"values on the stable ground of {stable.name}"
        raise RegionalError(
            f"{pair.before.path} and {pair.after.path}: {count} pixels have {where}; expected {_LEAST_STABLE} or more "
            "to tell what differences are by chance"
        )
    spread = squares / count if stable else central_variance(histogram)
    r = float(np.clip((1 - spread) / (product / count), -1, _MOST_R))
    return Null(offset, r, count, spread / (1 - r * product / count))


def _offset(pair: MapPair, stable: MaskSource) -> float:
    """The mean difference on stable ground, Mg/ha; 0 where there is none."""
    weight = weighted = 0.0
    for start, stop, (d, sd_1, sd_2) in pair.blocks():
        known = np.isfinite(d) & stable.read_rows(start, stop)
        inverse = 1 / variance(sd_1[known], sd_2[known], 0.0)
        weight, weighted = weight + float(inverse.sum()), weighted + float((inverse * d[known]).sum())
    return weighted / weight if weight else 0.0


def _scaled(pair: MapPair, stable: MaskSource | None, offset: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each block's pixels: the difference over its sd if r were 0, and what r takes from the square of that sd."""
    for start, stop, (d, sd_1, sd_2) in pair.blocks():
        known = np.isfinite(d)
        if stable is not None:
            known &= stable.read_rows(start, stop)
        square = variance(sd_1[known], sd_2[known], 0.0)
        yield (d[known] - offset) / np.sqrt(square), 2 * sd_1[known] * sd_2[known] / square


def errors_of(pair: MapPair, stable: MaskSource | None, null: Null, threshold: float) -> Shared:
    """How errors go together over distance: on stable ground, or in pixels that haven't changed significantly.

    The variogram of z tells how the variance is shared, `null` how large it is: what the threshold cuts off, and small
    changes that it leaves, bear on the variogram's level first.
    """
    size, rng = pair.grid.pixel_size() or (1.0, 1.0), np.random.default_rng(0)
    shape = pair.grid.height, pair.grid.width
    drawn = rng.random([side // _PATCH + 1 for side in shape]) < _TELLING / null.pixels
    lattice, weight, places, values = Lattice(size[::-1], shape), 0.0, [], []
    for start, stop, block in pair.blocks():
        z = _z(block, null)
        told = np.abs(z) < threshold
        if stable is not None:
            told = np.isfinite(z) & stable.read_rows(start, stop)
        row, column = np.nonzero(told)
        at = np.column_stack([row + start, column])
        mine = drawn[tuple(at.T // _PATCH)]
        places.append(at[mine] * size[::-1])
        values.append(z[told][mine])
        if stable is not None:
            _, sd_1, sd_2 = block[:, told]
            inverse = 1 / variance(sd_1, sd_2, 0.0)
            lattice.add(at[:, 0], at[:, 1], inverse * np.sqrt(variance(sd_1, sd_2, null.r)))
            weight += float(inverse.sum())
    reach = min(_REACH, max(np.multiply(shape, size[::-1])) / 2)
    at, z = np.concatenate(places), np.concatenate(values)
    correlation = estimators.shares_of(at, z, null.z_variance, nearest=1.5 * max(size), reach=reach)
    offset_se = math.sqrt(lattice.variance(correlation)) / weight if correlation is not None and weight else 0.0
    return Shared(correlation, offset_se, threshold)


def change(
    before: str | os.PathLike[str],
    after: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    command: str = "biomass_jax.regional.change.change",
    **settings: object,
) -> Found:
    """Write the raster of change, with its STAC item and its colours for QGIS beside it.

    Its bands are the difference and its sd, both in the maps' unit, and `significant`: -1 for loss, 1 for gain, 0 for
    neither. Memory is bounded by some million pixels, or some rows of a wide raster, more for a large `min_area_ha`.

    Args:
        before: the earlier map, with the band `agbd_sd`.
        after: the later one.
        out: the raster to write.
        command: for its tags.
        **settings: fields of `Change`.

    Raises:
        ConfigError: a setting can't be.
        RasterError: a file can't be read or written.
        RegionalError: the maps can't be compared.
    """
    chosen = checked(Change, settings)
    if chosen.stable is None and chosen.stable_keep:
        raise RegionalError("stable_keep is given without stable; give the raster of classes, too")
    pair = MapPair(map_file(before), map_file(after), chosen.allow)
    with ExitStack() as stack:
        stable = None
        if chosen.stable is not None:
            stable = stack.enter_context(MaskSource(chosen.stable, pair.grid, chosen.stable_keep))
        null = null_of(pair, stable)
        histogram = _histogram(pair, null)
        errors = errors_of(pair, stable, null, threshold := least_significant(histogram, chosen.fdr))
        pixel_ha = math.prod(pair.grid.pixel_size() or (0.0,)) / 1e4
        least = max(math.ceil(chosen.min_area_ha / pixel_ha - 1e-6), 1)
        sums = {sign: [0, 0.0] for sign in (-1, 1)}
        label, unit = next(iter(pair.before.layers.items()))
        layers = {f"{label}_change": unit, f"{label}_change_sd": unit, SIGNIFICANT: "1"}
        tags = _tags(pair, chosen, null, errors, command)
        with MapWriter(out, pair.grid, nodata=NODATA, layers=layers, tags=tags) as writer:
            for start, stop, values in pair.blocks(halo=least):
                z = _z(values, null)
                kept = without_small_patches(np.where(np.abs(z) >= threshold, np.sign(z), 0), least)
                inner = slice(top := min(start, least), top + stop - start)
                (d, sd_1, sd_2), kept = values[:, inner], kept[inner]
                rows = np.stack([d - null.offset, np.sqrt(variance(sd_1, sd_2, null.r)), kept], axis=-1)
                rows[~np.isfinite(d)] = NODATA
                for sign, sum_of in sums.items():
                    sum_of[0] += int((kept == sign).sum())
                    sum_of[1] += float((d - null.offset)[kept == sign].sum())
                writer.write_rows(start, rows)
            stac.remove_item(Path(out))  # of the raster that this one replaces
    write_style(Path(out), f"{label}_change", unit, change=True)
    stac.write_item(Path(out), os.fspath(before), os.fspath(after))
    loss, gain = ((int(count), total / max(count, 1)) for count, total in sums.values())
    return Found(Path(out), null, int(histogram.sum()), errors, loss, gain, pixel_ha, unit)


def _histogram(pair: MapPair, null: Null) -> np.ndarray:
    """How many |z| lie in each step from 0 on."""
    histogram = np.zeros(_STEPS, np.int64)
    for _, _, values in pair.blocks():
        histogram += counted(np.abs(z := _z(values, null))[np.isfinite(z)], _STEPS)
    return histogram


def _z(values: np.ndarray, null: Null) -> np.ndarray:
    d, sd_1, sd_2 = values
    return (d - null.offset) / np.sqrt(variance(sd_1, sd_2, null.r))


def _tags(pair: MapPair, settings: Change, null: Null, errors: Shared, command: str) -> dict[str, str]:
    both = {"SEASON", "SENSORS", "MODEL_SHA256"}
    tags = {f"{name}_BEFORE": text for name, text in pair.before.tags.items() if name in both}
    tags |= {f"{name}_AFTER": text for name, text in pair.after.tags.items() if name in both}
    tags |= {"BEFORE": Path(pair.before.path).name, "AFTER": Path(pair.after.path).name, "COMMAND": command}
    tags["SOFTWARE"] = f"biomass_jax {__version__}"
    tags |= {"OFFSET": repr(null.offset), "ERROR_CORRELATION": repr(null.r), "Z_THRESHOLD": repr(errors.threshold)}
    if errors.correlation is not None:
        told = (errors.correlation.range_m, errors.correlation.nugget, errors.correlation.sill, errors.offset_se)
        tags |= {name: repr(value) for name, value in zip(_TOLD, told, strict=True)}
    tags |= {name.upper(): str(value) for name, value in dataclasses.asdict(settings).items()}
    return tags


def told_by(path: str, tags: Mapping[str, str]) -> Shared:
    """What the tags of a raster of change say, as `change` has written them.

    Raises:
        RegionalError: a tag is missing or no number; those of the correlation may be missing together.
    """
    found = {}
    for name in ("Z_THRESHOLD", *(_TOLD if {*_TOLD} & {*tags} else ())):
        try:
            found[name] = float(tags[name])
        except (KeyError, ValueError) as error:
            raise RegionalError(
                f"{path}: tag {name} is {tags.get(name)!r}; expected a number, as biomass-jax change writes it; make "
                "the raster of change anew"
            ) from error
    if len(found) == 1:
        return Shared(threshold=found["Z_THRESHOLD"])
    reach, nugget, sill, offset_se = (found[name] for name in _TOLD)
    return Shared(Correlation(reach, nugget, sill), offset_se, found["Z_THRESHOLD"])


def _lines(found: Found, stable: str | None) -> list[str]:
    null = found.null
    where = "all" if stable is None else f"those of {stable}, where the maps differ by {null.offset:+.2f}, taken off"
    said = [f"errors of the two maps go together: correlation {null.r:.2f}, by {null.pixels:,} pixels ({where})"]
    if not 0.8 <= null.z_variance <= 1.25:
        said.append(
            f"warning: the maps' standard deviations don't fit: on stable ground the variance of z is "
            f"{null.z_variance:.2f}, not 1"
        )
    if found.errors.correlation is not None:
        said.append(estimators.about(found.errors.correlation))
    for name, (count, mean) in (("loss", found.loss), ("gain", found.gain)):
        about = f", {count * found.pixel_ha:,.1f} ha, {mean:+.1f} {found.unit} on average" if count else ""
        said.append(f"{name}: {count:,} of {found.tested:,} pixels{about}")
    return [*said, f"{found.path}: the change"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m biomass_jax.regional.change",
        description="The difference of two maps of the same ground, how sure it is, and where it is no chance.",
        allow_abbrev=False,
    )
    parser.add_argument("--before", required=True, metavar="MAP", help="the earlier map, with its standard deviation")
    parser.add_argument("--after", required=True, metavar="MAP", help="the later one")
    parser.add_argument("--out", required=True, metavar="FILE", help="the raster of change to write")
    add_options(parser, Change)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(words)
    try:
        environment.settle(jax=False)
        check_local(args.out, "--out")
        with writer_beside(Path(args.out)):
            command = shlex.join(["biomass-jax", "change", *words])
            found = change(args.before, args.after, args.out, command=command, **options_of(args, Change))
    except Exception as error:
        return environment.failed(error)
    print("\n".join(_lines(found, args.stable)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
