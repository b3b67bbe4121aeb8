"""Faults of portable programs: what has no data, weights in fewer bits, sizes that are known late."""

from tests.mutation.fault import Mutation, in_file

WEIGHTS = "biomass_jax/portable/weights.py"
SHAPES = "biomass_jax/models/shapes.py"
OPS = "biomass_jax/models/swin_ops.py"

MUTATIONS = (
    Mutation(
        "program_without_the_fill",
        "tests/portable/test_program.py::test_pixels_without_data_are_those_of_the_rule_on_the_host",
        in_file(
            "biomass_jax/portable/program.py", ("jnp.where(no_data(image, self._fill)", "jnp.where(no_data(image, 0)")
        ),
    ),
    Mutation(
        "int8_cut_off_and_not_rounded",
        "tests/portable/test_weights.py::test_int8_is_the_nearest_multiple_of_a_scale_for_each_output_channel",
        in_file(WEIGHTS, ("np.rint(values / scale)", "np.trunc(values / scale)")),
    ),
    Mutation(
        "last_products_in_fewer_bits",
        "tests/portable/test_weights.py::test_all_but_kernels_of_products_is_kept_to_the_bit",
        in_file(WEIGHTS, (" or module in FLOAT32_PRODUCTS", "")),
    ),
    Mutation(
        "a_narrow_map_is_a_single_window",
        "tests/models/test_shapes.py::test_a_single_window_is_told_when_the_program_runs",
        in_file(SHAPES, ("jnp.where(jnp.all(alike)", "jnp.where(jnp.any(alike)")),
    ),
    Mutation(
        "a_single_window_masks_its_last_row",
        "tests/models/test_shapes.py::test_a_shift_of_nothing_masks_nothing_of_a_single_window",
        in_file(OPS, ("(index >= length - shift)", "(index > length - 1 - jnp.maximum(shift, 1))")),
    ),
    Mutation(
        "an_onnx_model_of_any_size",
        "tests/portable/test_formats.py::test_what_is_refused_before_anything_is_computed",
        in_file("biomass_jax/portable/formats.py", ("side < STEP or side % STEP", "side < STEP")),
    ),
)
