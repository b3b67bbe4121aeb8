"""Faults of the attention by a kernel, and of weights in the type they are multiplied in."""

from tests.mutation.fault import Mutation, in_file

FUSED = "biomass_jax/models/fused_attention.py"
BOTH_WAYS = "tests/models/test_fused_attention.py::test_output_and_gradients_are_the_einsums"

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
                "there, first, _dot(of_products, k, (1, 0), layout)",
                "there, first + c, _dot(of_products, k, (1, 0), layout)",
            ),
            (
                "there, first + c, _dot(of_products, q, (0, 0), layout)",
                "there, first, _dot(of_products, q, (0, 0), layout)",
            ),
        ),
    ),
    Mutation(
        "kernel_for_every_shape",
        "tests/models/test_fused_attention.py::test_what_the_kernel_does_not_take",
        in_file(FUSED, ("if c // num_heads not in HEAD_SIZES:", "if c % num_heads:")),
    ),
    Mutation(
        "kernel_by_choice_of_auto_on_cpu",
        "tests/models/test_fused_attention.py::test_auto_is_einsum_on_this_machine_and_says_nothing_in_bundles",
        in_file("biomass_jax/models/attention.py", ('(choice == "auto" and why_not_here())', "False")),
    ),
    Mutation(
        "kernel_trusted_untried",
        "tests/models/test_fused_attention.py::test_a_kernel_that_does_not_work_here_is_left_alone_with_a_word",
        in_file("biomass_jax/models/attention.py", ("    return fault_here()\n", '    return ""\n')),
    ),
    Mutation(
        "last_products_in_bfloat16",
        "tests/models/test_biomass.py::test_weights_cast_once_give_the_numbers_of_weights_cast_in_each_call",
        in_file("biomass_jax/models/build.py", ('_FLOAT32 = ("final", "spread")', '_FLOAT32 = ("spread",)')),
    ),
)
