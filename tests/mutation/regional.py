"""Faults of figures of regions."""

from tests.mutation.fault import Mutation, in_file

WARP = "biomass_jax/data/raster/warp.py"
OVERLAP = "biomass_jax/regional/overlap.py"
MOSAIC = "biomass_jax/regional/mosaic.py"
WARP_TESTS = "tests/data/raster/test_warp.py"
OVERLAP_TESTS = "tests/regional/test_overlap.py"
MOSAIC_TESTS = "tests/regional/test_mosaic.py"

MOSAICS = (
    Mutation(
        "places_to_an_eighth_of_a_pixel",
        f"{WARP_TESTS}::test_a_part_of_a_grid_gets_what_the_whole_gets",
        in_file(WARP, ("tolerance=1e-9", "tolerance=0.125")),
    ),
    Mutation(
        "average_for_sum",
        f"{WARP_TESTS}::test_means_are_those_of_polygons_cut_by_area",
        in_file(WARP, ("resampling=Resampling.sum", "resampling=Resampling.average")),
    ),
    Mutation(
        "no_frame_around_what_is_warped",
        f"{WARP_TESTS}::test_what_lies_beyond_a_grid_tells_nothing_in_it",
        in_file(
            WARP,
            (
                "            yield part, (high, west, low, east), frame",
                "            yield part, (high, west, low, east), part",
            ),
        ),
    ),
    Mutation(
        "no_data_where_no_band_has_any",
        f"{WARP_TESTS}::test_a_pixel_without_data_in_one_band_has_none_in_any",
        in_file(WARP, ("(values != self.nodata)).all(axis=0)", "(values != self.nodata)).any(axis=0)")),
    ),
    Mutation(
        "a_map_may_change_under_a_mosaic",
        f"{WARP_TESTS}::test_a_map_that_changes_while_it_is_used_is_named",
        in_file(WARP, ("if identity_of(dataset).files != self.identity:", "if not self.identity:")),
    ),
    Mutation(
        "cut_at_the_antimeridian_unseen",
        f"{WARP_TESTS}::test_a_map_that_the_crs_cuts_in_two_is_refused_by_name",
        in_file(WARP, ("(np.abs(off) < 90)).any()", "(np.abs(off) < 90)).all()")),
    ),
    Mutation(
        "grids_of_neighbours_do_not_fit",
        f"{WARP_TESTS}::test_grids_of_neighbours_fit",
        in_file(
            WARP,
            (
                "Affine(pixel, 0, first * pixel, 0, -pixel, high * pixel)",
                "Affine(pixel, 0, bounds[0][0], 0, -pixel, high * pixel)",
            ),
        ),
    ),
    Mutation(
        "weights_by_sd_and_not_by_variance",
        f"{OVERLAP_TESTS}::test_overlaps_on_one_grid_are_those_of_numpy",
        in_file(OVERLAP, ("LEAST_SD) ** 2", "LEAST_SD)")),
    ),
    Mutation(
        "zones_weigh_the_wrong_way_round",
        f"{OVERLAP_TESTS}::test_overlaps_across_zones_weigh_alike",
        in_file(OVERLAP, ("divisor**-0.5", "divisor**0.5")),
    ),
    Mutation(
        "the_oldest_hides_the_others",
        f"{OVERLAP_TESTS}::test_overlaps_on_one_grid_are_those_of_numpy",
        in_file(OVERLAP, ("key=lambda one: -one.day", "key=lambda one: one.day")),
    ),
    Mutation(
        "the_older_zone_hides_the_newer",
        f"{OVERLAP_TESTS}::test_the_newest_of_two_zones_hides_the_other_to_its_edge",
        in_file(OVERLAP, ("np.where(shares > 0, -means[:, -1], np.inf)", "np.where(shares > 0, means[:, -1], np.inf)")),
    ),
    Mutation(
        "any_bit_of_data_makes_a_pixel",
        f"{OVERLAP_TESTS}::test_a_pixel_counts_where_half_of_its_area_has_data",
        in_file(OVERLAP, ("LEAST_SHARE = 0.5 - 1e-6", "LEAST_SHARE = 1e-6")),
    ),
    Mutation(
        "blocks_of_a_changed_map_are_kept",
        f"{MOSAIC_TESTS}::test_a_map_that_changed_meanwhile_is_named_and_its_blocks_made_again",
        in_file(MOSAIC, ("digest_of((about, at, met))", "digest_of((about, at))")),
    ),
    Mutation(
        "intervals_of_several_levels_in_one_mosaic",
        f"{MOSAIC_TESTS}::test_maps_that_differ_are_refused_by_what_differs",
        in_file(MOSAIC, ('ALWAYS_ALIKE = ("INTERVAL_LEVEL",)', "ALWAYS_ALIKE = ()")),
    ),
)

ESTIMATORS = "biomass_jax/regional/estimators.py"
ZONAL = "biomass_jax/data/raster/zonal.py"
ZONES_PY = "biomass_jax/regional/zones.py"
VECTORS = "biomass_jax/data/vectors.py"
OF_ESTIMATORS = "tests/regional/test_estimators.py::"
OF_ZONES = "tests/regional/test_zones.py::"
OF_ZONAL = "tests/data/raster/test_zonal.py::"
ZONES = (
    Mutation(
        "double_sum_wraps_around",
        f"{OF_ESTIMATORS}test_the_double_sum_is_that_of_a_plain_loop[exponential]",
        in_file(ESTIMATORS, ("fft.next_fast_len(2 * size - 1, real=True)", "fft.next_fast_len(size, real=True)")),
    ),
    Mutation(
        "double_sum_with_down_and_across_exchanged",
        f"{OF_ESTIMATORS}test_the_double_sum_is_that_of_a_plain_loop[spherical]",
        in_file(
            ESTIMATORS, ("zip((down, across), spacing, strict=True)", "zip((down, across), spacing[::-1], strict=True)")
        ),
    ),
    Mutation(
        "pixels_of_a_cell_at_one_place",
        f"{OF_ESTIMATORS}test_cells_of_several_pixels_give_the_variance_of_their_pixels",
        in_file(ESTIMATORS, ("    if factor > 1:\n", "    if factor > 1000:\n")),
    ),
    Mutation(
        "bias_for_all_left_out",
        f"{OF_ESTIMATORS}test_independent_errors_add_up_as_squares_and_shared_ones_as_they_are",
        in_file(ESTIMATORS, ("* self.squares + decaying + common", "* self.squares + decaying")),
    ),
    Mutation(
        "chance_taken_for_a_bias",
        f"{OF_ESTIMATORS}test_a_fit_finds_what_residuals_were_drawn_with",
        in_file(
            ESTIMATORS,
            ("residuals.mean()) ** 2 - _variance_of_mean", "residuals.mean()) ** 2 + 40 * _variance_of_mean"),
        ),
    ),
    Mutation(
        "tracks_of_unequal_size_weigh_alike",
        f"{OF_ESTIMATORS}test_the_difference_estimator_by_hand",
        in_file(ESTIMATORS, ("((sums - mean * sizes) ** 2)", "((sums - sums.mean()) ** 2)")),
    ),
    Mutation(
        "no_correction_for_few_tracks",
        f"{OF_ESTIMATORS}test_the_difference_estimator_by_hand",
        in_file(ESTIMATORS, ("variance = count / (count - 1) *", "variance = 1.0 *")),
    ),
    Mutation(
        "strata_share_parameters",
        f"{OF_ESTIMATORS}test_parameters_errors_by_hand_and_by_drawing_parameters",
        in_file(ESTIMATORS, ("gradients[strata == name].sum(0) / len(gradients)", "gradients[strata == name].mean(0)")),
    ),
    Mutation(
        "hybrid_without_the_models",
        f"{OF_ESTIMATORS}test_hybrid_adds_the_models_variance",
        in_file(ESTIMATORS, ("_error(found.variance + model_variance,", "_error(found.variance,")),
    ),
    Mutation(
        "nominal_areas",
        "tests/data/raster/test_grid_areas.py::test_pixels_have_their_geodesic_areas",
        in_file(
            "biomass_jax/data/raster/grid.py",
            ("np.repeat(patch / (down[:, None] * across), down, 0)", "np.repeat(0.09 + 0 * patch, down, 0)"),
        ),
    ),
    Mutation(
        "overlaps_count_twice",
        f"{OF_ZONAL}test_a_place_without_data_is_taken_from_the_next_map",
        in_file(ZONAL, ("inside &= ~self._had_before(", "inside &= True | ~self._had_before(")),
    ),
    Mutation(
        "maps_that_meet_across_the_antimeridian_missed",
        f"{OF_ZONAL}test_a_zone_across_the_antimeridian[4326]",
        in_file(ZONAL, ("_TURNS = (-360.0, 0.0, 360.0)", "_TURNS = (0.0,)")),
    ),
    Mutation(
        "edges_bend_with_the_maps_crs",
        "tests/data/test_vectors.py::test_edges_are_straight_in_the_zones_own_crs",
        in_file(
            VECTORS, ("shapely.segmentize(zones.geometry.array, step)", "shapely.segmentize(zones.geometry.array, 1e9)")
        ),
    ),
    Mutation(
        "beams_of_an_orbit_are_one_track",
        f"{OF_ZONES}test_beams_of_one_orbit_are_one_cluster_where_orbits_are",
        in_file(VECTORS, ("_TRACK, _ORBIT = 10**11, 10**13", "_TRACK, _ORBIT = 10**13, 10**13")),
    ),
    Mutation(
        "footprints_of_two_tables_count_twice",
        "tests/data/test_vectors.py::test_footprints_count_once_and_tell_their_orbit_and_beam",
        in_file(
            VECTORS, ("values[first] for name, values in whole.items()", "values for name, values in whole.items()")
        ),
    ),
    Mutation(
        "residuals_turned_around",
        f"{OF_ZONES}test_model_assisted_by_tracks",
        in_file(
            ZONES_PY,
            ("(shots.of.value - shots.at.value)[mine], shots", "(shots.at.value - shots.of.value)[mine], shots"),
        ),
    ),
    Mutation(
        "normal_quantiles_for_few_tracks",
        f"{OF_ZONES}test_model_assisted_by_tracks",
        in_file(ZONES_PY, ("estimators.quantile(chosen.level, found.freedom)", "estimators.quantile(chosen.level)")),
    ),
    Mutation(
        "classes_together_as_if_independent",
        f"{OF_ZONES}test_classes_part_a_zone_and_a_mask_keeps_some",
        in_file(
            ESTIMATORS,
            ("            whole.weights += lattice.weights\n", "            whole.weights = lattice.weights\n"),
        ),
    ),
)
CHANGE_PY = "biomass_jax/regional/change.py"
OF_CHANGE = "tests/regional/test_change.py::"
OF_ZONES_CHANGE = "tests/regional/test_zones_change.py::"
CHANGED = (
    Mutation(
        "losses_are_gains",
        f"{OF_ZONES_CHANGE}test_net_losses_and_gains_are_those_of_plain_sums_over_all_pairs",
        in_file(ZONES_PY, ('(("loss", -1), ("gain", 1))', '(("loss", 1), ("gain", -1))')),
    ),
    Mutation(
        "the_offset_is_known_exactly",
        f"{OF_ZONES_CHANGE}test_the_raster_tells_how_its_errors_go_together",
        in_file(ESTIMATORS, ("variance(correlation) + one.shift**2)", "variance(correlation))")),
    ),
    Mutation(
        "what_a_threshold_cuts_off_lowers_the_variance",
        f"{OF_ESTIMATORS}test_shares_of_a_known_variance",
        in_file(ESTIMATORS, ("    scale = variance / (found.nugget + found.sill)\n", "    scale = 1.0\n")),
    ),
    Mutation(
        "pixels_of_stable_ground_weigh_alike",
        f"{OF_CHANGE}test_the_offsets_error_is_the_double_sum_over_stable_ground",
        in_file(
            CHANGE_PY, ("            inverse = 1 / variance(sd_1, sd_2, 0.0)\n", "            inverse = 0 * sd_1 + 1\n")
        ),
    ),
    Mutation(
        "chance_of_losses_and_gains_together",
        f"{OF_ZONES_CHANGE}test_net_losses_and_gains_are_those_of_plain_sums_over_all_pairs",
        in_file(ESTIMATORS, ("float(special.ndtr(-self.threshold))", "2 * float(special.ndtr(-self.threshold))")),
    ),
    Mutation(
        "maps_and_changes_in_one_sum",
        f"{OF_ZONES_CHANGE}test_what_can_not_be_is_refused_by_name",
        in_file(ZONAL, ("        if len(kinds) > 1:\n", "        if len(kinds) > 2:\n")),
    ),
    Mutation(
        "distances_of_the_crs_and_not_of_the_ground",
        f"{OF_ZONAL}test_a_zones_plane_has_the_grounds_distances",
        in_file(ZONAL, ("return Plane((down, across), shape", "return Plane((abs(step[1]), abs(step[0])), shape")),
    ),
)
COMPARE_PY = "biomass_jax/regional/compare.py"
PRODUCTS_PY = "biomass_jax/regional/products.py"
OF_COMPARE = "tests/regional/test_compare.py::"
COMPARED = (
    Mutation(
        "zeros_of_l4b_are_estimates",
        f"{OF_COMPARE}test_two_equal_surfaces_agree",
        in_file(PRODUCTS_PY, ("        zero=False,", "        zero=True,")),
    ),
    Mutation(
        "zeros_of_cci_are_no_data",
        f"{OF_COMPARE}test_half_covered_pixels_and_zeros",
        in_file(PRODUCTS_PY, ("        fill=False,", "        fill=True,")),
    ),
    Mutation(
        "quality_of_l4d_unread",
        f"{OF_COMPARE}test_a_planted_bias_and_scale_come_back[l4d]",
        in_file(PRODUCTS_PY, ("valid &= quality[0] == 1", "valid &= quality[0] >= 1")),
    ),
    Mutation(
        "any_unit_is_taken",
        f"{OF_COMPARE}test_other_units_are_refused",
        in_file(PRODUCTS_PY, ("    if unit not in UNITS:", "    if not unit:")),
    ),
    Mutation(
        "ours_and_theirs_exchanged_in_the_line",
        f"{OF_COMPARE}test_a_planted_bias_and_scale_come_back[cci]",
        in_file(COMPARE_PY, ("columns = [np.ones_like(x), x, y,", "columns = [np.ones_like(x), y, x,")),
    ),
    Mutation(
        "errors_of_theirs_left_in_the_slope",
        f"{OF_COMPARE}test_errors_of_theirs_make_the_slope_flatter_and_are_taken_off",
        in_file(COMPARE_PY, ("_ratio(xy, xx - errors)", "_ratio(xy, xx)")),
    ),
    Mutation(
        "our_sd_alone_counts",
        f"{OF_COMPARE}test_a_planted_bias_and_scale_come_back[cci]",
        in_file(COMPARE_PY, ("both = np.hypot(found.our_error, found.their_error)", "both = found.our_error")),
    ),
)
CATALOG_PY = "biomass_jax/regional/catalog.py"
STAC_PY = "biomass_jax/data/raster/stac.py"
OF_CATALOG = "tests/regional/test_catalog.py::"
CATALOGUED = (
    Mutation(
        "an_extent_across_the_antimeridian_goes_around",
        f"{OF_CATALOG}test_boxes_all_around_the_earth_are_one_without_ends",
        in_file(CATALOG_PY, ("east if east >= west else east + 360", "east")),
    ),
    Mutation(
        "hrefs_of_this_machine",
        f"{OF_CATALOG}test_a_folder_that_is_moved_leads_to_its_own_files_and_gives_equal_bytes_again",
        in_file(STAC_PY, ("Path(os.path.relpath(place, folder))", "Path(os.path.abspath(place))")),
    ),
    Mutation(
        "an_item_of_another_file_is_kept",
        "tests/data/raster/test_stac.py::test_an_item_is_renewed_where_it_is_not_that_of_the_map_and_its_picture",
        in_file(STAC_PY, ('or asset["file:checksum"] == _SHA256 + sha256_of(path)', "or True")),
    ),
    Mutation(
        "changes_before_maps",
        f"{OF_CATALOG}test_the_collection_and_its_items_are_valid_and_tell_the_kinds_apart",
        in_file(CATALOG_PY, ("for _, path in sorted(self._order)", "for _, path in sorted(self._order)[::-1]")),
    ),
    Mutation(
        "a_change_is_of_its_second_season",
        "tests/regional/test_change.py::test_a_change_has_an_item_of_both_seasons_with_all_bands",
        in_file(STAC_PY, ("{before.split('/')[0]}/", "{after.split('/')[0]}/")),
    ),
    Mutation(
        "the_item_of_a_replaced_mosaic_stays",
        f"{MOSAIC_TESTS}::test_a_mosaic_has_an_item_that_names_its_maps",
        in_file(MOSAIC, ("        stac.remove_item(path)  # of", "        stac.item_path(path)  # of")),
    ),
)

STYLED = (
    Mutation(
        "maps_of_something_else_are_compared",
        "tests/regional/test_compare.py::test_maps_of_something_else_are_refused",
        in_file(
            "biomass_jax/regional/compare.py", ("        check_unit(os.fspath(maps[0]), unit)\n", "        pass\n")
        ),
    ),
    Mutation(
        "colours_of_changes_begin_at_nothing",
        "tests/figures/test_legend.py::test_differences_have_their_own_colours_with_nothing_in_the_middle",
        in_file("biomass_jax/figures/legend.py", ("np.linspace(-high if change else low", "np.linspace(low")),
    ),
    Mutation(
        "zones_style_that_qgis_does_not_take",
        "tests/regional/test_zones.py::test_the_table_in_three_formats_and_a_page",
        in_file("biomass_jax/data/vectors.py", ('"useAsDefault": True', '"useAsDefault": False')),
    ),
)

MUTATIONS = (*MOSAICS, *ZONES, *CHANGED, *COMPARED, *CATALOGUED, *STYLED)
