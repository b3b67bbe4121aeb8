"""Faults of data preparation, most of them noticed by the ruler world."""

from tests.mutation.fault import Mutation, in_file

RULER = "tests/end_to_end/test_ruler_world.py::"
COMPOSITES = RULER + "test_composites_hold_every_pixel_and_count_scenes_as_planned[small]"
PIXELS = RULER + "test_every_pixel_tells_its_own_row_and_column[small]"
SCENES = RULER + "test_scenes_used_and_pixels_counted_are_as_planned[small]"
LABELS = RULER + "test_label_rasters_hold_what_was_planned_and_no_poison[small]"
PLACE = RULER + "test_transform_gives_longitude_and_latitude_to_a_millimetre[small]"
FILTERS = RULER + "test_filters_drop_what_was_planned[small]"
SHOTS = RULER + "test_shot_numbers_of_chips_are_exact_and_disjoint_between_splits[small]"
GROUND = RULER + "test_ground_of_splits_is_disjoint[small]"
STATISTICS = RULER + "test_statistics_are_of_train_alone[small]"
TRAPS = "tests/data_prep/gedi/test_filters.py::test_every_trap_falls_to_its_filter"
SCENES_OF_TILES = "tests/data_prep/hls/test_composite.py::"
COSTS = SCENES_OF_TILES + "test_three_clear_scenes_are_wanted_by_default_and_what_that_costs_is_counted"
SENTINEL = RULER + "test_other_sensor_by_its_own_band_numbers[small-10SFF]"

DRAWS = "tests/data_prep/chips/test_splits_draws.py::"
FILLED_BEFORE = (
    "    chips_of = Counter(names)\n    split_of: dict[str, str] = {}\n"
    "    filled: Counter[str] = Counter()\n    total = 0\n"
)
TOTAL_OF_ALL = "total += sum(chips_of[name] for name in blocks)\n"
BY_CENTRES = "    return np.linalg.norm(corners.mean(axis=1) - others.mean(axis=1), axis=-1)"
SIGMA = "tests/data_prep/gedi/test_sigma.py::"

_CLEAR_BITS = "keep &= fmask & (_MASKED | (WATER if drop_water else 0)) == 0"
_CLEAR_BANDS = "keep &= image[..., index] != bands.FILL"
_READ_WINDOW = "image, label = pair.read_image(window), pair.read_label(window)"

MUTATIONS = (
    Mutation(
        "round_for_floor",
        LABELS,
        in_file(
            "data_prep/gedi/labels.py", ("col = np.floor(", "col = np.rint("), ("row = np.floor(", "row = np.rint(")
        ),
    ),
    Mutation(
        "rows_reversed",
        PIXELS,
        in_file(
            "data_prep/chips/windows.py",
            (_READ_WINDOW, "image, label = pair.read_image(window)[::-1], pair.read_label(window)[::-1]"),
        ),
    ),
    Mutation(  # the product's own standard error is no error in Mg/ha
        "sigma_without_its_slope",
        SIGMA + "test_square_roots_logs_and_plain_models_have_the_slope_of_their_way_back",
        in_file("biomass_jax/data/gedi.py", ("lambda t: 2 * np.maximum(t, 0)", "np.ones_like")),
    ),
    Mutation(
        "sigma_of_another_stratum",
        SIGMA + "test_it_is_half_a_synthetic_file_s_interval_over_its_quantile",
        in_file("data_prep/gedi/sigma.py", ("models.get(name.strip())", "next(iter(models.values()))")),
    ),
    Mutation(
        "sigma_without_bias_correction",
        SIGMA + "test_small_errors_spread_biomass_as_far_as_sigma_says",
        in_file("data_prep/gedi/sigma.py", ("slope = model.bias_correction_value * ", "slope = ")),
    ),
    Mutation(
        "errors_of_a_pixel_averaged",
        "tests/data_prep/gedi/test_labels.py::test_written_labels_lie_on_the_composite_s_grid[north]",
        in_file("data_prep/gedi/labels.py", ("dtype=np.float64)) / shots)", "dtype=np.float64)))")),
    ),
    Mutation(
        "an_error_without_its_label",
        "tests/data_prep/chips/test_windows.py::test_chips_carry_the_errors_of_their_labels[two bands]",
        in_file("data_prep/chips/windows.py", ("known = (label >= 0) & (sigma >= 0)", "known = (sigma >= 0)")),
    ),
    Mutation(  # what nothing but its surroundings tells of a pixel, told by the pixel
        "stature_in_the_colour",
        "tests/data_prep/synthetic/context/test_view.py::test_texture_grows_with_stature_and_the_south_shades",
        in_file(
            "data_prep/synthetic/context/view.py",
            ("return 1 + roughness * (", "return 1 + 0.2 * at.stature + roughness * ("),
        ),
    ),
    Mutation(
        "shots_where_they_seem_to_be",
        "tests/data_prep/synthetic/context/test_world.py::test_the_oracle_s_limit_is_that_of_the_files",
        in_file("data_prep/synthetic/world.py", ("if world.astray_m\n", "if False\n")),
    ),
    Mutation(
        "lon_lat_swapped", LABELS, in_file("data_prep/gedi/labels.py", (".transform(lon, lat)", ".transform(lat, lon)"))
    ),
    Mutation(
        "south_without_1e7",
        COMPOSITES,
        in_file("biomass_jax/data/raster/grid.py", ('SOUTHERN_NORTHING if fields.get("south") else 0.0', "0.0")),
    ),
    Mutation(
        "x_plus_15_m", LABELS, in_file("data_prep/gedi/labels.py", ("np.asarray(x) - t.c", "np.asarray(x) + 15 - t.c"))
    ),
    Mutation("s30_b05_for_nir", SENTINEL, in_file("biomass_jax/data/bands.py", ('"B05", "B8A"', '"B05", "B05"'))),
    Mutation("fmask_equals_0", COMPOSITES, in_file("data_prep/hls/granules.py", (_CLEAR_BITS, "keep &= fmask == 0"))),
    Mutation(  # the bits of 255 mask it too; what was observed is counted by it alone
        "fill_255_not_tested",
        SCENES,
        in_file("data_prep/hls/granules.py", ("return fmask != FMASK_FILL", "return np.ones(fmask.shape, bool)")),
    ),
    Mutation(  # as a reader does that puts 0 where a file has no data: poison under 255 has to show
        "fill_255_taken_for_clear",
        COMPOSITES,
        in_file(
            "data_prep/hls/granules.py",
            ("return fmask != FMASK_FILL", "return np.ones(fmask.shape, bool)"),
            (_CLEAR_BITS, _CLEAR_BITS.replace("fmask &", "np.where(fmask == FMASK_FILL, 0, fmask) &")),
        ),
    ),
    Mutation(
        "bit_2_ignored",
        COMPOSITES,
        in_file("data_prep/hls/granules.py", ("CLOUD | ADJACENT | SHADOW", "CLOUD | SHADOW")),
    ),
    Mutation(
        "mask_per_band",
        COMPOSITES,
        in_file("data_prep/hls/granules.py", (_CLEAR_BANDS, "keep &= True"))
        + in_file(
            "data_prep/hls/composite_sums.py",
            (
                "keep = clear(image, fmask, settings.drop_water, settings.drop_high_aerosol)\n",
                "keep = clear(image, fmask, settings.drop_water, settings.drop_high_aerosol) & (planes != FILL)\n",
            ),
            (
                "np.zeros((_BANDS, *shape), np.int32), np.zeros(shape, np.int16)",
                "np.zeros((_BANDS, *shape), np.int32), np.zeros((_BANDS, *shape), np.int16)",
            ),
            ("sums[:, rows], number[rows])", "sums[:, rows], number[:, rows])"),
            ("range(0, number.shape[0], _PIECE)", "range(0, number.shape[1], _PIECE)"),
            ("number[rows] += keep[rows]", "number[:, rows] += keep[:, rows]"),
            ("np.maximum(number[rows], 1))", "np.maximum(number[:, rows], 1))"),
            ("out=means), number[rows], ", "out=means), number[:, rows].max(axis=0), "),
        ),
    ),
    Mutation(
        "scale_applied",
        COMPOSITES,
        in_file(
            "data_prep/hls/granules.py",
            (
                "dataset.read(1, window=window, out=out)",
                "out[...] = np.rint(dataset.read(1, window=window) * dataset.scales[0])",
            ),
        ),
    ),
    Mutation("fill_averaged", COMPOSITES, in_file("data_prep/hls/granules.py", (_CLEAR_BANDS, "keep &= True"))),
    Mutation(
        "hemisphere_swapped",
        PLACE,
        in_file("biomass_jax/data/raster/grid.py", ("(32700 if zone[1] else 32600)", "(32600 if zone[1] else 32700)")),
    ),
    Mutation(
        "chip_offset_by_one",
        PIXELS,
        in_file("data_prep/chips/windows.py", ("Window(left, top, size, size)", "Window(left + 1, top, size, size)")),
    ),
    Mutation(
        "leaf_off_equals_0",
        FILTERS,
        in_file(
            "data_prep/gedi/filters.py",
            ('_differs("leaf_off_flag", 1)', '_equals("leaf_off_flag", "leaf_off_flag", 0)'),
        ),
    ),
    Mutation(
        "water_up_to_its_bar",
        FILTERS,
        in_file("data_prep/gedi/filters.py", ("lambda t: t[field] < bar", "lambda t: t[field] <= bar")),
    ),
    Mutation(
        "evergreens_of_all_latitudes",
        TRAPS,
        in_file("data_prep/gedi/filters.py", (' | (np.abs(t["lat"]) > TROPIC)', "")),
    ),
    Mutation(
        "all_forest_of_the_tropics",
        TRAPS,
        in_file("data_prep/gedi/filters.py", (' | (t["pft_class"] != EVERGREEN_BROADLEAF)', "")),
    ),
    Mutation(
        "dry_season_of_the_other_hemisphere",
        "tests/data_prep/test_season.py::test_season_of_a_year_by_latitude",
        in_file("data_prep/season.py", ('SeasonRow(5.0, "12-01", "04-01", -1, 0)', 'SeasonRow(5.0, "06-01", "10-01")')),
    ),
    Mutation(
        "min_clear_costs_what_nothing_sees",
        COSTS,
        in_file("data_prep/hls/composite_sums.py", ("(number > 0) & (number < min_clear)", "number < min_clear")),
    ),
    Mutation(
        "min_clear_counted_in_one_window",
        SCENES_OF_TILES + "test_order_blocks_and_threads_change_no_byte",
        in_file(
            "data_prep/hls/composite_sums.py",
            (
                "counts.below_min_clear += _below(number, plan.settings.min_clear)\n    for first",
                "counts.below_min_clear = _below(number, plan.settings.min_clear)\n    for first",
            ),
        ),
    ),
    Mutation(
        "shot_number_through_float64",
        SHOTS,
        in_file(
            "data_prep/gedi/labels.py",
            (
                "table[name].astype(kind) for",
                'table[name].astype(np.float64 if name == "shot_number" else kind).astype(kind) for',
            ),
        ),
    ),
    Mutation(
        "split_by_file",
        GROUND,
        in_file(
            "data_prep/chips/splits.py",
            ("return ground.block_names(lon, lat, settings.block_km)", 'return _column(chips, "chip_id", "kind")'),
            ("split[met] = DROPPED", "pass"),
        ),
    ),
    Mutation(
        "fractions_over_all_strata",
        DRAWS + "test_no_biome_goes_without_a_split[10 of 8 blocks]",
        in_file(
            "data_prep/chips/splits.py",
            ("    chips_of = Counter(names)\n    split_of: dict[str, str] = {}\n", FILLED_BEFORE),
            (
                "total = sum(chips_of[name] for name in blocks)\n        filled: Counter[str] = Counter()\n",
                TOTAL_OF_ALL,
            ),
            ("        _fill_empty(drawn, fractions)\n", ""),
        ),
    ),
    Mutation(
        "two_blocks_without_test",
        DRAWS + "test_of_two_blocks_one_is_for_train_and_one_for_test_and_a_single_one_trains",
        in_file("data_prep/chips/splits.py", ('_FIRST_SERVED = ("train", "test", "val")', "_FIRST_SERVED = SPLITS")),
    ),
    Mutation(
        "folds_by_all_chips_alone",
        DRAWS + "test_blocks_stay_whole_in_folds_and_small_strata_are_dealt_out",
        in_file("data_prep/chips/splits.py", ("key=lambda f: (here[f], filled[f])", "key=lambda f: here[f]")),
    ),
    Mutation(
        "the_left_out_trains",
        DRAWS + "test_one_biome_or_one_tile_alone_is_test[biome=wet]",
        in_file("data_prep/chips/splits.py", ("    return values == value\n", "    return values != value\n")),
    ),
    Mutation(
        "buffer_not_kept",
        DRAWS + "test_by_default_chips_of_two_splits_lie_10_km_apart",
        in_file("data_prep/ground.py", ("distance < buffer_m + TOLERANCE_M", "distance < TOLERANCE_M")),
    ),
    Mutation(
        "distances_of_chips_with_labels_alone",
        DRAWS + "test_distances_are_of_test_chips_and_of_all_cells_of_the_composite",
        in_file("data_prep/chips/splits.py", ("if not path.is_file():", "if True:")),
    ),
    Mutation(
        "nearest_by_centres",
        "tests/data_prep/test_ground.py::test_neighbours_in_a_grid_touch_and_those_after_are_a_chip_away",
        in_file("data_prep/ground.py", ("    return np.where(along < TOLERANCE_M, 0.0, along)", BY_CENTRES)),
    ),
    Mutation(
        "std_of_all_splits",
        STATISTICS,
        in_file("data_prep/shards/write.py", ("reference if split == STATISTICS_SPLIT else None", "reference")),
    ),
)
