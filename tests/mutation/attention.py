"""Faults of the kernels and of their choice, and of weights in the type they are multiplied in."""

from tests.mutation.fault import Mutation, in_file

FUSED = "biomass_jax/models/fused/attention.py"
BOTH_WAYS = "tests/models/fused/test_attention.py::test_output_and_gradients_are_the_einsums"
MLP = "biomass_jax/models/fused/mlp.py"
MLP_TESTS = "tests/models/fused/test_mlp.py"
SPLIT = "tests/models/fused/test_kernels.py::test_two_devices_give_what_one_gives"
CHOICE = "biomass_jax/models/fused/choice.py"

MUTATIONS = (
    Mutation("kernel_keys_that_fill_up_attend", BOTH_WAYS, in_file(FUSED, ("NO_KEY = -1e9", "NO_KEY = 0.0"))),
    Mutation("kernel_rows_not_shifted", BOTH_WAYS, in_file(FUSED, ("inner_row + layout.shift", "inner_row"))),
    Mutation(
        "kernel_last_row_is_the_last_column",
        BOTH_WAYS,
        in_file(FUSED, ("2 * last_row + last_column", "last_row + 2 * last_column")),
    ),
    Mutation(
        "kernel_sees_across_regions",
        BOTH_WAYS,
        in_file(FUSED, ("swin_ops.shift_mask(2 * size,", "0 * swin_ops.shift_mask(2 * size,")),
    ),
    Mutation(
        "kernel_gradient_without_the_softmax_sum",
        BOTH_WAYS,
        in_file(FUSED, ("(of_weights - jnp.sum(weights * of_weights, axis=1, keepdims=True))", "of_weights")),
    ),
    Mutation(
        "kernel_bias_gradient_of_one_window_a_program",
        BOTH_WAYS,
        in_file(FUSED, ("return total + of_scores", "return of_scores")),
    ),
    Mutation(
        "kernel_gradients_of_queries_and_keys_swapped",
        BOTH_WAYS,
        in_file(
            FUSED,
            (
                "there, first, kernels.dot(of_products, k, (1, 0), layout.precision)",
                "there, first + c, kernels.dot(of_products, k, (1, 0), layout.precision)",
            ),
            (
                "there, first + c, kernels.dot(of_products, q, (0, 0), layout.precision)",
                "there, first, kernels.dot(of_products, q, (0, 0), layout.precision)",
            ),
        ),
    ),
    Mutation(
        "kernel_for_every_shape",
        "tests/models/fused/test_attention.py::test_what_the_kernel_does_not_take",
        in_file(FUSED, ("if c // num_heads not in HEAD_SIZES:", "if c % num_heads:")),
    ),
    Mutation(
        "kernel_by_choice_of_auto_on_cpu",
        "tests/models/fused/test_choice.py::test_auto_is_einsum_on_this_machine_and_says_nothing_in_bundles",
        in_file(CHOICE, ("return placed and not why_not_here()", "return placed")),
    ),
    Mutation(
        "kernel_trusted_untried",
        "tests/models/fused/test_choice.py::test_a_kernel_that_does_not_work_here_is_left_alone_with_a_word",
        in_file(CHOICE, ("    return fault_here()\n", '    return ""\n')),
    ),
    Mutation(
        "kernel_on_several_devices_without_a_mesh",
        "tests/models/fused/test_choice.py::test_on_several_devices_a_program_has_to_say_how_it_is_split",
        in_file(CHOICE, ("and mesh.mesh_is_known())", ")")),
    ),
    Mutation(
        "mlp_kernel_tried_by_its_gradients_alone",
        "tests/models/fused/test_choice.py::test_a_broken_mlp_is_noticed_too",
        in_file(
            CHOICE, ("pairs = [outputs, *zip(found(fused), found(plain), strict=True)]", "pairs = [outputs[:1] * 2]")
        ),
    ),
    Mutation(
        "mlp_kernel_normalises_filled_channels",
        f"{MLP_TESTS}::test_both_ways_against_numpy",
        in_file(MLP, ("centred = jnp.where(known[None, :], wide - ", "centred = (lambda _, a, b: a)(0, wide - ")),
    ),
    Mutation(
        "mlp_kernel_without_its_input",
        f"{MLP_TESTS}::test_both_ways_against_numpy",
        in_file(MLP, ("y = read() + total", "y = total")),
    ),
    Mutation(
        "mlp_kernel_in_training",
        f"{MLP_TESTS}::test_a_block_takes_it_in_predictions_alone",
        in_file("biomass_jax/models/swin.py", ("if train or self.is_initializing()", "if self.is_initializing()")),
    ),
    Mutation(
        "erf_cut_too_early",
        f"{MLP_TESTS}::test_erf_against_the_c_library",
        in_file(MLP, ("_ERF_IS_ONE = 3.83", "_ERF_IS_ONE = 3.43")),
    ),
    Mutation(
        "kernel_of_maps_split_by_their_rows",
        SPLIT,
        in_file("biomass_jax/runtime/mesh.py", ("else PartitionSpec(AXES)", "else PartitionSpec(None, AXES[0])")),
    ),
    Mutation(
        "kernel_splits_rows_that_do_not_divide",
        SPLIT,
        in_file(
            "biomass_jax/runtime/mesh.py",
            ("PartitionSpec() if len(rows) % mesh.size else PartitionSpec(AXES)", "PartitionSpec(AXES)"),
        ),
    ),
    Mutation(
        "last_products_in_bfloat16",
        "tests/models/test_biomass.py::test_weights_cast_once_give_the_numbers_of_weights_cast_in_each_call",
        in_file(
            "biomass_jax/models/build.py", ('FLOAT32_PRODUCTS = ("final", "spread")', 'FLOAT32_PRODUCTS = ("spread",)')
        ),
    ),
)
