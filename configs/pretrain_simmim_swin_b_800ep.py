"""Pretrain Swin-B by SimMIM, the official recipe of 800 epochs at 224 px and window 7.

    python -m biomass_jax.main --config pretrain_simmim_swin_b_800ep --workdir OUT --config.data.path=SHARDS

Data, hardware and what is expected: as pretrain_simmim_swin_b_100ep.py, eight times as long.
"""

from ml_collections import config_dict

from biomass_jax.configs import pretrain_simmim_swin_b_100ep


def get_config() -> config_dict.ConfigDict:
    """Fields of a long pretraining run."""
    config = pretrain_simmim_swin_b_100ep.get_config().unlock()
    config.epochs = 800
    config.optimizer.learning_rate = 1e-4
    config.schedule.kind = "multistep"
    config.schedule.warmup_from = 5e-7
    config.schedule.milestones = (700,)
    return config.lock()
