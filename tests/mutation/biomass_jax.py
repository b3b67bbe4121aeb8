"""Faults of the model, its training, conversion, maps and scores."""

from tests.mutation.fault import Mutation, in_file

SWIN, SWIN_OPS, LAYERS = (f"biomass_jax/models/{name}.py" for name in ("swin", "swin_ops", "layers"))
LOSSES, SCORES = (f"biomass_jax/tasks/{name}.py" for name in ("losses", "scores"))
OPTIMIZER, STATE, STEPS = (f"biomass_jax/training/{name}.py" for name in ("optimizer", "state", "steps"))
ENSEMBLE, BLOCKS = "biomass_jax/models/ensemble.py", "biomass_jax/data/blocks.py"
TILING = "biomass_jax/prediction/tiling.py"
MESH = "biomass_jax/runtime/mesh.py"

MODEL = (
    Mutation(
        "shift_the_other_way",
        "tests/parity/test_encoders.py::test_timm_swin",
        in_file(SWIN_OPS, ("jnp.roll(x, (-shift, -shift), axis=(1, 2))", "jnp.roll(x, (shift, shift), axis=(1, 2))")),
    ),
    Mutation(
        "shifted_windows_see_across_regions",
        "tests/models/test_swin_ops.py::test_shift_mask_lets_only_true_neighbours_attend",
        in_file(SWIN_OPS, ("SHIFT_MASK_VALUE = -100.0", "SHIFT_MASK_VALUE = 0.0")),
    ),
    Mutation(
        "merging_by_columns_first",
        "tests/models/test_swin_ops.py::test_merge_patches_against_a_loop_with_odd_sides",
        in_file(
            SWIN_OPS,
            (
                "x.transpose(0, 1, 3, 4, 2, 5).reshape(b, h // 2, w",
                "x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w",
            ),
        ),
    ),
    Mutation(
        "relative_positions_transposed",
        "tests/models/test_swin_ops.py::test_relative_position_index_against_a_loop",
        in_file(SWIN_OPS, ("dy * (2 * window_size - 1) + dx", "dx * (2 * window_size - 1) + dy")),
    ),
    Mutation(
        "drop_path_not_scaled",
        "tests/models/test_swin_ops.py::test_drop_path_drops_whole_samples_and_keeps_the_mean",
        in_file(SWIN_OPS, ("jnp.where(kept, x / keep,", "jnp.where(kept, x,")),
    ),
    Mutation(
        "running_variance_biased",
        "tests/models/test_layers.py::test_batch_norm_normalises_by_the_biased_and_keeps_the_unbiased_variance",
        in_file(LAYERS, ("(1 - self.momentum) * unbiased", "(1 - self.momentum) * var")),
    ),
    Mutation(
        "gelu_by_tanh",
        "tests/models/test_layers.py::test_gelu_is_the_erf_form",
        in_file(
            LAYERS,
            ("0.5 * x * (1 + jax.lax.erf(x * np.asarray(0.5**0.5, x.dtype)))", "jax.nn.gelu(x, approximate=True)"),
        ),
    ),
    Mutation(
        "decoder_corners_not_aligned",
        "tests/parity/test_micro_model.py::test_every_intermediate",
        in_file(
            "biomass_jax/models/upernet.py",
            ("laterals[i - 1].shape[1:3], align_corners=True", "laterals[i - 1].shape[1:3], align_corners=False"),
        ),
    ),
    Mutation(
        "pixel_shuffle_transposed",
        "tests/models/test_layers.py::test_pixel_shuffle_against_a_loop",
        in_file("biomass_jax/models/pixel_shuffle.py", ("transpose(0, 1, 4, 2, 5, 3)", "transpose(0, 1, 5, 2, 4, 3)")),
    ),
)

LOSS = (
    Mutation(
        "labels_of_zero_left_out",
        "tests/tasks/test_losses.py::test_hand_written_numbers",
        in_file(LOSSES, ("labelled = label >= 0", "labelled = label > 0")),
    ),
    Mutation(
        "root_of_a_perfect_prediction",
        "tests/tasks/test_losses.py::test_a_perfect_prediction_has_a_zero_gradient",
        in_file(
            LOSSES,
            ("jnp.where(perfect, 1, total / (count + REFERENCE_EPSILON))", "total / (count + REFERENCE_EPSILON)"),
        ),
    ),
    Mutation(
        "huber_without_its_half",
        "tests/tasks/test_losses.py::test_against_a_loop_with_its_gradient",
        in_file(LOSSES, ("near * (magnitude - 0.5 * near)", "near * (magnitude - near)")),
    ),
    Mutation(
        "variance_for_the_sd",
        "tests/tasks/test_losses_spread.py::test_sums_against_scipy_and_loops",
        in_file(LOSSES, ("z = error * numbers.exp(-log_scale)", "z = error * numbers.exp(-0.5 * log_scale)")),
    ),
    Mutation(
        "gradient_through_the_weight_of_beta",
        "tests/tasks/test_losses_spread.py::test_the_weight_of_beta_has_no_gradient",
        in_file(
            LOSSES,
            (
                "jax.lax.stop_gradient(jnp.exp(2 * nll_beta * outputs[..., 1]))",
                "jnp.exp(2 * nll_beta * outputs[..., 1])",
            ),
        ),
    ),
    Mutation(
        "sides_of_pinball_swapped",
        "tests/tasks/test_losses_spread.py::test_sums_against_scipy_and_loops",
        in_file(
            LOSSES,
            (
                "numbers.maximum(levels * above, (levels - 1) * above)",
                "numbers.maximum(-levels * above, (1 - levels) * above)",
            ),
        ),
    ),
    Mutation(
        "quantiles_not_added_up",
        "tests/models/test_biomass_spread.py::test_quantiles_are_their_closed_form",
        in_file(
            "biomass_jax/models/biomass.py",
            (
                'if self.spread == "quantiles":\n            # Added',
                'if self.spread == "gaussian":\n            # Added',
            ),
        ),
    ),
    Mutation(
        "a_frozen_trunk_in_training_mode",
        "tests/training/test_run_spread.py::test_everything_but_the_spread_keeps_every_bit",
        in_file(
            "biomass_jax/tasks/regression.py",
            ("        if self.spread_only:\n            outputs", "        if False:\n            outputs"),
        ),
    ),
    Mutation(
        "patch_variance_biased",
        "tests/tasks/test_losses_simmim.py::test_patch_statistics_are_those_of_plain_loops",
        in_file(LOSSES, ("jnp.maximum(count - 1, 1)", "jnp.maximum(count, 1)")),
    ),
    Mutation(
        "all_bands_must_lack_data",
        "tests/pipeline/test_augment.py::test_missing_pixels_are_those_of_the_one_rule",
        in_file("biomass_jax/pipeline/augment.py", ("jnp.any(_filled(", "jnp.all(_filled(")),
    ),
    Mutation(
        "filled_band_empties_the_references_pixel",
        "tests/tasks/test_regression_inputs.py"
        "::test_one_filled_band_is_0_by_itself_as_the_reference_has_it_and_else_with_its_pixel",
        in_file("biomass_jax/pipeline/augment.py", ("_filled(values, fill) if reference else no_data", "no_data")),
    ),
    Mutation(
        "filled_band_alone_without_reference",
        "tests/evaluation/test_evaluate.py::test_a_partly_filled_pixel_keeps_its_other_bands_for_the_reference_alone",
        in_file("biomass_jax/prediction/forward.py", ("reference=self._reference", "reference=True")),
    ),
    Mutation(
        "validation_without_reference",
        "tests/tasks/test_regression_inputs.py"
        "::test_one_filled_band_is_0_by_itself_as_the_reference_has_it_and_else_with_its_pixel",
        in_file(
            "biomass_jax/tasks/regression.py",
            (
                "image, label, nodata = transforms.clean(\n"
                '            batch["image"], batch["label"], fill=self.statistics.fill, reference=self.reference\n'
                "        )",
                "image, label, nodata = transforms.clean(\n"
                '            batch["image"], batch["label"], fill=self.statistics.fill, reference=False\n'
                "        )",
            ),
        ),
    ),
)

TRAINING = (
    Mutation(
        "biases_decay",
        "tests/training/test_optimizer.py::test_four_steps_against_numpy",
        in_file(OPTIMIZER, ('_NEVER_DECAYED = ("scale", "bias", ', '_NEVER_DECAYED = ("scale", ')),
    ),
    Mutation(
        "layers_counted_from_the_top",
        "tests/training/test_optimizer.py::test_layers_of_swin_b_by_name",
        in_file(OPTIMIZER, ("layer_decay ** (top - layer(path))", "layer_decay ** layer(path)")),
    ),
    Mutation(
        "plateau_an_epoch_early",
        "tests/training/test_plateau.py::test_plateau_against_a_table_by_hand",
        in_file("biomass_jax/training/plateau.py", ('> new["patience"]', '>= new["patience"]')),
    ),
    Mutation(
        "owed_plateau_step_not_made",
        "tests/training/test_plateau.py::test_the_owed_step_is_made_once",
        in_file("biomass_jax/training/plateau.py", ("else plateau_step(state, owed)", "else state")),
    ),
    Mutation(
        "warm_up_a_step_ahead",
        "tests/training/test_optimizer_schedules.py::test_constant_after_a_warm_up",
        in_file(
            "biomass_jax/training/optimizer.py", ("rising = warmup_from + t *", "rising = warmup_from + (t + 1) *")
        ),
    ),
    Mutation(
        "accumulation_keeps_the_last_gradient",
        "tests/training/test_steps.py::test_accumulation_gives_the_step_of_the_whole_batch",
        in_file(STEPS, ("jax.tree.map(jnp.add, grads, new)", "new")),
    ),
    Mutation(
        "averages_forget_instead_of_keeping",
        "tests/training/test_steps.py::test_averages_follow_the_weights_and_batch_statistics",
        in_file(STEPS, ("decay * old + (1 - decay) * value", "(1 - decay) * old + decay * value")),
    ),
    Mutation(
        "frozen_weights_decay",
        "tests/training/test_steps.py::test_a_frozen_encoder_keeps_every_bit_while_it_draws",
        in_file(OPTIMIZER, ('"frozen": optax.set_to_zero()', '"frozen": optimizer')),
    ),
    Mutation(
        "averages_start_from_fresh_weights",
        "tests/training/test_state.py::test_averages_start_from_the_loaded_weights",
        in_file(
            STATE, ("ema = jax.tree.map(jnp.copy, variables) if state.ema is not None else None", "ema = state.ema")
        ),
    ),
    Mutation(
        "averages_not_scored",
        "tests/training/test_state.py::test_averages_are_what_is_scored",
        in_file(STATE, ("return self.ema or {", "return {")),
    ),
    Mutation(
        "trace_a_step_too_long",
        "tests/training/test_monitor.py::test_a_trace_covers_its_steps_and_no_more",
        in_file("biomass_jax/training/monitor.py", ("elif step >= self._stop", "elif step > self._stop")),
    ),
    Mutation(
        "compiling_counts_as_speed",
        "tests/training/test_monitor_lines.py::test_compiling_is_no_part_of_the_speed",
        in_file("biomass_jax/training/loop.py", ("self.clock.restart()  # compiling", "pass  # compiling")),
    ),
    Mutation(
        "a_latecomer_takes_the_takers_lock",
        "tests/runtime/test_lock.py::test_a_latecomer_does_not_take_the_lock_of_the_taker",
        in_file("biomass_jax/runtime/lock.py", ("if _read(path) == found:", "if found:")),
    ),
)

PLACES = (
    Mutation(
        "bias_tables_split",
        "tests/runtime/test_mesh.py::test_what_is_picked_by_rows_or_used_whole_is_not_split",
        in_file(MESH, ('(r"/relative_position_bias_table$", None),', "")),
    ),
    Mutation(
        "small_arrays_split",
        "tests/runtime/test_mesh.py::test_large_arrays_are_split_where_no_rule_says_otherwise",
        in_file(MESH, ("SMALLEST_SPLIT = 2**14", "SMALLEST_SPLIT = 2**4")),
    ),
    Mutation(
        "edges_repeated_for_reflected",
        "tests/prediction/test_tiling.py::test_reflection_is_repeated_like_stepwise_mirroring",
        in_file(
            TILING,
            ("return np.where(folded < size, folded, period - folded)", "return np.clip(positions, 0, size - 1)"),
        ),
    ),
    Mutation(
        "ramps_do_not_sum_to_one",
        "tests/prediction/test_tiling.py::test_ramps_of_neighbours_sum_to_one",
        in_file(TILING, ("np.arange(1, ramp + 1) / (ramp + 1)", "np.arange(1, ramp + 1) / ramp")),
    ),
    Mutation(
        "weights_of_old_rows_kept",
        "tests/prediction/test_tiling.py::test_streaming_equals_a_plain_whole_array_loop",
        in_file(TILING, ("for accumulator in (self._sum, self._weight):", "for accumulator in (self._sum,):")),
    ),
    Mutation(
        "last_tile_left_out",
        "tests/prediction/test_tiling.py::test_last_tile_is_moved_back_to_the_end",
        in_file(TILING, ("if starts[-1] != padded - tile:", "if starts[-1] > padded - tile:")),
    ),
    Mutation(
        "statistics_count_what_has_no_data",
        "tests/data/raster/test_cog_maps.py::test_a_map_carries_the_statistics_of_its_values_however_its_rows_came",
        in_file(
            "biomass_jax/data/raster/cog.py",
            ("found = row[row != self._nodata].astype", "found = row[row == row].astype"),
        ),
    ),
    Mutation(
        "item_of_the_map_before_stays",
        "tests/prediction/test_maps.py::test_a_map_that_is_made_again_has_no_item_of_the_old_one",
        in_file("biomass_jax/prediction/maps.py", ("stac.remove_item(self._path)", "stac.item_path(self._path)")),
    ),
    Mutation(
        "outline_across_the_antimeridian_not_moved",
        "tests/data/raster/test_stac.py::test_a_map_across_the_antimeridian_is_cut_there[32660-600000]",
        in_file("biomass_jax/data/raster/stac.py", ("_cut(ring, 1.0) - (360, 0)", "_cut(ring, 1.0)")),
    ),
)

CONVERTER = (
    Mutation(
        "unfolded_channels_in_torchs_order",
        "tests/convert/test_layouts.py::test_transforms_move_every_element_to_its_place",
        in_file(
            "biomass_jax/convert/layouts.py",
            ("2, 2, *x.shape[1:]).swapaxes(0, 2)", "2, 2, *x.shape[1:]).swapaxes(0, 1)"),
        ),
    ),
    Mutation(
        "kernels_transposed_wrongly",
        "tests/convert/test_layouts.py::test_transforms_move_every_element_to_its_place",
        in_file(
            "biomass_jax/convert/layouts.py", ("LINEAR_KERNEL = Transform((1, 0))", "LINEAR_KERNEL = Transform((0, 1))")
        ),
    ),
    Mutation(
        "bias_tables_resized_about_corners",
        "tests/convert/test_layouts.py::test_bicubic_weights_by_hand",
        in_file("biomass_jax/convert/resize.py", ("+ half) - half)", ") )")),
    ),
)

INTERVALS = "biomass_jax/evaluation/intervals.py"
JACKKNIFE = "tests/evaluation/test_intervals.py::test_intervals_equal_a_loop_that_leaves_blocks_out"
EVALUATION = (
    Mutation(
        "bins_hold_their_upper_edge",
        "tests/evaluation/test_tables.py::test_bins_hold_their_lower_edge_and_not_their_upper",
        in_file("biomass_jax/evaluation/tables.py", ("(values < limits[1])", "(values <= limits[1])")),
    ),
    Mutation(
        "means_of_parts_ignored",
        "tests/tasks/test_scores.py::test_parts_merge_in_any_order_and_grouping",
        in_file(SCORES, (" + shift * shift * (self.n * other.n / total)", "")),
    ),
    Mutation(
        "batches_weigh_alike",
        "tests/tasks/test_scores.py::test_the_references_validation_loss_weighs_batches_by_their_chips",
        in_file(SCORES, ("total += chips * math.sqrt(", "total += math.sqrt(")),
    ),
    Mutation(
        "zero_is_no_label",
        "tests/tasks/test_scores.py::test_a_label_of_zero_counts_and_one_value_has_no_r2",
        in_file(SCORES, ("chosen = label >= 0", "chosen = label > 0")),
    ),
    Mutation(
        "errors_of_labels_not_extrapolated",
        "tests/evaluation/test_nugget.py::test_errors_that_neighbours_share_are_no_label_errors",
        in_file(
            "biomass_jax/evaluation/nugget.py", ("np.vander(_DISTANCES[used], 3)", "np.vander(_DISTANCES[used], 1)")
        ),
    ),
    Mutation(
        "errors_of_labels_twice",
        "tests/evaluation/test_nugget.py::test_it_is_that_of_the_forest_world_where_it_is_known",
        in_file(
            "biomass_jax/evaluation/nugget.py", ("np.nansum(differences**2, 0) / 2", "np.nansum(differences**2, 0)")
        ),
    ),
    Mutation(
        "students_t_is_normal",
        JACKKNIFE,
        in_file(INTERVALS, ("stdtrit(freedom, (1 + LEVEL) / 2) * np.sqrt(", "1.959964 * np.sqrt(")),
    ),
    Mutation(
        "unequal_blocks_count_alike",
        JACKKNIFE,
        in_file(INTERVALS, ("LEAST_THAT_COUNT, np.nan, counting - 1)", "LEAST_THAT_COUNT, np.nan, blocks - 1)")),
    ),
    Mutation(
        "blocks_of_two_models_not_paired",
        JACKKNIFE,
        in_file(INTERVALS, ("without - others", "without - others[..., ::-1]")),
    ),
    Mutation(
        "four_blocks_have_an_interval",
        "tests/evaluation/test_intervals.py::test_fewer_than_five_blocks_have_no_interval",
        in_file(INTERVALS, ("LEAST_BLOCKS = 5", "LEAST_BLOCKS = 4")),
    ),
    Mutation(
        "every_file_a_block",
        "tests/evaluation/test_tables.py::test_blocks_are_ground_and_not_tiles",
        in_file(
            "biomass_jax/evaluation/tables.py",
            (
                "ground_blocks([scored.places[number] for number in labelled], block_km)",
                "np.array(scored.chip_ids, dtype=object)[labelled]",
            ),
        ),
    ),
)

VARIANCE = "jnp.mean(variances + jnp.square(differences - middle), axis=0)"

ENSEMBLES = (
    Mutation(
        "variance_of_means_lost",
        "tests/models/test_ensemble.py::test_the_variance_is_that_of_the_mixtures_samples_and_formula",
        in_file(ENSEMBLE, (VARIANCE, "jnp.mean(variances + 0 * differences, axis=0)")),
    ),
    Mutation(
        "sample_variance_of_means",
        "tests/models/test_ensemble.py::test_the_variance_is_that_of_the_mixtures_samples_and_formula",
        in_file(ENSEMBLE, (VARIANCE, "jnp.mean(variances, axis=0) + jnp.var(means, axis=0, ddof=1)")),
    ),
    Mutation(
        "shared_encoder_is_each_ones_own",
        "tests/models/test_ensemble.py::test_variables_lie_as_the_module_draws_them",
        in_file(ENSEMBLE, ('if part != "encoder" or not shared_encoder', "")),
    ),
    Mutation(
        "bootstrap_by_chip",
        "tests/data/test_blocks.py::test_a_block_is_drawn_whole_and_as_often_as_its_name",
        in_file(
            BLOCKS,
            ("integers(len(names), size=len(names))", "integers(len(block), size=len(block))"),
            ("np.flatnonzero(block == one).tolist()", "[one]"),
        ),
    ),
    Mutation(
        "bootstrap_without_replacement",
        "tests/data/test_blocks.py::test_a_block_is_drawn_whole_and_as_often_as_its_name",
        in_file(BLOCKS, ("integers(len(names), size=len(names))", "permutation(len(names))")),
    ),
    Mutation(
        "bootstrap_of_statistics",
        "tests/training/test_run_inputs.py::test_a_bootstrap_changes_the_training_chips_and_nothing_else",
        in_file(
            "biomass_jax/training/run.py",
            (
                "    train, valid = open_splits(config)\n    loaded",
                "    train, valid = open_splits(config)\n    train = drawn_anew(config, train)\n    loaded",
            ),
            ("    train = drawn_anew(config, train)  # after", "    # after"),
        ),
    ),
)

MUTATIONS = (*MODEL, *LOSS, *TRAINING, *PLACES, *CONVERTER, *EVALUATION, *ENSEMBLES)
