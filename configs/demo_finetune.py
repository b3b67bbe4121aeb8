"""A tiny model on the demo's synthetic forest: about a minute on two cores.

    make demo
    python -m biomass_jax.main --config demo_finetune --workdir demo_out/finetune

Expected: val/rmse below 60 % of the best constant predictor's. --config.reference=True: as finetune_all_biomes.py.
"""

from ml_collections import config_dict

from biomass_jax.configs import finetune_all_biomes


def get_config() -> config_dict.ConfigDict:
    """Fields of the demo's fine-tuning."""
    config = finetune_all_biomes.get_config().unlock()
    config.data.path = "demo_out/shards"
    config.data.threads = 2
    config.batch_size = 8
    config.epochs = 18
    config.log_every = 2
    config.draw_every = 9
    # Half of the synthetic forest's variance is between neighbouring pixels: a token a pixel learns that in seconds.
    config.model.patch_size = 1
    config.model.upscale_layers = 0
    config.model.embed_dim = 8
    config.model.depths = (1, 1, 1, 1)
    config.model.num_heads = (1, 2, 4, 8)
    config.model.mlp_ratio = 2.0
    config.model.drop_path_rate = 0.0
    config.model.decoder_channels = 8
    config.model.head_dropout = 0.0
    config.model.output_scale = 75.0
    config.model.output_offset = 130.0
    config.optimizer.learning_rate = 1e-2
    config.schedule.kind = "cosine"
    config.schedule.warmup_epochs = 1.0
    config.schedule.stop_patience = 0
    return config.lock()
