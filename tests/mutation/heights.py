"""Faults of canopy height: what is read of GEDI L2A, and where a label's name, unit and bins come from."""

from tests.mutation.fault import Mutation, in_file

ORBITS = "tests/data_prep/gedi/test_orbits_heights.py::"
SOURCES = "tests/data/test_sources_labels.py::"
ZONES = "tests/regional/test_zones_heights.py::"

MUTATIONS = (
    Mutation(
        "the_percentile_beside",
        ORBITS + "test_the_percentile_of_the_label_is_read_and_no_other",
        in_file("data_prep/gedi/names.py", ("_replace(column=share)", "_replace(column=max(share - 1, 0))")),
    ),
    Mutation(  # centimetres of a single algorithm taken for metres
        "whole_numbers_for_metres",
        ORBITS + "test_heights_of_another_shape_or_unit_are_no_heights",
        in_file("data_prep/gedi/orbits.py", ('wanted = "f" if field.column is not None else wanted', "pass")),
    ),
    Mutation(
        "version_3_by_the_flag_of_version_2",
        ORBITS + "test_version_3_is_not_read_by_the_names_of_version_2",
        in_file("data_prep/gedi/names.py", ('"quality_flag", "l2a_quality_flag_rel3"),', '"quality_flag"),')),
    ),
    Mutation(
        "no_elevation_model_passes",
        ORBITS + "test_every_trap_falls_to_its_filter_in_both_versions",
        in_file("data_prep/gedi/filters.py", ('- t["dem"], np.inf))', '- t["dem"], 0))')),
    ),
    Mutation(
        "heights_above_the_ground_alone",
        ORBITS + "test_every_trap_falls_to_its_filter_in_both_versions",
        in_file("data_prep/gedi/filters.py", ("(t[field] >= 0) & (t[field] < BEYOND)", "t[field] < BEYOND")),
    ),
    Mutation(
        "a_limit_of_biomass_for_heights",
        SOURCES + "test_a_height_of_150_m_and_more_is_none",
        in_file(
            "biomass_jax/data/raster/chips.py",
            ("label_max if about == BIOMASS else min(label_max, about.top)", "label_max"),
        ),
    ),
    Mutation(
        "labels_mixed_unseen",
        SOURCES + "test_a_mixture_of_labels_can_be_looked_at_and_not_learnt_from",
        in_file("biomass_jax/data/sources.py", ("if any(label != found[0] for label in found):", "if False:")),
    ),
    Mutation(
        "bins_of_biomass_for_heights",
        "tests/evaluation/test_evaluate_heights.py::test_rows_are_those_of_the_labels_bins",
        in_file("biomass_jax/evaluation/tables.py", ("for limits in scored.bins:", "for limits in BINS:")),
    ),
    Mutation(
        "totals_of_metres",
        ZONES + "test_zones_of_heights_have_means_and_no_totals",
        in_file(
            "biomass_jax/regional/zones.py", ('if surface.label.adds_up else ("mean", 1.0)', 'if True else ("", 1.0)')
        ),
    ),
    Mutation(
        "a_head_of_biomass_for_heights",
        "tests/tasks/test_create_labels.py::test_a_run_does_not_begin_from_a_head_of_biomass_but_from_its_encoder",
        in_file("biomass_jax/tasks/create.py", ("loaded.label.units != label.units", "False")),
    ),
    Mutation(
        "statistics_of_another_model",
        "tests/convert/test_declared.py::test_what_a_model_of_canopy_height_gives_has_to_be_said",
        in_file("biomass_jax/convert/convert.py", ('options.statistics == "granite" and label != BIOMASS', "False")),
    ),
)
