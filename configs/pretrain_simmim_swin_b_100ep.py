"""Pretrain Swin-B by SimMIM, the official recipe of 100 epochs at 224 px and window 7.

    python -m biomass_jax.main --config pretrain_simmim_swin_b_100ep --workdir OUT --config.data.path=SHARDS

SHARDS hold images, with labels (which are ignored) or without; several folders are given with weights:
--config.data.path=A,B --config.data.weights="(3.0,1.0)".

Hardware: batch 2048 of Swin-B in bfloat16 takes a TPU v4-32 or 16 GPUs of 80 GB; fewer devices make up for it by
--config.optimizer.gradient_accumulation. Expected: a masked L1 (val/loss) well below predicting each band's mean (0.8
z-scores for a normal distribution); the figures say whether fields and clouds come back.
"""

from ml_collections import config_dict

from biomass_jax.configs import common
from biomass_jax.training.config import Pretrain


def get_config() -> config_dict.ConfigDict:
    """Fields of a pretraining run."""
    config = common.config_of(Pretrain, "pretrain")
    config.batch_size = 2048
    config.epochs = 100
    config.dtype = "bfloat16"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.reference_batch = 512
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 5.0
    config.schedule.kind = "cosine"
    config.schedule.warmup_epochs = 10.0
    config.schedule.warmup_from = 1e-6
    config.schedule.min_lr = 1e-5
    return config.lock()
