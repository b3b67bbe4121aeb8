"""A tiny model on the demo's synthetic forest: one to three minutes on two cores.

    make demo
    python -m biomass_jax.main --config demo_finetune --workdir demo_out/finetune

Expected: val/rmse about 30 Mg/ha, where a regression on single pixels has 42 and the best constant 52.
--config.reference=True: only with --config.loss=rmse --config.model.spread=none, as finetune_all_biomes.py.
"""

from ml_collections import config_dict

from biomass_jax.configs import finetune_all_biomes


def get_config() -> config_dict.ConfigDict:
    """Fields of the demo's fine-tuning."""
    config = finetune_all_biomes.get_config().unlock()
    config.data.path = "demo_out/shards"
    config.data.threads = 2
    config.batch_size = 4
    config.epochs = 14
    # How far off an estimate may be is learnt with it; the estimate as by the squared error.
    config.loss = "beta_nll"
    config.nll_beta = 1.0
    config.model.spread = "gaussian"
    config.log_every = 5
    config.draw_every = 5
    # Tokens of two pixels, and two blocks a stage: the second one shifts its windows, as the released model does.
    config.model.patch_size = 2
    config.model.upscale_layers = 1
    config.model.embed_dim = 12
    config.model.depths = (2, 2, 2, 2)
    config.model.num_heads = (1, 2, 4, 8)
    config.model.mlp_ratio = 2.0
    config.model.drop_path_rate = 0.0
    config.model.decoder_channels = 12
    config.model.head_dropout = 0.0
    config.model.output_scale = 60.0
    config.model.output_offset = 80.0
    config.optimizer.learning_rate = 1e-2
    # The synthetic wind blows from the west and the sun stands in the south: mirror images would be another world.
    config.augment.flip = False
    config.augment.turn = False
    config.schedule.kind = "cosine"
    config.schedule.warmup_epochs = 1.0
    config.schedule.stop_patience = 0
    return config.lock()
