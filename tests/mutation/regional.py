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

MUTATIONS = MOSAICS
