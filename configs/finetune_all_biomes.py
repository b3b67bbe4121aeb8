"""Fine-tune the regression model on all biomes, as the released model was.

    python -m biomass_jax.main --config configs/finetune_all_biomes.py --workdir OUT \
        --config.data.path=SHARDS --config.init_from=PRETRAINED --config.load=encoder

PRETRAINED is a bundle of a pretrained encoder (configs/pretrain_simmim_swin_b_100ep.py, or a converted SimMIM file);
without init_from the encoder starts from random weights.

Hardware: batch 64 of Swin-B in float32 takes about 40 GB; `--config.optimizer.gradient_accumulation=4` a quarter of it.
Expected: the reference's validation RMSE fell from 88.0 to 55.5 Mg/ha in 114 epochs of 208 steps.

--config.reference=True trains as the reference did: horizontal flips, rotations within 30 degrees whose border gets
false labels of 0, labels kept on no-data pixels, weight decay on every parameter, and val/loss as the mean of the
batches' RMSEs.
"""

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
    """Fields of a fine-tuning run, with the released model's hyper-parameters."""
    config = common.training()
    config.mode = "finetune"
    config.batch_size = 64
    config.epochs = 300
    config.loss = "rmse"  # rmse (root once, over the whole batch) | mse | mae | huber
    config.huber_delta = 50.0  # Mg/ha, where huber turns from square to linear
    config.reference = False  # see above

    # The decoder's and head's fields.
    config.model.decoder_channels = config_dict.placeholder(int)
    config.model.pool_scales = config_dict.placeholder(tuple)
    config.model.upscale_layers = config_dict.placeholder(int)
    config.model.head_dropout = config_dict.placeholder(float)
    config.model.final_relu = config_dict.placeholder(bool)
    # Prediction = scale x last layer + offset, Mg/ha: from random weights, the labels' std and mean save many epochs.
    config.model.output_scale = config_dict.placeholder(float)  # 1
    config.model.output_offset = config_dict.placeholder(float)  # 0

    config.optimizer.learning_rate = 3.1406904191973693e-4
    config.optimizer.weight_decay = 0.03283253068408954
    config.schedule.kind = "plateau"
    config.schedule.stop_patience = 100

    config.augment = config_dict.ConfigDict()
    config.augment.flip = True
    config.augment.turn = True  # by quarter turns
    config.augment.rotate_degrees = 0.0  # rotations within +-; labels move by their centres, none lost or copied
    config.augment.rotate_probability = 0.5
    config.augment.rotate_label_fill = -1.0  # label where a rotation uncovers the border; -1 = none
    return config.lock()
