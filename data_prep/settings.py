"""The settings of data preparation: configs/prepare.py and the steps' command lines follow from them."""

import dataclasses
from typing import Literal

from biomass_jax.data import records
from biomass_jax.runtime.settings import Range, Typed, group, setting

SPLITS = ("train", "val", "test")
SPLIT_KINDS = ("block", "tile", "folds", "random")


@dataclasses.dataclass(frozen=True)
class Granules(Typed):
    """Where granules come from."""

    hls: str = setting("", "folder of HLS granules' folders; OUT/granules/hls where empty")
    gedi: str = setting("", "folder of GEDI L4A files (of L2A for heights); OUT/granules/gedi where empty")
    download: bool = setting(False, "get what the tiles need from NASA's archives first")
    max_cloud: float = setting(100.0, "percent of a scene that is downloaded")


@dataclasses.dataclass(frozen=True)
class CompositeSettings(Typed):
    """Which observations make a composite."""

    sensors: tuple[str, ...] = setting(("L30",), "and, or instead, S30")
    statistic: str = setting("mean", "mean, median", choices=("mean", "median"))
    # Of one or two clear scenes a missed cloud or shadow is the whole value or half of it.
    min_clear: int = setting(3, "fewest clear scenes of a pixel; 1 is the reference's way")
    drop_water: bool = setting(False, "leave out water (Fmask bit 5)")
    drop_high_aerosol: bool = setting(False, "leave out high aerosol (Fmask bits 7-6)")
    encoding: str = setting(
        "auto",
        "what the granules' numbers are where they aren't as HLS writes them, one of those of predictions",
        choices="biomass_jax.data.raster.encoding:ENCODINGS",
    )


@dataclasses.dataclass(frozen=True)
class Filters(Typed):
    """Which GEDI shots are kept; the defaults are the recommended ones, whose sources docs/data.md names."""

    algorithm_run_flag: bool = setting(True, "want 1")
    l4_quality_flag: bool = setting(True, "want 1 (version 3: l2a_quality_flag_rel3 too)")
    outlier_flag: bool = setting(True, "version 3 alone: want elev_highestreturn_outlier_flag 0")
    agbd_valid: bool = setting(True, "finite and >= 0; 0.0 is a clipped prediction, no fill")
    # Version 3 has degrade_include_flag instead, wanted 1 unless both are empty.
    degrade_tens: tuple[int, ...] = setting((0, 1, 2, 3, 4, 6), "digits of degrade_flag that are admitted, or 'all'")
    degrade_ones: tuple[int, ...] = setting((0, 3, 8), "likewise")
    algorithm_10: Literal["auto", "drop", "keep"] = setting(
        "auto", "auto: drop it in release 002_01, where its agbd is wrong", choices=("auto", "drop", "keep")
    )
    leaf_off_flag: bool = setting(True, "want anything but 1; 255 is not applicable (evergreen, grass)")
    water_persistence_below: float | None = setting(
        10.0,
        "percent of Landsat's observations that saw water (land_cover_data/landsat_water_persistence); 0: no filter",
    )
    urban_proportion_below: float | None = setting(
        50.0, "percent of built-up land around the shot (land_cover_data/urban_proportion); 0: no filter"
    )
    sensitivity_min: float | None = setting(0.95, "least sensitivity; 0: no filter")
    sensitivity_min_tropical_evergreen: float | None = setting(
        0.98, "the same of evergreen broadleaf forest (pft_class 2) between 23.5 S and 23.5 N; 0: no filter"
    )
    full_power_only: bool = setting(False, "no coverage beams")
    night_only: bool = setting(False, "want the sun below the horizon")
    max_relative_se: float | None = setting(
        None, "greatest agbd_se / agbd; agbd_se is nearly constant, so this removes low biomass, not bad shots"
    )
    max_agbd: float | None = setting(None, "greatest agbd, Mg/ha")
    # Of heights (GEDI L2A, labels.label rh98); of the fields above these leave algorithm_run_flag, l4_quality_flag,
    # outlier_flag, algorithm_10 and all that name agbd or se without a use.
    quality_flag: bool = setting(True, "heights alone: want 1 (version 3: l2a_quality_flag_rel3)")
    surface_flag: bool = setting(True, "heights alone: want 1, the ground within 300 m of a digital elevation model's")
    rh_valid: bool = setting(True, "heights alone: finite and >= 0")
    # A DEM of radar sees the canopy: a narrower bar would drop the tallest forests first.
    dem_difference_below: float | None = setting(
        100.0, "heights alone: metres between elev_lowestmode and digital_elevation_model; 0: no filter"
    )
    max_rh: float | None = setting(150.0, "heights alone: greatest height, metres; 0: no filter")


@dataclasses.dataclass(frozen=True)
class GediSettings(Filters):
    """Which GEDI shots are kept, and where."""

    box: tuple[float, ...] = setting((), "(west, south, east, north) in degrees; whole orbits where empty")


@dataclasses.dataclass(frozen=True)
class LabelSettings(Typed):
    """What the labels are, and to which tile a shot belongs."""

    shot_owner: str = setting(
        "nearest",
        "a shot in several tiles belongs to the one whose centre is nearest, or to all as in the reference",
        choices=("nearest", "all"),
    )
    label: str = setting(
        "agbd", "agbd, biomass of GEDI L4A; or rh98, a relative height of GEDI L2A in metres, of rh0 to rh100"
    )


@dataclasses.dataclass(frozen=True)
class ChipSettings(Typed):
    """Which cells of a tile's grid become chips."""

    size: int = setting(records.CHIP_SIZE, "pixels along a chip's side")
    min_labels: int = setting(20, "fewest labels of a chip")
    max_nodata: float = setting(0.05, "largest share of pixels without data")
    encoding: str = setting(
        "auto",
        "digital_numbers takes composites as they are, whatever they look like",
        choices=("auto", "digital_numbers"),
    )
    label_max: float = setting(2000.0, "highest label there may be, in its unit; of heights never above 150 m")
    biomes: str = setting("", "polygon file that names biomes")
    biome_field: str = setting("", "its column with the name")


@dataclasses.dataclass(frozen=True)
class SplitSettings(Typed):
    """How chips go to splits."""

    kind: str = setting(
        "block",
        "what goes to one split as a whole: block, tile, random; folds: blocks, each in test in one of so many runs",
        choices=SPLIT_KINDS,
    )
    block_km: float = setting(50.0, "edge of the blocks")
    # Biomass and images are alike over kilometres (Ploton et al. 2020): beside a train chip, a test chip is easy.
    buffer_m: float = setting(
        10_000.0, "least distance between chips of two splits; those too close are dropped and counted"
    )
    fractions: tuple[float, float, float] = setting(
        (0.8, 0.1, 0.1), "of train, val, test; with folds or leave_out, the first two share what isn't test"
    )
    seed: int = setting(0, "of the draw")
    stratify: str = setting("biome", "a column of the index each of whose values gets the fractions, or none")
    folds: int = setting(5, "runs of kind folds, over which each chip is in test once", within=Range(2))
    fold: int = setting(0, "which of the folds is test in this run, from 0 on", within=Range(0))
    leave_out: str = setting("", "what alone is test: biome=SLUG, tile=10SFF, or another column of the index")


@dataclasses.dataclass(frozen=True)
class ShardSettings(Typed):
    """How chips are written."""

    # About 100 MB: TFDS's advice, and a few shards for each reading process of a large data set.
    records_per_shard: int = setting(256, "most chips of a shard")
    seed: int = setting(0, "of the order of records")
    reference_statistics: bool = setting(False, "count zeros in means and stds, as granite-geospatial-biomass does")


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Fields of configs/prepare.py."""

    tiles: tuple[str, ...] = setting((), "MGRS tiles as ('10SFF', '10SGF'); all that have granules where empty")
    season: str | None = setting(None, "a year (dates by each tile's latitude) or START/STOP, STOP excluded")
    season_table: tuple[tuple[float, str, str, int, int], ...] = setting(
        (), "(southernmost latitude, 'MM-DD', 'MM-DD', years added to the first, to the second) a line"
    )
    label_years: int = setting(0, "shots of the same days of so many years before and after count too")
    allow_empty: bool = setting(False, "take composites, labels and sets of chips with (nearly) nothing in them, too")
    granules: Granules = group(Granules)
    composite: CompositeSettings = group(CompositeSettings)
    gedi: GediSettings = group(GediSettings)
    labels: LabelSettings = group(LabelSettings)
    chips: ChipSettings = group(ChipSettings)
    splits: SplitSettings = group(SplitSettings)
    shards: ShardSettings = group(ShardSettings)
