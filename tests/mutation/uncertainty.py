"""Faults of how sure maps are: calibration, its measures, the area of applicability."""

from tests.mutation.fault import Mutation, in_file

APPLICABILITY = "biomass_jax/uncertainty/applicability.py"
INTERVALS = "biomass_jax/evaluation/intervals.py"
AREA = (
    Mutation(
        "own_block_is_a_neighbour",
        "tests/uncertainty/test_applicability.py::test_a_block_is_no_neighbour_of_itself",
        in_file(
            APPLICABILITY, ("distances[folds[part, None] == folds] = np.inf", "distances[distances == 0] = np.inf")
        ),
    ),
    Mutation(
        "di_not_over_the_mean_distance",
        "tests/uncertainty/test_applicability.py::test_numbers_worked_out_by_hand",
        in_file(
            APPLICABILITY,
            ('jnp.sqrt(squares) / arrays["mean_distance"]', 'jnp.sqrt(squares) + 0 * arrays["mean_distance"]'),
        ),
    ),
    Mutation(
        "channels_weigh_alike",
        "tests/uncertainty/test_applicability.py::test_channels_weigh_by_what_they_tell",
        in_file(APPLICABILITY, ("return r if r.any() else np.ones_like(r)", "return np.ones_like(r)")),
    ),
    Mutation(
        "nearness_without_differences",
        "tests/uncertainty/test_applicability.py::test_a_training_cell_has_a_di_of_zero",
        in_file(
            APPLICABILITY,
            (
                "return jnp.minimum(best, ((cells - found) ** 2).sum(1)), None",
                "squares = (cells**2).sum(1) + (found**2).sum(1) - 2 * (cells * found).sum(1)\n"
                "        return jnp.minimum(best, jnp.maximum(squares, 0)), None",
            ),
        ),
    ),
    Mutation(
        "outliers_set_the_threshold",
        "tests/uncertainty/test_applicability.py::test_threshold_is_the_largest_that_is_no_outlier",
        in_file(APPLICABILITY, ("di[di <= third + 1.5 * (third - first)].max()", "di.max()")),
    ),
    Mutation(
        "area_of_applicability_unchecked",
        "tests/test_bundle.py::test_a_damaged_area_of_applicability_is_refused_and_the_weights_are_not",
        in_file(
            "biomass_jax/bundle.py",
            ("(digest := weights_sha256(found)) != expected", "(digest := expected) != expected"),
        ),
    ),
)

CALIBRATION = "biomass_jax/uncertainty/calibration.py"
MEASURES = "biomass_jax/evaluation/uncertainty.py"
INTERVALS_OF_PIXELS = (
    Mutation(
        "quantile_of_one_score_fewer",
        "tests/uncertainty/test_calibration.py::test_the_quantile_of_one_score_a_block_against_a_loop",
        in_file(CALIBRATION, ("(blocks + 1) * Fraction(str(level))", "blocks * Fraction(str(level))")),
    ),
    Mutation(
        "scores_drawn_by_pixel",
        "tests/uncertainty/test_calibration.py::test_many_pixels_of_one_block_count_as_one",
        in_file(
            CALIBRATION,
            (
                "drawn = starts + np.floor(np.random.default_rng(seed).random((DRAWS, len(counts))) * counts)",
                "drawn = np.floor(np.random.default_rng(seed).random((DRAWS, len(counts))) * len(scores))",
            ),
        ),
    ),
    Mutation(
        "large_blocks_weigh_more",
        "tests/uncertainty/test_calibration.py::test_the_mean_squared_z_of_the_blocks_is_1",
        in_file(CALIBRATION, ("1 / (len(counts) * counts[block])", "np.full(len(label), 1 / len(label))")),
    ),
    Mutation(
        "blocks_scored_by_their_own_variance",
        "tests/uncertainty/test_calibration.py::test_a_blocks_scores_do_not_come_from_its_own_variance",
        in_file(
            CALIBRATION,
            (
                "fit_variance(error[~mine], spread[~mine], mean[~mine], weight[~mine], floor)",
                "fit_variance(error[mine], spread[mine], mean[mine], weight[mine], floor)",
            ),
        ),
    ),
    Mutation(
        "biomes_quantile_before_its_bins",
        "tests/uncertainty/test_calibration.py::test_each_pixel_takes_the_finest_group_that_has_enough_blocks",
        in_file(
            CALIBRATION,
            ('(group.biome != "", group.low != group.high)', '(group.biome != "", group.low == group.high)'),
        ),
    ),
    Mutation(
        "crps_sign",
        "tests/evaluation/test_uncertainty.py::test_crps_is_the_integral_over_the_squared_distance_of_distributions",
        in_file(MEASURES, ("+ 2 * density - 1 / np.sqrt(np.pi)", "- 2 * density - 1 / np.sqrt(np.pi)")),
    ),
    Mutation(
        "variance_of_z_about_zero",
        "tests/evaluation/test_uncertainty.py::test_rows_are_those_of_the_other_tables_and_hold_what_a_loop_finds",
        in_file(MEASURES, ("float(z.var())", "float(np.mean(z**2))")),
    ),
    Mutation(
        "shares_beyond_1",
        "tests/evaluation/test_intervals.py::test_means_of_pixels_values_against_a_loop_and_the_scores",
        in_file(INTERVALS, ("(logit, expit) if share else (np.log, np.exp)", "(np.log, np.exp)")),
    ),
)

SPEED = (
    Mutation(
        "ensembles_whole_batch_at_once",
        "tests/uncertainty/test_spread.py::test_an_ensemble_behind_one_encoder_takes_one_image_at_a_time",
        in_file(
            "biomass_jax/uncertainty/spread.py",
            ('if one_by_one and getattr(module, "shared_encoder", False)', "if False"),
        ),
    ),
)

MUTATIONS = (*AREA, *INTERVALS_OF_PIXELS, *SPEED)
