"""Give a bundle a spread: how far off its estimate may be, pixel by pixel, learnt on its frozen features.

    python -m biomass_jax.main --config spread --workdir OUT --config.data.path=SHARDS --config.init_from=MODEL

Nothing but the layer `head/spread` learns, 33 numbers of the released model; its estimates stay as they are, to the
bit. `OUT/best` has the output bands `agbd` and `agbd_sd`. Before its numbers are called standard deviations, calibrate
them on chips that it was not trained on.

Hardware: no gradient passes through the encoder, so that a step costs little more than a map of its chips: minutes on
a GPU, and no more memory than `predict` takes. Expected: val/rmse stays that of MODEL from the first epoch on; val/loss
(minus the mean log density of the labels) falls below ln(val/rmse) + 1.42, which one sd for all pixels reaches.
--config.reference=True: refused, the reference's loss is rmse.
"""

from ml_collections import config_dict

from biomass_jax.configs import finetune_all_biomes


def get_config() -> config_dict.ConfigDict:
    """Fields of a run that trains a spread alone."""
    config = finetune_all_biomes.get_config().unlock()
    config.model.spread = "gaussian"
    config.loss = "gaussian_nll"
    config.spread_only = True
    config.epochs = None
    config.steps = 1000
    config.batch_size = 16
    config.draw_every = 0  # of estimates, which stay as they are
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.0
    config.schedule.kind = "cosine"
    config.schedule.stop_patience = 0
    return config.lock()
