"""What a sweep over fine-tuning varies, around the released model's own choices.

    biomass-jax sweep --config finetune_all_biomes --space finetune \
        --workdir OUT --trials 50 --prune --config.data.path=SHARDS --config.init_from=PRETRAINED --config.load=encoder

With `--config.load=all` the decoder comes from the bundle: then leave `model.decoder_channels` out.
"""

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution


def get_space() -> dict[str, BaseDistribution]:
    """Fields of the config and where to look, for `--sampler tpe` and `--sampler random`."""
    return {
        "optimizer.learning_rate": FloatDistribution(1e-5, 2e-3, log=True),  # released: 3.1e-4
        "optimizer.weight_decay": FloatDistribution(1e-4, 0.3, log=True),  # released: 0.033
        "model.head_dropout": FloatDistribution(0.0, 0.5),  # of whole channels; released: 0.16
        "model.drop_path_rate": FloatDistribution(0.0, 0.4),  # of the last block, growing from 0; released: 0.3
        "model.decoder_channels": CategoricalDistribution((16, 32, 64, 128)),  # released: 32
    }


def get_grid() -> dict[str, list[str | int | float | bool]]:
    """Fields of the config and their values, for `--sampler grid`: each combination once, 36 in all."""
    return {
        "optimizer.learning_rate": [1e-4, 3e-4, 1e-3],
        "optimizer.weight_decay": [0.01, 0.03, 0.1],
        "model.drop_path_rate": [0.1, 0.3],
        "model.decoder_channels": [32, 64],
    }
