"""Faults of low-rank updates, of the files they are kept in, and of maps that several adapters share."""

from tests.mutation.fault import Mutation, in_file

LORA = "biomass_jax/models/lora.py"
PLACES = "biomass_jax/prediction/adapters.py"

MUTATIONS = (
    Mutation(
        "updates_not_scaled",
        "tests/models/test_lora.py::test_a_layer_adds_its_update_to_what_it_gave",
        in_file(LORA, ("return x * np.asarray(lora.scale, x.dtype)", "return x")),
    ),
    Mutation(
        "merged_without_the_scale",
        "tests/models/test_lora.py::test_a_merged_layer_gives_the_same",
        in_file(LORA, ("zip(a.T * scale, b, strict=True)", "zip(a.T, b, strict=True)")),
    ),
    Mutation(
        "any_base_will_do",
        "tests/test_adapter.py::test_another_base_is_refused",
        in_file(
            "biomass_jax/adapter.py",
            ('(found := read_meta(place)["weights_sha256"]) != known["weights_sha256"]', '(found := "") is None'),
        ),
    ),
    Mutation(
        "borders_from_centre_to_centre",
        "tests/prediction/test_adapters.py::test_two_regions_share_a_linear_ramp",
        in_file(PLACES, ("(distance - 0.5 * np.sign(distance))[inner]", "distance[inner]")),
    ),
    Mutation(
        "rows_mixed_as_if_they_were_the_first",
        "tests/prediction/test_adapters.py::test_rows_in_the_midst_are_mixed_as_all_rows",
        in_file(PLACES, ("self._regions(start, start + len(values))", "self._regions(0, len(values))")),
    ),
)
