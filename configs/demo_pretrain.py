"""Pretrain the demo's tiny model on its synthetic forest: well under a minute on two cores.

    make demo
    python -m biomass_jax.main --config demo_pretrain --workdir demo_out/pretrain

Expected: val/loss 0.48, where predicting each band's mean gives 0.61: forty-eight steps are a beginning. On
scenes with fields and clouds 300 steps come below half of that mean's loss
(tests/training/test_run_pretraining_learns.py).
"""

from ml_collections import config_dict

from biomass_jax.configs import demo_finetune, pretrain_simmim_swin_b_100ep


def get_config() -> config_dict.ConfigDict:
    """Fields of the demo's pretraining."""
    config = pretrain_simmim_swin_b_100ep.get_config().unlock()
    tiny = demo_finetune.get_config()
    config.data.path = tiny.data.path
    config.data.threads = tiny.data.threads
    config.dtype = "float32"
    config.batch_size = 8
    config.epochs = 4
    config.log_every = 5
    config.draw_every = 4
    for name in ("patch_size", "embed_dim", "depths", "num_heads", "mlp_ratio", "drop_path_rate"):
        config.model[name] = tiny.model[name]
    config.model.encoder_stride = 16  # pixels a token of the last stage
    config.mask_patch_size = 16  # such a token, as the recipe's 32 px are
    config.optimizer.learning_rate = 1e-2
    config.optimizer.reference_batch = 0
    config.schedule.warmup_epochs = 1.0
    return config.lock()
