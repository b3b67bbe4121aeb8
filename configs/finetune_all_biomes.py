"""Fine-tune the regression model on all biomes, as the released model was.

    python -m biomass_jax.main --config finetune_all_biomes --workdir OUT \
        --config.data.path=SHARDS --config.init_from=PRETRAINED --config.load=encoder

PRETRAINED is a bundle of a pretrained encoder (configs/pretrain_simmim_swin_b_100ep.py, or a converted SimMIM file);
without init_from the encoder starts from random weights.

Hardware: batch 64 of Swin-B in float32 takes about 40 GB; `--config.optimizer.gradient_accumulation=4` a quarter of it.
Expected: the reference's validation RMSE fell from 88.0 to 55.5 Mg/ha in 114 epochs of 208 steps.

--config.reference=True trains as the reference did: horizontal flips, rotations within 30 degrees whose border gets
false labels of 0, labels kept on no-data pixels, a filled band set to 0 without its pixel's others, weight decay on
every parameter, and val/loss as the mean of the batches' RMSEs. docs/train.md lists every field.
"""

from ml_collections import config_dict

from biomass_jax.configs import common
from biomass_jax.training.config import Finetune


def get_config() -> config_dict.ConfigDict:
    """Fields of a fine-tuning run, with the released model's hyper-parameters."""
    config = common.config_of(Finetune, "finetune")
    config.batch_size = 64
    config.epochs = 300
    config.optimizer.learning_rate = 3.1406904191973693e-4
    config.optimizer.weight_decay = 0.03283253068408954
    config.schedule.kind = "plateau"
    config.schedule.stop_patience = 100
    return config.lock()
